"""What one part's failure is, and what ends the ring all the same."""

import pytest
import torch

from kvcluster.attention.failures import RAISED, PartFailure, PartFailures
from kvcluster.attention.part import CacheRules, SequencePart
from kvcluster.cache.shard import SequenceMap
from kvcluster.errors import RankLost
from kvcluster.types import EXACT, Route


def part() -> SequencePart:
    table = SequenceMap(block_size=4, num_ranks=1, num_groups=1)
    table.append(0, (0,))
    return SequencePart(
        table,
        start=0,
        num_tokens=2,
        route=Route.PASS_Q,
        rank=0,
        row_offset=0,
        rules=CacheRules(EXACT, 1),
    )


def test_the_first_failure_of_a_part_counts_and_what_follows_goes_on() -> None:
    failing, other = part(), part()
    failures = PartFailures([failing, other])

    with failures.contain(failing, "encoding blocks"):
        raise ValueError
    with failures.contain(failing, "reading the cache"):
        raise KeyError
    with failures.contain(other, "encoding blocks"):
        pass

    assert failures.found == {failing: PartFailure("encoding blocks", "ValueError")}
    assert (failures.has(failing), failures.has(other)) == (True, False)


@pytest.mark.parametrize(
    "error", [RankLost("gone"), MemoryError(), torch.OutOfMemoryError(), KeyboardInterrupt()]
)
def test_what_says_that_the_rank_is_broken_is_raised(error: BaseException) -> None:
    failing = part()
    failures = PartFailures([failing])

    with pytest.raises(type(error)), failures.contain(failing, "encoding blocks"):
        raise error

    assert not failures.found


def test_of_a_part_that_may_not_fail_or_is_alone_all_is_raised() -> None:
    for failures in (PartFailures([]), RAISED):
        with pytest.raises(ValueError, match="wrong"), failures.contain(part(), "reading"):
            raise ValueError("wrong")
