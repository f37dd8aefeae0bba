"""Each selection reads the blocks that its definition, row by row, reads."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcluster.selection import base
from kvcluster.selection.base import (
    BlockSelection,
    Rows,
    share_of_work,
    summaries,
    upper_bounds,
)
from kvcluster.selection.block_sparse import BlockSparse
from kvcluster.selection.estimated import Estimated
from kvcluster.selection.need import Need
from kvcluster.selection.quest import Quest
from kvcluster.selection.registry import METHODS
from kvcluster.types import LayerGeometry

SIZE = 4
SELECTIONS: list[BlockSelection] = [
    BlockSparse(local=2, sinks=1, block_size=SIZE),
    BlockSparse(local=1, sinks=2, stride=3, random=2, seed=5, block_size=SIZE),
    Estimated(share=0.5, block_size=SIZE),
    Estimated(share=0.3, sinks=0, local=1, by="bound", block_size=SIZE),
    Quest(tokens=12, sinks=0, local=1, block_size=SIZE),
    Quest(tokens=24, block_size=SIZE),
]
IDS = [f"{selection.name}-{number}" for number, selection in enumerate(SELECTIONS)]


def geometry(scale: float = 0.4) -> LayerGeometry:
    return LayerGeometry(num_query_heads=4, num_kv_heads=2, key_dim=8, value_dim=8, scale=scale)


def random_layer(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys with a large mean in one channel, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    q_THD = torch.randn(num_tokens, 4, 8, generator=generator)
    k_KSD = torch.randn(2, num_tokens, 8, generator=generator)
    k_KSD[..., 0] += 5
    return q_THD, k_KSD


def rows_from(q_THD: Tensor, first: int = 0, num_prompt: int = 0) -> Rows:
    positions_T = torch.arange(first, len(q_THD))
    own_T = positions_T // SIZE
    blocks_B = torch.arange(int(own_T[-1]) + 1)
    return Rows(q_THD[first:], own_T, blocks_B <= own_T[:, None], positions_T < num_prompt)


def reads(
    selection: BlockSelection, rows: Rows, k_KSD: Tensor, layer: int = 1, scale: float = 0.4
) -> Tensor:
    keys = summaries(k_KSD, SIZE, selection.needs)
    return base.reads(selection, layer, geometry(scale), rows, keys)


def read_blocks(reads_GTB: Tensor, head: int, row: int) -> set[int]:
    """What a query head reads."""
    choosing = head * len(reads_GTB) // 4
    return set(reads_GTB[choosing, row].nonzero()[:, 0].tolist())


def best(scores: dict[int, float], num: int) -> set[int]:
    return set(sorted(scores, key=lambda block: (-scores[block], block))[: max(0, num)])


def by_estimate(
    selection: Estimated, q_THD: Tensor, k_KSD: Tensor, head: int, row: int, num_prompt: int
) -> set[int]:
    own = row // SIZE
    together = slice(own * SIZE, min(num_prompt, (own + 1) * SIZE))
    q_mean_D = q_THD[together if row < num_prompt else slice(row, row + 1), head].mean(dim=0)
    k_SD = k_KSD[head // 2]
    always = {b for b in range(own + 1) if b < selection.sinks or b > own - selection.local}
    scores = {}
    for block in set(range(own + 1)) - always:
        keys_OD = k_SD[block * SIZE : (block + 1) * SIZE]
        if selection.by == "mean":
            scores[block] = float(q_mean_D @ keys_OD.mean(dim=0))
        else:
            low_D, high_D = keys_OD.amin(dim=0), keys_OD.amax(dim=0)
            scores[block] = float(torch.maximum(q_mean_D * low_D, q_mean_D * high_D).sum())
    wanted = math.ceil(Fraction(repr(selection.share)) * (own + 1))
    return always | best(scores, wanted - len(always))


def by_bound(
    selection: Quest, q_THD: Tensor, k_KSD: Tensor, head: int, row: int, num_prompt: int
) -> set[int]:
    own, kv_head = row // SIZE, head // 2
    if row < num_prompt:
        return set(range(own + 1))
    always = {b for b in range(own + 1) if b < selection.sinks or b > own - selection.local}
    scores = {}
    for block in set(range(own + 1)) - always:
        keys_OD = k_KSD[kv_head, block * SIZE : (block + 1) * SIZE]
        q_GD = q_THD[row, 2 * kv_head : 2 * kv_head + 2]
        low_D, high_D = keys_OD.amin(dim=0), keys_OD.amax(dim=0)
        scores[block] = float(torch.maximum(q_GD * low_D, q_GD * high_D).sum(dim=1).max())
    return always | best(scores, selection.tokens // SIZE - len(always))


@pytest.mark.parametrize("num_prompt", [0, 26, 61])
@pytest.mark.parametrize("num_tokens", [1, 4, 30, 61])
@pytest.mark.parametrize("selection", SELECTIONS[2:], ids=IDS[2:])
def test_content_decides_as_the_definition_says(
    selection: BlockSelection, num_tokens: int, num_prompt: int
) -> None:
    q_THD, k_KSD = random_layer(num_tokens, 7)
    definition: Any = by_bound if isinstance(selection, Quest) else by_estimate

    reads_GTB = reads(selection, rows_from(q_THD, num_prompt=num_prompt), k_KSD)

    for head in range(4):
        for row in range(num_tokens):
            expected = definition(selection, q_THD, k_KSD, head, row, num_prompt)
            assert read_blocks(reads_GTB, head, row) == expected


@pytest.mark.parametrize("selection", SELECTIONS, ids=IDS)
def test_a_row_reads_its_own_block_and_none_that_it_may_not(selection: BlockSelection) -> None:
    q_THD, k_KSD = random_layer(50, 8)
    rows = rows_from(q_THD)
    # Retention took blocks 3 and 5 from all rows.
    rows.readable_TB[:, [3, 5]] &= rows.own_T[:, None] == torch.tensor([3, 5])

    reads_GTB = reads(selection, rows, k_KSD)

    assert not bool((reads_GTB & ~rows.readable_TB).any())
    assert bool(reads_GTB[:, torch.arange(50), rows.own_T].all())


@pytest.mark.parametrize("selection", SELECTIONS, ids=IDS)
def test_where_the_tile_begins_does_not_matter(selection: BlockSelection) -> None:
    q_THD, k_KSD = random_layer(50, 9)

    whole_GTB = reads(selection, rows_from(q_THD), k_KSD)

    part_GTB = reads(selection, rows_from(q_THD, 5 * SIZE), k_KSD)
    assert torch.equal(part_GTB, whole_GTB[:, 5 * SIZE :])


@pytest.mark.parametrize("selection", SELECTIONS, ids=IDS)
def test_keys_of_the_own_block_do_not_matter(selection: BlockSelection) -> None:
    """They are not all written when the block's first row asks."""
    q_THD, k_KSD = random_layer(48, 10)
    changed_KSD = k_KSD.clone()
    changed_KSD[:, 44:] = 1000

    found = [
        reads(selection, rows_from(q_THD, num_prompt=46), keys)[:, 44:]
        for keys in (k_KSD, changed_KSD)
    ]

    assert torch.equal(*found)


@pytest.mark.parametrize(
    "selection",
    [
        BlockSparse(local=100, block_size=SIZE),
        BlockSparse(local=1, sinks=0, stride=1, block_size=SIZE),
        BlockSparse(local=1, sinks=0, random=100, block_size=SIZE),
        Estimated(share=1, block_size=SIZE),
        Quest(tokens=400, block_size=SIZE),
    ],
)
def test_enough_of_anything_is_everything(selection: BlockSelection) -> None:
    q_THD, k_KSD = random_layer(41, 11)
    rows = rows_from(q_THD)

    reads_GTB = reads(selection, rows, k_KSD)

    assert torch.equal(reads_GTB, rows.readable_TB.expand_as(reads_GTB))
    assert share_of_work(reads_GTB, rows) == 1


@settings(max_examples=60, deadline=None)
@given(
    selection=st.sampled_from(
        [*SELECTIONS, Estimated(share=1, block_size=SIZE), BlockSparse(block_size=SIZE)]
    ),
    num_tokens=st.integers(1, 50),
    num_prompt=st.integers(0, 50),
)
def test_what_is_said_to_be_covered_is_read_whole(
    selection: BlockSelection, num_tokens: int, num_prompt: int
) -> None:
    q_THD, k_KSD = random_layer(num_tokens, 14)
    rows = rows_from(q_THD, num_prompt=num_prompt)

    share = share_of_work(reads(selection, rows, k_KSD), rows)

    assert share == 1 or not selection.covers(rows.readable_TB.shape[1])
    assert selection.covers(1)


def test_block_sparse_reads_local_first_and_strided_blocks() -> None:
    selection = BlockSparse(local=2, sinks=1, stride=4, block_size=SIZE)

    assert selection.blocks(0, 0) == [0]
    assert selection.blocks(0, 3) == [0, 2, 3]
    assert selection.blocks(0, 11) == [0, 3, 7, 10, 11]


def test_block_sparse_lists_the_blocks_that_rows_read() -> None:
    selection = BlockSparse(local=2, stride=5, random=2, block_size=SIZE)
    q_THD, k_KSD = random_layer(64, 12)

    reads_GTB = reads(selection, rows_from(q_THD), k_KSD, layer=3)

    for row in range(64):
        assert sorted(read_blocks(reads_GTB, 0, row)) == selection.blocks(3, row // SIZE)


@settings(deadline=None)
@given(seed=st.integers(0, 2**64 - 1), layer=st.integers(0, 200), block=st.integers(0, 300))
def test_random_blocks_are_as_many_as_asked_and_new(seed: int, layer: int, block: int) -> None:
    without = BlockSparse(local=2, sinks=1, block_size=SIZE).blocks(layer, block)

    found = BlockSparse(local=2, sinks=1, random=3, seed=seed, block_size=SIZE).blocks(layer, block)

    assert set(without) < set(found) or len(without) == block + 1
    assert len(found) == min(block + 1, len(without) + 3)
    assert found[-1] == block


def test_random_blocks_differ_by_seed_layer_and_query_block() -> None:
    def found(seed: int, layer: int, block: int) -> tuple[int, ...]:
        selection = BlockSparse(local=1, sinks=0, random=4, seed=seed, block_size=SIZE)
        return tuple(selection.blocks(layer, block)[:-1])

    cases = [(seed, layer, block) for seed in range(3) for layer in range(3) for block in (90, 91)]
    assert len({found(*case) for case in cases}) == len(cases)


def test_random_blocks_are_spread_evenly() -> None:
    selection = BlockSparse(local=1, sinks=0, random=1, block_size=SIZE)
    num_found = torch.zeros(8)
    for layer in range(4000):
        num_found[selection.blocks(layer, 8)[0]] += 1

    # 500 each, with a standard deviation of 21; six of them.
    assert float((num_found - 500).abs().max()) < 126


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_keys=st.integers(1, 40),
    magnitude=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_no_logit_is_above_its_blocks_bound(seed: int, num_keys: int, magnitude: float) -> None:
    q_THD, k_KSD = random_layer(num_keys, seed)
    k_KSD *= magnitude

    bound_HTB = upper_bounds(q_THD, summaries(k_KSD, SIZE, Need.BOUNDS))

    logits_HTS = torch.einsum(
        "thd,hsd->hts", q_THD.double(), k_KSD.repeat_interleave(2, dim=0).double()
    )
    bound_HTS = bound_HTB.repeat_interleave(SIZE, dim=2)[..., :num_keys]
    # 8 products and sums in float64, each within 2^-53 of numbers up to the sum of magnitudes.
    size_HTS = torch.einsum(
        "thd,hsd->hts", q_THD.double().abs(), k_KSD.repeat_interleave(2, dim=0).double().abs()
    )
    largest_HTB = size_HTS.amax(dim=2, keepdim=True)
    assert bool((logits_HTS <= bound_HTS + 16 * 2**-53 * largest_HTB).all())


def test_summaries_of_a_short_block_are_of_its_keys_alone() -> None:
    k_KSD = torch.tensor([[[1.0], [5.0], [3.0], [-2.0], [10.0], [4.0]]])

    low_KBD, high_KBD, _ = summaries(k_KSD, 4, Need.BOUNDS)
    _, _, mean_KBD = summaries(k_KSD, 4, Need.MEANS)

    assert low_KBD.flatten().tolist() == [-2, 4]
    assert high_KBD.flatten().tolist() == [5, 10]
    assert mean_KBD.flatten().tolist() == [1.75, 7]


def test_quest_shares_a_kv_heads_blocks_among_its_query_heads() -> None:
    """Query head 1 alone wants block 1, and head 0 reads it too; the other KV head does not."""
    k_KSD = torch.zeros(2, 3 * SIZE, 8)
    k_KSD[:, SIZE, 3] = 9
    k_KSD[:, 0, 2] = 1
    q_THD = torch.zeros(3 * SIZE, 4, 8)
    q_THD[:, 1, 3] = 1
    q_THD[:, 2:, 2] = 1

    reads_GTB = reads(
        Quest(tokens=2 * SIZE, sinks=0, local=1, block_size=SIZE), rows_from(q_THD), k_KSD
    )

    assert [read_blocks(reads_GTB, head, 11) for head in range(4)] == [
        {1, 2},
        {1, 2},
        {0, 2},
        {0, 2},
    ]


def test_quest_follows_the_sign_of_the_scale() -> None:
    q_THD, k_KSD = random_layer(40, 13)
    selection = Quest(tokens=16, block_size=SIZE)

    turned = reads(selection, rows_from(-q_THD), k_KSD, scale=-0.4)

    assert torch.equal(turned, reads(selection, rows_from(q_THD), k_KSD))


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("block_sparse", {"local": 0}, "give 1 or more"),
        ("block_sparse", {"random": -1}, "0 or more"),
        ("block_sparse", {"stride": -2}, "0 or more"),
        ("estimated", {"share": 0}, "over 0 and up to 1"),
        ("estimated", {"share": 1.01}, "over 0 and up to 1"),
        ("estimated", {"share": math.nan}, "over 0 and up to 1"),
        ("estimated", {"share": 0.5, "local": 0}, "1 or more local blocks"),
        ("estimated", {"share": 0.5, "by": "median"}, "mean or bound"),
        ("quest", {"tokens": 0}, "give 192 or more"),
        ("quest", {"tokens": 128}, "give 192 or more"),
        ("quest", {"tokens": 32, "sinks": 0, "local": 1}, "give 64 or more"),
        ("quest", {"tokens": 512, "local": 0}, "1 or more local blocks"),
        ("quest", {"tokens": 500}, "multiple of the block size"),
    ],
)
def test_impossible_parameters_are_refused(
    name: str, arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        METHODS[name](**arguments)


def test_every_method_is_tested() -> None:
    assert {selection.name for selection in SELECTIONS} == METHODS.keys()
