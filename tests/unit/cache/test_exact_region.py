"""What is read exact is a matter of position, and of how many blocks are encoded at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.cache.exact_region import ExactRegion, check_in_steps
from kvcluster.types import Policy

REGIONS = st.builds(ExactRegion, st.integers(0, 6), st.none() | st.integers(1, 6))


def test_without_steps_each_block_is_encoded_when_it_is_old_enough() -> None:
    region = ExactRegion(recent_blocks=2)

    assert [region.first_block(block) for block in range(6)] == [0, 0, 0, 1, 2, 3]
    assert region.chunk_end(5, 1000, block_size=4) == 1000


def test_in_steps_blocks_are_encoded_together() -> None:
    region = ExactRegion(recent_blocks=2, step_blocks=3)

    assert [region.first_block(block) for block in range(9)] == [0, 0, 0, 1, 1, 1, 4, 4, 4]
    assert region.chunk_end(5, 1000, block_size=4) == 12
    assert region.chunk_end(12, 1000, block_size=4) == 24
    assert region.chunk_end(12, 20, block_size=4) == 20


@given(region=REGIONS, block=st.integers(0, 60))
def test_rows_read_the_recent_blocks_exact_and_no_more_than_is_promised(
    region: ExactRegion, block: int
) -> None:
    first = region.first_block(block)

    assert first <= max(0, block - region.recent_blocks)
    assert block - first <= region.most_blocks
    assert first <= region.first_block(block + 1)


@given(
    region=REGIONS,
    start=st.integers(0, 300),
    num_tokens=st.integers(1, 300),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_rows_of_a_chunk_read_the_same_blocks_exact_where_blocks_are_encoded_in_steps(
    region: ExactRegion, start: int, num_tokens: int, block_size: int
) -> None:
    end = region.chunk_end(start, start + num_tokens, block_size)

    assert start < end <= start + num_tokens
    if region.step_blocks is not None:
        last = (end - 1) // block_size
        assert region.first_block(start // block_size) == region.first_block(last)


@pytest.mark.parametrize(("recent", "step"), [(-1, None), (0, 0)])
def test_a_region_that_none_has_is_refused(recent: int, step: int | None) -> None:
    with pytest.raises(ValueError, match="want recent_blocks >= 0 and step_blocks >= 1"):
        ExactRegion(recent, step)


@pytest.mark.parametrize("retention", ["full", "window:recent=64"])
def test_retentions_that_keep_tokens_in_place_go_with_steps(retention: str) -> None:
    check_in_steps(Policy(codec="latent:layers=2", retention=retention))


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy(codec="latent:layers=2", retention="snap:epoch=64"), "other tokens in each layer"),
        (Policy(codec="latent:layers=2", selection="quest"), r"selection \(quest\)"),
    ],
)
def test_what_cannot_go_with_steps_is_refused(policy: Policy, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_in_steps(policy)
