"""Every retention policy keeps the protocol's promises; each new one inherits these tests."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.retention.base import RetentionPolicy
from kvcluster.retention.full import FullRetention
from kvcluster.retention.heavy_hitters import HeavyHitters
from kvcluster.retention.registry import METHODS
from kvcluster.retention.snap import Snap
from kvcluster.retention.window import WindowRetention

POLICIES: dict[str, RetentionPolicy] = {
    "full": METHODS["full"](),
    "window": METHODS["window"](recent=256),
    "heavy_hitters": METHODS["heavy_hitters"](budget=0.2),
    "snap": METHODS["snap"](budget=0.01, recent=0.9),
    "key_diversity": METHODS["key_diversity"](budget=1, recent=1),
}


def test_every_method_is_tested() -> None:
    assert POLICIES.keys() == METHODS.keys()
    assert all(policy.name == name for name, policy in POLICIES.items())


@given(num_tokens=st.integers(1, 10**7))
@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_more_is_held_than_was_before_and_one_token(name: str, num_tokens: int) -> None:
    policy = POLICIES[name]

    assert 1 <= policy.num_held(num_tokens) <= num_tokens
    assert policy.num_held(num_tokens + 1) <= policy.num_held(num_tokens) + 1


def test_full_drops_nothing() -> None:
    assert FullRetention().num_held(10**9) == 10**9


@given(
    budget=st.floats(0, 1, exclude_min=True),
    recent=st.floats(0, 1),
    block_size=st.sampled_from([1, 4, 64]),
    epoch_blocks=st.integers(1, 16),
    num_epochs=st.integers(1, 2000),
)
def test_an_epoch_always_leaves_enough_candidates(
    budget: float, recent: float, block_size: int, epoch_blocks: int, num_epochs: int
) -> None:
    """Survivors of the epoch before, and this epoch, hold all that this one is to keep; and the
    latest tokens that it is to keep were among the latest ones then."""
    epoch = epoch_blocks * block_size
    policy = HeavyHitters(budget=budget, recent=recent, block_size=block_size, epoch_tokens=epoch)
    num_tokens = num_epochs * epoch

    before, after = policy.counts(num_tokens - epoch), policy.counts(num_tokens)

    assert block_size <= after.kept <= before.kept + epoch
    assert block_size + after.recent <= after.kept
    assert after.recent <= before.recent + epoch


def test_a_budget_is_rounded_as_the_decimal_that_it_is() -> None:
    """In binary, 0.1 * 30 is more than 3."""
    policy = HeavyHitters(budget=0.1, recent=0.5, block_size=1, epoch_tokens=10)

    assert policy.counts(30) == (3, 1)
    assert policy.counts(31) == (4, 2)


def test_the_first_block_is_kept_whatever_the_budget() -> None:
    policy = HeavyHitters(budget=0.001, recent=1)

    assert policy.counts(512) == (64, 0)
    assert policy.num_held(513) == 65


def test_the_open_epoch_is_held_whole() -> None:
    policy = HeavyHitters(budget=0.25)

    assert policy.num_held(512) == 512
    assert policy.num_held(1024) == 128 + 512
    assert policy.num_held(1025) == 256 + 1


def test_a_window_drops_whole_blocks_between_the_first_one_and_the_latest() -> None:
    policy = WindowRetention(recent=8, block_size=4)

    # The query at 15 is in block 3 and reads blocks 0, 2 and 3; the next one is in block 4.
    assert policy.dropped_blocks(15) == range(1, 2)
    assert policy.dropped_blocks(16) == range(1, 3)
    assert policy.dropped_blocks(11) == range(1, 1)
    assert policy.num_held(16) == 12
    assert policy.num_held(17) == 9


@pytest.mark.parametrize("budget", [0, -0.5, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("name", ["heavy_hitters", "snap", "key_diversity"])
def test_a_budget_that_is_no_share_is_refused(name: str, budget: float) -> None:
    with pytest.raises(ValueError, match="give a number over 0 and up to 1"):
        METHODS[name](budget=budget)


@pytest.mark.parametrize("recent", [-0.1, 1.1, math.nan])
def test_a_recent_share_that_is_no_share_is_refused(recent: float) -> None:
    with pytest.raises(ValueError, match="recent is the share"):
        HeavyHitters(budget=0.5, recent=recent)


@pytest.mark.parametrize(
    "sizes", [{"epoch_tokens": 100}, {"epoch_tokens": 0}, {"block_size": 0}, {"block_size": 1024}]
)
def test_an_epoch_that_is_not_of_whole_blocks_is_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="epoch must be a multiple of the block size"):
        HeavyHitters(budget=0.5, **sizes)


@pytest.mark.parametrize("recent", [0, 32, -64, 65])
def test_a_window_that_is_not_of_whole_blocks_is_refused(recent: int) -> None:
    with pytest.raises(ValueError, match="give 64 or a multiple of it"):
        WindowRetention(recent=recent)


@pytest.mark.parametrize("queries", [0, 513])
def test_more_queries_than_an_epoch_has_are_refused(queries: int) -> None:
    with pytest.raises(ValueError, match="queries must be 1 to 512"):
        Snap(budget=0.5, queries=queries)
