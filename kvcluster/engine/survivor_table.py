"""What a sequence holds beside its open epoch, where its policy keeps tokens by score.

The survivors of an epoch's end are cut into blocks of a table of their own, whose entry i covers
places [i * block_size, (i + 1) * block_size) of every KV head's list. How many survive follows from
the position of the epoch's end alone, so blocks are counted here without a look at any token. Only
the KV group without a window of the model's own is concerned.
"""

from collections.abc import Sequence

from kvcluster.cache.block_table import BlockTable
from kvcluster.engine.plan import NewBlock
from kvcluster.retention.base import Budgeted
from kvcluster.retention.offered import budgeted
from kvcluster.types import Policy


class SurvivorTable:
    """The table of one sequence's survivors, and what of it the ranks have not been told."""

    def __init__(self, retention: Budgeted, table: BlockTable, group: int) -> None:
        self.table = table
        self.group = group
        self._retention = retention
        self._untold: list[NewBlock] = []

    def chunk_end(self, start: int, end: int) -> int:
        """`end`, or where the epoch of `start` ends if that is before it: no chunk goes on into
        the next epoch, since survivors are chosen between steps' rows."""
        return min(end, self._retention.epoch_start(start) + self._retention.epoch_tokens)

    def ends_epoch(self, end: int) -> bool:
        return end % self._retention.epoch_tokens == 0

    def num_survivors(self, end: int) -> int:
        """Tokens of each list when the epoch before `end` has ended."""
        return self._retention.counts(end).kept

    def open_from(self, num_tokens: int) -> int:
        """Where the epoch of the next token begins."""
        return self._retention.epoch_start(num_tokens)

    def num_held(self, num_tokens: int) -> int:
        """Tokens that each KV head holds before the next token."""
        epoch_start = self.open_from(num_tokens)
        return self.num_survivors(epoch_start) + num_tokens - epoch_start

    def filled_at(self, end: int) -> range:
        """Entries, without the first, that are whole when the epoch ends at `end` and were not
        before it."""
        size = self._retention.block_size
        before = self.num_survivors(end - self._retention.epoch_tokens) // size
        return range(max(1, before), self.num_survivors(end) // size)

    def note(self, appended: Sequence[NewBlock]) -> None:
        """These entries were added to the table."""
        self._untold += appended

    def tell(self) -> tuple[NewBlock, ...]:
        """The entries that no plan has told of. From now on they are told."""
        told = tuple(self._untold)
        self._untold.clear()
        return told


def group_by_score(windows: Sequence[int | None]) -> int | None:
    """The KV group whose tokens a policy keeps by score; None: the model has windows throughout."""
    return windows.index(None) if None in windows else None


def survivor_table(
    policy: Policy, windows: Sequence[int | None], block_size: int
) -> SurvivorTable | None:
    """An empty table. None where the policy keeps no tokens by score, or the model's own windows
    leave it nothing to do."""
    retention, group = budgeted(policy.retention, block_size), group_by_score(windows)
    if retention is None or group is None:
        return None
    table = BlockTable(len(windows), policy.storage, groups=(group,))
    return SurvivorTable(retention, table, group)
