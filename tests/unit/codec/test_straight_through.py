"""A trainable latent reads what the codec reads, and has a slope where the codec has steps.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension.
"""

import pytest
import torch
from torch import Tensor

from kvcluster.codec.array import consecutive
from kvcluster.codec.basis import Basis
from kvcluster.codec.latent import LatentStorage, LatentValues
from kvcluster.codec.straight_through import TrainableLatent
from kvcluster.types import LayerGeometry
from tests.codec_models import calibration_of
from tests.unit.quality.toys import spec_of

HEADS, DIM, RANK = 3, 8, 16
GEOMETRY = LayerGeometry(num_query_heads=3, num_kv_heads=HEADS, key_dim=DIM, value_dim=DIM, scale=1)
FITTED: Basis = calibration_of(spec_of(GEOMETRY)).layers[0].values
STORAGES = {
    "float16": LatentStorage(),
    "8 bits": LatentStorage(bits=8),
    "4 bits": LatentStorage(bits=4, group=16),
    "4 bits, short scales": LatentStorage(bits=4, scale_bits=8),
    "2 bits": LatentStorage(bits=2),
    "4 bits, rotated": LatentStorage(bits=4, is_rotated=True),
    "2 bits, rotated": LatentStorage(bits=2, is_rotated=True),
}


def blocks() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_BKSD = torch.randn(4, HEADS, 64, DIM, generator=generator)
    return x_BKSD, consecutive(torch.arange(4) * 64, 64)


def side_by_side(x_BKSD: Tensor) -> Tensor:
    return x_BKSD.transpose(1, 2).flatten(2)


def codec_of(basis: Basis, storage: LatentStorage) -> LatentValues:
    return LatentValues(basis, num_heads=HEADS, rank=RANK, storage=storage)


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES.keys())
def test_what_is_restored_is_what_the_codec_decodes(storage: LatentStorage) -> None:
    codec = codec_of(FITTED, storage)
    x_BKSD, positions_BS = blocks()

    restored_BSF = TrainableLatent(codec, FITTED).restored(side_by_side(x_BKSD), positions_BS)

    decoded_BKSD = codec.decode(codec.encode(x_BKSD, positions_BS), positions_BS)
    expected_BSF = side_by_side(decoded_BKSD)
    off_BSF = (restored_BSF - expected_BSF).abs()
    # Products in float32 and not in fixed point: a latent between two codes, of which there are
    # few, may take the other one.
    is_rounding_BSF = off_BSF <= 1e-5 * expected_BSF.abs().max()
    assert is_rounding_BSF.float().mean() > 0.99


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES.keys())
def test_a_moved_basis_restores_as_the_codec_of_that_basis(storage: LatentStorage) -> None:
    latent = TrainableLatent(codec_of(FITTED, storage), FITTED)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in latent.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    moved = latent.basis()
    codec = codec_of(moved, storage)
    x_BKSD, positions_BS = blocks()

    restored_BSF = latent.restored(side_by_side(x_BKSD), positions_BS)

    assert not torch.allclose(moved.down_FC, FITTED.down_FC[:, :RANK], atol=1e-3)
    decoded_BKSD = codec.decode(codec.encode(x_BKSD, positions_BS), positions_BS)
    off_BSF = (restored_BSF - side_by_side(decoded_BKSD)).abs()
    # As above.
    assert (off_BSF <= 1e-5 * decoded_BKSD.abs().max()).float().mean() > 0.99


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES.keys())
def test_every_parameter_has_a_gradient_through_the_rounding(storage: LatentStorage) -> None:
    latent = TrainableLatent(codec_of(FITTED, storage), FITTED)
    x_BKSD, positions_BS = blocks()
    x_BSF = side_by_side(x_BKSD)

    loss = (latent.restored(x_BSF, positions_BS) - x_BSF).square().mean()

    for gradient in torch.autograd.grad(loss, latent.parameters()):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_untrained_it_is_the_fitted_basis_of_the_rank() -> None:
    basis = TrainableLatent(codec_of(FITTED, LatentStorage()), FITTED).basis()

    assert torch.equal(basis.down_FC, FITTED.prefix(RANK).down_FC)
    assert torch.equal(basis.up_CF, FITTED.prefix(RANK).up_CF)
    assert torch.equal(basis.mean_F, FITTED.mean_F)
