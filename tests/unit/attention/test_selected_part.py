"""What a rank keeps of its blocks' keys is what it would find by looking at all of them again."""

import pytest
import torch
from torch import Tensor

from kvcluster.attention.selected_part import Selecting
from kvcluster.selection.base import BlockSelection, summaries
from kvcluster.selection.estimated import Estimated
from kvcluster.selection.need import Need
from kvcluster.selection.quest import Quest

SIZE = 4
SELECTIONS: list[BlockSelection] = [
    Quest(tokens=16, block_size=SIZE),
    Estimated(share=0.5, block_size=SIZE),
    Estimated(share=0.5, by="bound", block_size=SIZE),
]


def random_keys(num_blocks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(num_blocks)
    return torch.randn(2, num_blocks * SIZE, 8, generator=generator).to(dtype)


def blocks_of(k_KSD: Tensor, first: int, last: int) -> Tensor:
    return k_KSD[:, first * SIZE : last * SIZE].unflatten(1, (-1, SIZE)).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_what_is_kept_is_what_would_be_computed_anew(
    selection: BlockSelection, dtype: torch.dtype
) -> None:
    """This rank has blocks 0 to 4, 7 and 9 to 10; they fill up in three steps."""
    k_KSD = random_keys(8, dtype)
    blocks_B = torch.tensor([0, 1, 2, 3, 4, 7, 9, 10])
    selecting = Selecting(selection, recent_blocks=None)

    for first, last in ((0, 5), (5, 6), (6, 8)):
        selecting.add(3, blocks_B[first:last], blocks_of(k_KSD, first, last))

    anew = summaries(k_KSD, SIZE, selection.needs)
    for kept, wanted in zip(selecting.of(3, blocks_B), anew, strict=True):
        assert torch.equal(kept, wanted)
    for kept, wanted in zip(selecting.of(3, torch.tensor([1, 7])), anew, strict=True):
        assert torch.equal(kept, wanted[:, [1, 5]])


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_what_no_row_may_read_any_more_is_forgotten(selection: BlockSelection) -> None:
    k_KSD = random_keys(8)
    selecting = Selecting(selection, recent_blocks=3)
    selecting.add(0, torch.arange(8), blocks_of(k_KSD, 0, 8))
    num_bytes = selecting.num_bytes

    selecting.forget(0, 8)

    left = torch.tensor([0, 6, 7])
    anew = summaries(k_KSD, SIZE, selection.needs)
    for kept, wanted in zip(selecting.of(0, left), anew, strict=True):
        assert torch.equal(kept, wanted[:, left])
    assert selecting.num_bytes * 8 == num_bytes * 3


def test_bytes_are_those_of_the_planes_that_the_method_needs() -> None:
    found = {}
    for selection in SELECTIONS:
        selecting = Selecting(selection, recent_blocks=None)
        for layer in range(3):
            selecting.add(layer, torch.arange(5), blocks_of(random_keys(5, torch.bfloat16), 0, 5))
        found[selection.needs] = selecting.num_bytes

    # 3 layers, 5 blocks, 2 KV heads, 8 dimensions: two planes in bfloat16, or one in float32. And
    # the index of each block.
    expected = 3 * 5 * (2 * 8 * 4 + 8)
    assert found == {Need.BOUNDS: expected, Need.MEANS: expected}
