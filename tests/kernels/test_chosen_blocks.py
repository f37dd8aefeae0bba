"""Blocks are picked and listed by a kernel as they are defined, and bounds are those of Quest."""

import pytest
import torch
from kvcluster_kernels import block_bounds_plain, chosen_blocks_plain
from kvcluster_kernels.block_bounds import BoundsOfRows, largest_bounds, largest_bounds_of_rows
from kvcluster_kernels.chosen_blocks import (
    ALWAYS,
    ENCODED,
    EXACT,
    FREE,
    MAX_BLOCKS,
    Candidates,
    Pools,
    lists,
    pick,
    row_tables,
)
from kvcluster_kernels.paging import PagedRows
from torch import Tensor

from kvcluster.selection.base import KeySummaries, upper_bounds

NUM_QUERIES = 5


def drawn_scores(num_blocks: int, num_scored: int, num_choosing: int) -> Tensor:
    """Of few values, of either sign, so that there are ties; some are zeros of either sign."""
    generator = torch.Generator().manual_seed(num_blocks)
    shape = (num_choosing, NUM_QUERIES, num_scored)
    return torch.randint(-6, 7, shape, generator=generator) * torch.tensor(0.37)


def drawn_candidates(num_blocks: int) -> Candidates:
    """All of them free, none, and what is between; more to pick than there are, and fewer than
    none."""
    generator = torch.Generator().manual_seed(num_blocks)
    flags_JB = torch.randint(0, 16, (NUM_QUERIES, num_blocks), generator=generator)
    flags_JB[1] |= FREE
    flags_JB[2] &= ~(FREE | ALWAYS)
    flags_JB[flags_JB & ALWAYS > 0] &= ~FREE
    # A block is found once.
    flags_JB[flags_JB & EXACT > 0] &= ~ENCODED
    num_J = torch.tensor([num_blocks // 3, 2, 7, 2 * num_blocks, -1], dtype=torch.int32)
    return Candidates(flags_JB.to(torch.uint8), num_J)


def on(device: torch.device, candidates: Candidates) -> Candidates:
    return Candidates(*(None if x is None else x.to(device) for x in candidates))


def check_picks(num_blocks: int, num_choosing: int, device: torch.device, *, short: int) -> None:
    scores = drawn_scores(num_blocks, num_blocks - short, num_choosing).to(device)
    candidates = on(device, drawn_candidates(num_blocks))

    found_GJB = pick(scores, candidates)

    assert torch.equal(found_GJB, chosen_blocks_plain.pick(scores, candidates))
    assert found_GJB.any()


def check_lists(num_blocks: int, device: torch.device) -> None:
    candidates = on(device, drawn_candidates(num_blocks))
    reads_GJB = chosen_blocks_plain.pick(
        drawn_scores(num_blocks, num_blocks, 3).to(device), candidates
    )

    found = lists(reads_GJB, candidates.flags_JB, ENCODED)

    want = chosen_blocks_plain.lists(reads_GJB, candidates.flags_JB, ENCODED)
    assert torch.equal(found.counts_GJ, want.counts_GJ)
    places_B = torch.arange(num_blocks, device=device)
    is_listed_GJB = places_B < want.counts_GJ[..., None]
    assert torch.equal(found.blocks_GJB[is_listed_GJB], want.blocks_GJB[is_listed_GJB])


def check_tables(
    num_choosing: int, num_kv_heads: int, device: torch.device, *, picks: bool, has_encoded: bool
) -> None:
    num_blocks, size = 37, 32
    encoded_heads = 1 if picks else num_kv_heads
    generator = torch.Generator().manual_seed(0)
    candidates = on(device, drawn_candidates(num_blocks))
    worth_GJB = drawn_scores(num_blocks, num_blocks, num_choosing).to(device)
    if not picks:
        worth_GJB = chosen_blocks_plain.pick(worth_GJB, candidates)
        candidates = candidates._replace(num_J=None)
    shape = (NUM_QUERIES, num_blocks) if has_encoded else (num_blocks,)
    exact_ids_B, encoded_ids_B = (
        torch.randint(0, 90, shape, generator=generator).int().to(device) for _ in range(2)
    )
    left_J = torch.tensor([0, 3, 31, 1, 0], dtype=torch.int32, device=device)
    pools = Pools(
        exact_ids_B, encoded_ids_B if has_encoded else None, 4, size, num_kv_heads, encoded_heads
    )

    found = row_tables(worth_GJB, candidates, left_J, pools)

    want = chosen_blocks_plain.row_tables(worth_GJB, candidates, left_J, pools)
    for ours, defined in zip(found, want, strict=True):
        assert (ours is None) == (defined is None)
        if ours is not None and defined is not None:
            compare_rows(ours, defined, size)


def compare_rows(ours: PagedRows, defined: PagedRows, size: int) -> None:
    assert torch.equal(ours.starts_R, defined.starts_R)
    assert torch.equal(ours.ends_R, defined.ends_R)
    places_B = torch.arange(ours.blocks_RB.shape[1], device=ours.ends_R.device)
    is_read_RB = places_B * size < ours.ends_R[:, None]
    assert is_read_RB.any()
    assert torch.equal(ours.blocks_RB[is_read_RB], defined.blocks_RB[is_read_RB])
    if defined.block_positions_RB is not None:
        assert ours.block_positions_RB is not None
        positions = (ours.block_positions_RB, defined.block_positions_RB)
        assert torch.equal(*(x[is_read_RB] for x in positions))


def check_bounds_of_rows(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q_RHD = torch.randn(3, 6, dim, generator=generator).to(dtype).to(device)
    counts = (20, 0, 37)
    sequences = [
        torch.randn(2, 2, count, dim, generator=generator).to(dtype).to(device) for count in counts
    ]
    places = torch.tensor([[x.data_ptr() for x in planes] for planes in sequences], device=device)
    bounds = BoundsOfRows(*places.T.contiguous(), torch.tensor(counts, device=device).int(), 2)

    found_KRB = largest_bounds_of_rows(q_RHD, bounds, width=40, scale=0.3)

    for row, (count, planes) in enumerate(zip(counts, sequences, strict=True)):
        want_K1B = block_bounds_plain.largest_bounds(q_RHD[row : row + 1], *planes, 0.3)
        # As above.
        found_K1B = found_KRB[:, row : row + 1, :count]
        torch.testing.assert_close(found_K1B, want_K1B, rtol=2**-23, atol=0)


def check_bounds(num_blocks: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q_JHD = torch.randn(3, 6, dim, generator=generator).to(dtype)
    low_KBD, other_KBD = torch.randn(2, 2, num_blocks, dim, generator=generator).to(dtype)
    high_KBD = torch.maximum(low_KBD, other_KBD)
    q_JHD, low_KBD, high_KBD = (x.to(device) for x in (q_JHD, low_KBD, high_KBD))

    found = largest_bounds(q_JHD, low_KBD, high_KBD, 0.3)

    want = block_bounds_plain.largest_bounds(q_JHD, low_KBD, high_KBD, 0.3)
    # Sums of `dim` float64 numbers in another order, then rounded: mostly the same float32.
    torch.testing.assert_close(found, want, rtol=2**-23, atol=0)


@pytest.mark.parametrize(("num_blocks", "short"), [(1, 0), (37, 1), (130, 0), (300, 9)])
@pytest.mark.parametrize("num_choosing", [1, 3])
def test_the_best_are_picked(
    num_choosing: int, num_blocks: int, short: int, interpreted: torch.device
) -> None:
    check_picks(num_blocks, num_choosing, interpreted, short=short)


@pytest.mark.parametrize("num_blocks", [37, 130])
def test_lists_have_the_blocks_of_a_flag(num_blocks: int, interpreted: torch.device) -> None:
    check_lists(num_blocks, interpreted)


@pytest.mark.parametrize("has_encoded", [False, True])
@pytest.mark.parametrize("picks", [False, True])
@pytest.mark.parametrize(("num_choosing", "num_kv_heads"), [(1, 1), (2, 2), (4, 2)])
def test_tables_have_the_blocks_of_each_pool(
    num_choosing: int,
    num_kv_heads: int,
    picks: bool,
    has_encoded: bool,
    interpreted: torch.device,
) -> None:
    check_tables(num_choosing, num_kv_heads, interpreted, picks=picks, has_encoded=has_encoded)


@pytest.mark.parametrize(("num_blocks", "dim"), [(1, 16), (37, 96), (20, 128)])
def test_bounds_are_those_of_the_definition(
    num_blocks: int, dim: int, interpreted: torch.device
) -> None:
    check_bounds(num_blocks, dim, torch.float32, interpreted)


def test_bounds_of_sequences_are_found_where_they_are_said_to_be(
    interpreted: torch.device,
) -> None:
    check_bounds_of_rows(48, torch.float32, interpreted)


def test_bounds_are_those_that_quest_compares() -> None:
    generator = torch.Generator().manual_seed(0)
    q_JHD = torch.randn(3, 6, 16, generator=generator)
    low_KBD, other_KBD = torch.randn(2, 2, 9, 16, generator=generator)
    high_KBD = torch.maximum(low_KBD, other_KBD)
    keys = KeySummaries(low_KBD, high_KBD, torch.empty(2, 9, 0))

    found = block_bounds_plain.largest_bounds(q_JHD, low_KBD, high_KBD, 0.3)

    bound_HJB = upper_bounds(q_JHD.double() * 0.3, keys)
    assert torch.equal(found, bound_HJB.unflatten(0, (2, -1)).amax(dim=1).float())


def test_more_blocks_than_a_program_looks_at_are_refused() -> None:
    flags_JB = torch.zeros(1, MAX_BLOCKS + 1, dtype=torch.uint8)

    with pytest.raises(ValueError, match="more than a program looks at"):
        pick(torch.zeros(1, 1, 1), Candidates(flags_JB, torch.ones(1, dtype=torch.int32)))


def test_scores_of_other_queries_are_refused() -> None:
    flags_JB = torch.zeros(2, 8, dtype=torch.uint8)

    with pytest.raises(ValueError, match="worth"):
        pick(torch.zeros(1, 1, 1), Candidates(flags_JB, torch.ones(2, dtype=torch.int32)))
