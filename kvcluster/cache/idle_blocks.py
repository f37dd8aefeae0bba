"""How much of what is kept nobody else uses, counted as users come and go.

Memory that is full is asked for again and again, so the sum over all kept blocks is held ready. It
is a sum of whole numbers for each codec: what it says does not depend on the order of events.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvcluster.cache.block_table import HeldBlock, TableEntry
from kvcluster.cache.shared_blocks import SharedBlocks
from kvcluster.types import EXACT, NO_BLOCK, BlockId, Rank


class KeptBlock(Protocol):
    """What is kept of one block of tokens."""

    @property
    def codec(self) -> str: ...

    @property
    def copies(self) -> Sequence[TableEntry]: ...

    @property
    def is_pinned(self) -> bool: ...


@dataclass(slots=True, eq=False)
class _Part:
    """What one copy holds in one KV group, and whether it is counted now."""

    block: KeptBlock
    group: int
    held: HeldBlock
    is_counted: bool = False


class _Name(NamedTuple):
    """One block of one pool."""

    codec: str
    group: int
    rank: Rank
    block_id: BlockId


class _Place(NamedTuple):
    """What is counted together."""

    codec: str
    group: int
    rank: Rank


class IdleBlocks:
    """Mutable: follows the kept blocks of one partition, and how many use each."""

    def __init__(self, shared: SharedBlocks) -> None:
        self._shared = shared
        self._parts: dict[_Name, list[_Part]] = {}
        self._num_idle: Counter[_Place] = Counter()
        shared.partition.on_users_changed = self._users_changed

    def units(self) -> tuple[int, ...]:
        """Per KV group, exact blocks' worth that nobody else uses, rounded down."""
        sums = [0.0] * self._shared.partition.num_groups
        for place, count in self._num_idle.items():
            sums[place.group] += self._worth(place.codec) * count
        return tuple(map(int, sums))

    def on_ranks(self) -> tuple[int, ...]:
        """The same per rank, over all groups."""
        sums = [0.0] * self._shared.partition.num_ranks
        for place, count in self._num_idle.items():
            sums[place.rank] += self._worth(place.codec) * count
        return tuple(map(int, sums))

    def add(self, block: KeptBlock, copy: TableEntry) -> None:
        """The block has this copy from now on."""
        for part in _parts_of(block, copy):
            for name in _names(block.codec, part.group, part.held):
                self._parts.setdefault(name, []).append(part)
            self._count(part)

    def remove(self, block: KeptBlock, copy: TableEntry) -> None:
        """The block has this copy no longer."""
        for gone in _parts_of(block, copy):
            for name in _names(block.codec, gone.group, gone.held):
                for part in self._parts[name]:
                    if part.block is block:
                        self._set(part, is_idle=False)
                self._parts[name] = [part for part in self._parts[name] if part.block is not block]
                if not self._parts[name]:
                    del self._parts[name]

    def pins_changed(self, block: KeptBlock) -> None:
        """Contexts that pin the block came or went."""
        for copy in block.copies:
            for group, held in enumerate(copy.held()):
                self._users_changed(block.codec, group, held)

    def check(self, blocks: Iterable[KeptBlock]) -> None:
        """Assert that what is counted is what looking at every block would find."""
        found: Counter[_Place] = Counter()
        for block in blocks:
            for part in (part for copy in block.copies for part in _parts_of(block, copy)):
                users = self._shared.num_users(block.codec, part.held, part.group)
                if users == 1 and not block.is_pinned:
                    found.update(_places(part))
        assert found == self._num_idle

    def _users_changed(self, codec: str, group: int, held: HeldBlock) -> None:
        for name in _names(codec, group, held):
            for part in self._parts.get(name, ()):
                self._count(part)

    def _count(self, part: _Part) -> None:
        users = self._shared.num_users(part.block.codec, part.held, part.group)
        self._set(part, is_idle=users == 1 and not part.block.is_pinned)

    def _set(self, part: _Part, *, is_idle: bool) -> None:
        if part.is_counted == is_idle:
            return
        part.is_counted = is_idle
        for place in _places(part):
            self._num_idle[place] += 1 if is_idle else -1
            # Requests choose a codec's parameters, so there is no end of codecs.
            if not self._num_idle[place]:
                del self._num_idle[place]

    def _worth(self, codec: str) -> float:
        return self._shared.partition.stored_share(codec)


def _parts_of(block: KeptBlock, copy: TableEntry) -> Iterator[_Part]:
    for group, held in enumerate(copy.held()):
        yield _Part(block, group, held)


def _names(codec: str, group: int, held: HeldBlock) -> Iterator[_Name]:
    if held.block_id != NO_BLOCK:
        yield _Name(EXACT, group, held.rank, held.block_id)
    if held.encoded_id != NO_BLOCK:
        yield _Name(codec, group, held.rank, held.encoded_id)


def _places(part: _Part) -> Iterator[_Place]:
    for codec, group, rank, _ in _names(part.block.codec, part.group, part.held):
        yield _Place(codec, group, rank)
