"""Prefill over histories of latents against its definition in float64, in Triton's interpreter."""

import pytest
import torch
from kvcluster_kernels.packed_history import prefill_history

from tests.kernels.latent_cases import ROTATIONS
from tests.kernels.latent_history_cases import VALUES, LatentCase, check, latent_arguments


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("bits", [None, 4])
def test_every_rotation(bits: int | None, rotation: str, interpreted: torch.device) -> None:
    check(LatentCase(bits=bits, rotation=rotation), interpreted)


@pytest.mark.parametrize("values", VALUES)
def test_every_kind_of_values(values: str, interpreted: torch.device) -> None:
    check(LatentCase(values=values), interpreted)


@pytest.mark.parametrize("bits", [4, 3])
def test_rotated_latents(bits: int, interpreted: torch.device) -> None:
    check(LatentCase(rank=72, bits=bits, is_rotated=True, values="rotated3"), interpreted)


@pytest.mark.parametrize(("rank", "bits"), [(44, None), (44, 4), (72, 8), (72, 3)])
def test_every_rank_and_width(rank: int, bits: int | None, interpreted: torch.device) -> None:
    check(LatentCase(rank=rank, bits=bits), interpreted)


@pytest.mark.parametrize(("group", "scale_bits"), [(16, 16), (32, 8)])
def test_every_grid_of_scales(group: int, scale_bits: int, interpreted: torch.device) -> None:
    check(LatentCase(bits=4, group=group, scale_bits=scale_bits), interpreted)


def test_heads_whose_size_is_no_power_of_two(interpreted: torch.device) -> None:
    check(LatentCase(dim=96, rotation="partial"), interpreted)


def test_a_history_in_pieces(interpreted: torch.device) -> None:
    check(LatentCase(bits=4), interpreted, workspace_bytes=1)


def test_half_precision(interpreted: torch.device) -> None:
    check(LatentCase(bits=4, dtype=torch.float16), interpreted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_keys": 999}, "do not fit"),
        ({"positions_N": torch.zeros(1, dtype=torch.int32)}, "position of each block"),
    ],
    ids=["keys", "positions"],
)
def test_arguments_that_do_not_fit_are_refused_with_the_reason(
    change: dict[str, object], words: str, interpreted: torch.device
) -> None:
    q_THD, history, _ = latent_arguments(LatentCase(), interpreted)

    with pytest.raises(ValueError, match=words):
        prefill_history(q_THD, history._replace(**change), scale=0.1)
