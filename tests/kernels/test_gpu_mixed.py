"""Integer keys beside rotated values, with kernels compiled for the GPU."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels.paging import Attention

from kvcluster.codec.quantized import ChannelQuantizer
from tests.kernels.mixed_cases import check
from tests.kernels.test_gpu_latent import LONG

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("codec", "bits"),
    [
        (ChannelQuantizer(4), 3),
        (ChannelQuantizer(4, scale_bits=8), 3),
        (ChannelQuantizer(8, group=32), 4),
        (ChannelQuantizer(3), 2),
    ],
    ids=str,
)
def test_every_width(codec: ChannelQuantizer, bits: int, dim: int, gpu: torch.device) -> None:
    check(replace(LONG, dim_k=dim, dim_v=dim), codec, bits, gpu)


def test_several_query_tokens(gpu: torch.device) -> None:
    attention = Attention(scale=0.1, softcap=5.0, window=1000)

    check(replace(LONG, num_tokens=4), ChannelQuantizer(4), 3, gpu, attention)
