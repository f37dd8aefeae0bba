"""Blocks are zeroed on their ranks when they have lost their last user, before anybody else writes
them: with the next step for whatever comes free, and in a step of their own where somebody waits.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvcluster.cache.block_table import TableEntry
from kvcluster.cache.partitions import CachePartitions
from kvcluster.cache.prefix_cache import Dropped
from kvcluster.cache.shared_blocks import SharedBlocks
from kvcluster.engine.plan import Zeroed
from kvcluster.types import NO_BLOCK


@dataclass(slots=True, eq=False)
class _Batch:
    """Blocks that somebody waits for."""

    num_left: int
    on_done: Callable[[], None]

    def count_down(self) -> None:
        self.num_left -= 1
        if not self.num_left:
            self.on_done()


@dataclass(frozen=True, slots=True, eq=False)
class _Doomed:
    """One block, and one user of it that is ours."""

    shared: SharedBlocks
    codec: str
    entry: TableEntry
    group: int
    batch: _Batch

    @property
    def is_alone(self) -> bool:
        """Whether we are the block's only user."""
        held = self.entry.held()[self.group]
        return self.shared.num_users(self.codec, held, self.group) == 1

    def release(self) -> None:
        self.shared.release(self.codec, self.entry)


class Zeroing:
    """Tells the ranks what to zero, and those who wait when it has been done."""

    def __init__(self, partitions: CachePartitions) -> None:
        self._partitions = partitions
        self._waiting: list[_Doomed] = []
        self._told: dict[int, list[_Doomed]] = {}
        """By step."""
        self._flushes: list[Callable[[], None]] = []
        self._flushing: dict[int, list[Callable[[], None]]] = {}
        """By step."""

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for blocks that could be zeroed now."""
        return bool(self._flushes) or any(doomed.is_alone for doomed in self._waiting)

    def add(
        self, shared: SharedBlocks, dropped: Iterable[Dropped], on_done: Callable[[], None]
    ) -> None:
        """Give up blocks whose users, one of each, are handed over. `on_done` is called when all
        are zero, those that others use as soon as these have left, or the ranks are gone: at once,
        where there are none."""
        batch = _Batch(1, on_done)
        for codec, entry in dropped:
            for group, single in _blocks_of(entry):
                batch.num_left += 1
                self._waiting.append(_Doomed(shared, codec, single, group, batch))
        batch.count_down()

    def flush(self, on_done: Callable[[], None]) -> None:
        """Have all blocks that are free or taken now, and not yet zeroed, zeroed soon. `on_done` is
        called when the ranks have done it, or are gone: what is written after it, stays."""
        self._flushes.append(on_done)

    def take(self, step: int) -> tuple[Zeroed, ...]:
        """What the plan of this step tells the ranks to zero before all else."""
        alone = [doomed for doomed in self._waiting if doomed.is_alone]
        if alone:
            told = set(map(id, alone))
            self._waiting = [doomed for doomed in self._waiting if id(doomed) not in told]
            self._told[step] = alone
            for doomed in alone:
                doomed.release()
        if self._flushes:
            self._flushing[step], self._flushes = self._flushes, []
        by_place: dict[tuple[int, int, str], set[int]] = defaultdict(set)
        for rank, group, codec, block_id in self._partitions.take_freed():
            by_place[rank, group, codec].add(block_id)
        return tuple(
            Zeroed(rank, group, codec, tuple(sorted(ids)))
            for (rank, group, codec), ids in sorted(by_place.items())
        )

    def complete(self, step: int) -> None:
        """The ranks have run a step."""
        for doomed in self._told.pop(step, ()):
            doomed.batch.count_down()
        for on_done in self._flushing.pop(step, ()):
            on_done()

    def reset(self) -> None:
        """The ranks are gone, and every block with them."""
        gone = [*self._waiting, *(doomed for told in self._told.values() for doomed in told)]
        flushes = [*self._flushes, *(each for told in self._flushing.values() for each in told)]
        for doomed in self._waiting:
            doomed.release()
        self._waiting = []
        self._told.clear()
        self._flushes = []
        self._flushing.clear()
        self._partitions.take_freed()
        for doomed in gone:
            doomed.batch.count_down()
        for on_done in flushes:
            on_done()


def _blocks_of(entry: TableEntry) -> Iterable[tuple[int, TableEntry]]:
    """Group and an entry of its own for each block that an entry holds."""
    none = (NO_BLOCK,) * len(entry.block_ids)
    for group, held in enumerate(entry.held()):
        before, after = none[:group], none[group + 1 :]
        if held.block_id != NO_BLOCK:
            yield group, TableEntry(entry.rank, (*before, held.block_id, *after))
        if held.encoded_id != NO_BLOCK:
            yield group, TableEntry(entry.rank, none, (*before, held.encoded_id, *after))
