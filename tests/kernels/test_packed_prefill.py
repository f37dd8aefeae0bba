"""Prefill over encoded blocks against its definition in float64, in Triton's interpreter."""

import pytest
import torch
from kvcluster_kernels import packed_prefill_reference
from kvcluster_kernels.packed_history import MIN_RESTORED_ROWS, prefill_history, prefill_restored
from kvcluster_kernels.packed_prefill import History, PackedTiles, prefill_packed
from kvcluster_kernels.packed_restore import restore

from tests.kernels.packed_prefill_cases import (
    SCALE,
    PackedCase,
    assert_close_to_definition,
    packed_arguments,
)

SMALL = PackedTiles(block_m=16, num_warps=4, num_stages=2)


def check(case: PackedCase, device: torch.device, num_splits: int | None = None) -> None:
    given = packed_arguments(case, device)

    found = prefill_packed(
        given.q_THD,
        given.history,
        scale=SCALE,
        carry=given.carry,
        tiles=SMALL,
        num_splits=num_splits,
    )

    assert_close_to_definition(found, given, torch.float16)


@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 64), (4, 32), (2, 32), (2, 16)])
def test_integers_of_every_width_and_group(
    bits: int, group: int, scale_bits: int, interpreted: torch.device
) -> None:
    case = PackedCase(bits=bits, group=group, value_group=group, scale_bits=scale_bits)

    check(case, interpreted)


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize(("dim", "value_dim"), [(96, 96), (128, 128), (64, 128), (256, 256)])
def test_every_head_size(dim: int, value_dim: int, bits: int, interpreted: torch.device) -> None:
    value_group = 32 if value_dim == 96 else 64
    case = PackedCase(bits=bits, dim=dim, value_dim=value_dim, value_group=value_group)

    check(case, interpreted)


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("num_keys", [1, 64, 130])
def test_every_length(num_keys: int, bits: int, interpreted: torch.device) -> None:
    check(PackedCase(bits=bits, num_keys=num_keys), interpreted)


@pytest.mark.parametrize("bits", [0, 4])
def test_rows_of_several_tiles_and_what_they_saw_before(
    bits: int, interpreted: torch.device
) -> None:
    case = PackedCase(bits=bits, num_tokens=11, num_heads=6, is_carried=True)

    check(case, interpreted)


@pytest.mark.parametrize("num_splits", [2, 5])
def test_any_number_of_splits(num_splits: int, interpreted: torch.device) -> None:
    check(PackedCase(bits=4, num_keys=190, is_carried=True), interpreted, num_splits)


@pytest.mark.parametrize("bits", [0, 8])
def test_blocks_of_another_length(bits: int, interpreted: torch.device) -> None:
    check(PackedCase(bits=bits, block_tokens=32, group=32), interpreted)


def test_queries_far_from_one_are_not_lost(interpreted: torch.device) -> None:
    """Beyond what float16 holds."""
    given = packed_arguments(PackedCase(bits=0), interpreted)
    given = given._replace(q_THD=given.q_THD * 1e6)

    found = prefill_packed(given.q_THD, given.history, scale=1e-6, tiles=SMALL)

    small = packed_arguments(PackedCase(bits=0), interpreted)
    right = prefill_packed(small.q_THD, small.history, scale=1.0, tiles=SMALL)
    torch.testing.assert_close(found.lse_TH, right.lse_TH, rtol=1e-3, atol=1e-3)


def test_no_query_gives_no_output(interpreted: torch.device) -> None:
    given = packed_arguments(PackedCase(bits=4), interpreted)

    found = prefill_packed(given.q_THD[:0], given.history, scale=SCALE)

    assert found.out_THD.shape == (0, 4, 64)
    assert found.lse_TH.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, h: (q[:, :3], h), "3 query, 2 KV heads"),
        (lambda q, h: (q, h._replace(num_keys=999)), "do not fit"),
        (lambda q, h: (q, h._replace(values=_floats(h))), "both integers or floats"),
        (lambda q, h: (q[..., :24], h), "codes"),
    ],
    ids=["heads", "keys", "kinds", "channels"],
)
def test_arguments_that_do_not_fit_are_refused_with_the_reason(
    change: object, words: str, interpreted: torch.device
) -> None:
    given = packed_arguments(PackedCase(bits=4), interpreted)
    q_THD, history = change(given.q_THD, given.history)  # type: ignore[operator]

    with pytest.raises(ValueError, match=words):
        prefill_packed(q_THD, history, scale=SCALE)


def _floats(history: History) -> object:
    return packed_arguments(PackedCase(bits=0), history.blocks_N.device).history.values


@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize(("bits", "group"), [(0, 64), (8, 64), (4, 32), (3, 32), (2, 16)])
def test_restored_numbers_are_those_of_the_codec(
    bits: int, group: int, scale_bits: int, interpreted: torch.device
) -> None:
    case = PackedCase(bits=bits, group=group, value_group=group, scale_bits=scale_bits, dim=96)
    history = packed_arguments(case, interpreted).history

    found = restore(history, case.dim, torch.float32)

    right = packed_prefill_reference.restored(history, case.dim, torch.float64)
    for x_1KSD, right_1KSD in zip(found[:2], right[:2], strict=True):
        # Code times scale and zero are of the size of the largest numbers, and each is rounded.
        error = float(4 * torch.finfo(torch.float32).eps * right_1KSD.abs().max())
        whole = x_1KSD[:, :, : case.num_keys].double()
        torch.testing.assert_close(whole, right_1KSD, rtol=0, atol=error)


@pytest.mark.parametrize("bits", [0, 8, 4, 3])
@pytest.mark.parametrize("num_keys", [64, 190])
def test_a_history_restored_in_pieces_is_attended_to_as_a_whole(
    num_keys: int, bits: int, interpreted: torch.device
) -> None:
    given = packed_arguments(PackedCase(bits=bits, num_keys=num_keys, is_carried=True), interpreted)

    found = prefill_restored(
        given.q_THD, given.history, scale=SCALE, carry=given.carry, workspace_bytes=1
    )

    assert_close_to_definition(found, given, torch.float32)


def test_codes_of_3_bits_are_restored(interpreted: torch.device) -> None:
    given = packed_arguments(PackedCase(bits=3, group=32, value_group=32), interpreted)

    with pytest.raises(ValueError, match="3 bits are restored"):
        prefill_packed(given.q_THD, given.history, scale=SCALE)
    found = prefill_history(given.q_THD, given.history, scale=SCALE)

    assert_close_to_definition(found, given, torch.float32)


def test_a_history_of_nothing_leaves_what_was_carried(interpreted: torch.device) -> None:
    given = packed_arguments(PackedCase(bits=4, is_carried=True), interpreted)
    nothing = given.history._replace(num_keys=0)

    for attend in (prefill_restored, prefill_packed):
        found = attend(given.q_THD, nothing, scale=SCALE, carry=given.carry)

        assert given.carry is not None
        torch.testing.assert_close(found.out_THD, given.carry.out_THD)
        torch.testing.assert_close(found.lse_TH, given.carry.lse_TH)


@pytest.mark.parametrize("num_tokens", [5, MIN_RESTORED_ROWS // 2])
def test_few_rows_and_many_see_the_same(num_tokens: int, interpreted: torch.device) -> None:
    given = packed_arguments(PackedCase(bits=8, num_keys=64, num_tokens=num_tokens), interpreted)

    found = prefill_history(given.q_THD, given.history, scale=SCALE)

    assert_close_to_definition(found, given, torch.float16)
