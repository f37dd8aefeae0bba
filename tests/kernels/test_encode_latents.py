"""Latents written into pages in Triton's interpreter: the bytes of the codecs."""

import pytest
import torch
from kvcluster_kernels.encode_blocks import Blocks
from kvcluster_kernels.encode_integers import IntegerFormat
from kvcluster_kernels.encode_latents import LatentProjection, encode_latents

from kvcluster.codec.array import BlockShape
from kvcluster.codec.latent import LatentStorage, LatentValues
from tests.kernels.encode_cases import assert_bytes_of_codec, drawn_blocks
from tests.kernels.latent_cases import draw_basis

SHAPE = BlockShape(num_heads=2, num_tokens=32, dim=32)
FORMS = (None, IntegerFormat(8, 32), IntegerFormat(4, 16), IntegerFormat(3, 32, 8))


def check(form: IntegerFormat | None, rank: int, shape: BlockShape, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = draw_basis(shape.num_heads, shape.dim, rank, generator).to(device)
    storage = LatentStorage()
    if form is not None:
        storage = LatentStorage(bits=form.bits, group=form.group, scale_bits=form.scale_bits)
    codec = LatentValues(basis, num_heads=shape.num_heads, rank=rank, storage=storage)
    projection = LatentProjection.of(basis.down_FC, basis.mean_F)

    def encode(blocks: Blocks, planes: tuple[torch.Tensor, ...]) -> None:
        encode_latents(blocks, projection, form, planes)

    assert_bytes_of_codec(codec, drawn_blocks(shape, device), encode)


@pytest.mark.parametrize("rank", [16, 40])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_latents(form: IntegerFormat | None, rank: int, interpreted: torch.device) -> None:
    check(form, rank, SHAPE, interpreted)
