"""Blocks that outlive the sequence that computed them, found again by the keys of their tokens.

Lives in the engine process. A block is kept with the block before it: a chain of keys is a prefix
that some sequence had. Each counts as one more user of the pools' blocks, so nothing is copied;
blocks that nobody else uses are given back, the least recently used prefix's last block first,
when memory is wanted. Those of a context stay longer, those of a pinned one for ever.
"""

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvcluster.cache.block_keys import BlockKey, Scope, block_tokens
from kvcluster.cache.block_table import BlockTable, TableEntry
from kvcluster.cache.held_forms import Form, FormsAt, HeldForms, has, restricted
from kvcluster.cache.idle_blocks import IdleBlocks
from kvcluster.cache.partition import Partition
from kvcluster.cache.shared_blocks import SharedBlocks
from kvcluster.types import NO_BLOCK


class Dropped(NamedTuple):
    """What is not kept any more, and one user of each of its blocks."""

    codec: str
    entry: TableEntry


@dataclass(slots=True, eq=False)
class CachedBlock:
    """One block of tokens, and the copies of it that are kept."""

    key: BlockKey
    parent: "CachedBlock | None"
    codec: str
    tokens: bytes
    copies: list[TableEntry] = field(default_factory=list)
    """Mostly one. More where sequences on different ranks left different forms of it."""
    num_children: int = 0
    holders: dict[str, bool] = field(default_factory=dict)
    """The contexts that hold it, and whether they are pinned."""
    last_use_s: float = 0.0
    """Unix seconds."""
    scope: Scope | None = None
    """On the first block of a prefix that is kept here: what all of them mean."""
    label: str = ""
    """What it is called outside, once it was asked for: says nothing of its tokens."""

    @property
    def is_pinned(self) -> bool:
        return any(self.holders.values())


@dataclass(frozen=True, slots=True)
class PrefixCacheStatistics:
    """A snapshot."""

    num_blocks: int
    num_hits: int
    """Blocks that were adopted, since the start."""
    num_evicted: int


class PrefixCache:
    """The kept blocks of one partition. Takes users of blocks through it, and none of its own."""

    def __init__(self, partition: Partition, unix_time: Callable[[], float] = time.time) -> None:
        self._unix_time = unix_time
        self.shared = SharedBlocks(partition)
        self._partition = partition
        self._blocks: dict[BlockKey, CachedBlock] = {}
        # Least recently used first, and of one prefix the last block first.
        self._idle: OrderedDict[BlockKey, CachedBlock] = OrderedDict()
        self._of_contexts: OrderedDict[BlockKey, CachedBlock] = OrderedDict()
        self._unused = IdleBlocks(self.shared)
        self._num_hits = 0
        self._num_evicted = 0
        partition.plug(self)

    def __len__(self) -> int:
        return len(self._blocks)

    def match(
        self,
        keys: Sequence[BlockKey],
        tokens: "array[int]",
        start: int = 0,
        after: CachedBlock | None = None,
    ) -> list[CachedBlock]:
        """The kept blocks of the longest prefix, from block `start` on. Tokens are compared, and
        that they follow what they followed when they were computed: keys may collide. `after`: the
        published block before them, where there is one."""
        found: list[CachedBlock] = []
        parent = after or (self._blocks.get(keys[start - 1]) if start else None)
        for index in range(start, len(keys)):
            block = self._blocks.get(keys[index])
            if block is None or block.parent is not parent:
                break
            size = len(block.tokens) // tokens.itemsize
            if block.tokens != block_tokens(tokens, index, size):
                break
            found.append(block)
            parent = block
        return found

    def usable(
        self, blocks: Sequence[CachedBlock], forms: HeldForms, most: int
    ) -> list[TableEntry]:
        """What a sequence has to hold to go on after as many of these blocks as possible, at most
        `most`: one entry for each. Empty where there is no place to go on."""
        for num_blocks in range(min(most, len(blocks)), 0, -1):
            entries = self._entries_at(blocks, forms.at(num_blocks), num_blocks)
            if entries is not None:
                return entries
        return []

    def keep(
        self,
        keys: Sequence[BlockKey],
        tokens: "array[int]",
        table: BlockTable,
        forms: HeldForms,
        num_blocks: int,
        published: Sequence[CachedBlock] = (),
    ) -> None:
        """Keep the first blocks of a table, in the forms with which a sequence can go on there.
        Nothing is kept where the table lacks one of them. `published`: what its first entries are,
        which are kept already, and not here."""
        at, parent = forms.at(num_blocks), published[-1] if published else None
        entries = [table.entry(index) for index in range(num_blocks)]
        if not all(has(entry, at.needs(index)) for index, entry in enumerate(entries)):
            return
        path: list[CachedBlock] = []
        for index, entry in enumerate(entries):
            if index < len(published):
                continue
            block = self._blocks.get(keys[index])
            own = block_tokens(tokens, index, forms.block_size)
            if block is None:
                block = CachedBlock(keys[index], parent, forms.codec, own)
                self._blocks[block.key] = self._idle[block.key] = block
                if parent is not None:
                    parent.num_children += 1
            elif block.tokens != own or block.parent is not parent:
                break
            self._add_copy(block, restricted(entry, at.needs(index)), at.needs(index))
            path.append(block)
            parent = block
        self.touch(path)

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """These blocks of one prefix were used just now."""
        now = self._unix_time()
        for block in reversed(blocks):
            block.last_use_s = now
            self._queue_of(block).move_to_end(block.key)

    def note_scope(self, keys: Sequence[BlockKey], scope: Scope) -> None:
        """`keys`: of a prefix, without what is published of it."""
        first = self._blocks.get(keys[0]) if keys else None
        if first is not None and first.scope is None:
            first.scope = scope

    def blocks(self) -> Iterable[CachedBlock]:
        """All that is kept, in no order."""
        return self._blocks.values()

    def has(self, block: CachedBlock) -> bool:
        """Whether it is kept here: not what was given up, nor what is published."""
        return self._blocks.get(block.key) is block

    def count_hits(self, num_blocks: int) -> None:
        """So many blocks were adopted."""
        self._num_hits += num_blocks

    def hold(self, keys: Sequence[BlockKey], holder: str, *, pinned: bool) -> None:
        """A context holds these blocks, as far as they are there, pinned or not."""
        for block in self._present(keys):
            del self._queue_of(block)[block.key]
            block.holders[holder] = pinned
            self._queue_of(block)[block.key] = block
            self._unused.pins_changed(block)

    def let_go(self, keys: Sequence[BlockKey], holder: str) -> None:
        """A context holds none of these blocks any more."""
        for block in self._present(keys):
            del self._queue_of(block)[block.key]
            block.holders.pop(holder, None)
            self._queue_of(block)[block.key] = block
            self._unused.pins_changed(block)

    def evict(self, group: int, count: int) -> None:
        """Give up blocks until so many exact blocks' worth of a KV group is free, or nothing more
        can be given up."""
        below = self._partition.used(group) - count
        while self._partition.used(group) > below:
            block = self._next_victim()
            if block is None:
                return
            self._drop(block)
            self._num_evicted += 1

    def idle_units(self) -> tuple[int, ...]:
        """Per KV group, exact blocks' worth that `evict` could free."""
        return self._unused.units()

    def idle_on_ranks(self) -> tuple[int, ...]:
        """The same per rank."""
        return self._unused.on_ranks()

    def drop_tree(self, key: BlockKey) -> list[Dropped]:
        """Forget a block that no context holds and all that follow it; returns their codecs and
        entries, whose users are the caller's to take away."""
        root = self._blocks.get(key)
        if root is None or root.holders:
            return []
        dropped: list[Dropped] = []
        for block in self._tree_of(root):
            dropped += self.give_up(block)
        return dropped

    def drop_all(self) -> list[Dropped]:
        """Forget all that is kept, and that no context holds; returns as `drop_tree`."""
        dropped: list[Dropped] = []
        for block in [block for block in self._blocks.values() if not block.num_children]:
            at: CachedBlock | None = block
            while at is not None and self.has(at) and not (at.num_children or at.holders):
                dropped += self.give_up(at)
                at = at.parent
        return dropped

    def give_up(self, block: CachedBlock) -> list[Dropped]:
        """Forget one block that no other of this cache follows; returns as `drop_tree`."""
        dropped = [Dropped(block.codec, copy) for copy in block.copies]
        for copy in block.copies:
            self._unused.remove(block, copy)
        block.copies = []
        self._drop(block)
        return dropped

    def is_free(self, block: CachedBlock) -> bool:
        """Whether nobody else uses the block."""
        return all(
            self.shared.num_users(block.codec, held, group) <= 1
            for copy in block.copies
            for group, held in enumerate(copy.held())
        )

    def first_unheld(self, keys: Sequence[BlockKey]) -> BlockKey | None:
        """The first of these blocks, of one prefix, that no context holds."""
        return next((block.key for block in self._present(keys) if not block.holders), None)

    def clear(self) -> None:
        """Forget everything: the ranks have lost it."""
        for block in self._blocks.values():
            for copy in block.copies:
                self._unused.remove(block, copy)
                self.shared.release(block.codec, copy)
        self._blocks.clear()
        self._idle.clear()
        self._of_contexts.clear()

    def check(self) -> None:
        """Assert that the count of what is idle is exact."""
        self._unused.check(self._blocks.values())

    def statistics(self) -> PrefixCacheStatistics:
        return PrefixCacheStatistics(len(self._blocks), self._num_hits, self._num_evicted)

    def _entries_at(
        self, blocks: Sequence[CachedBlock], at: FormsAt, num_blocks: int
    ) -> list[TableEntry] | None:
        entries: list[TableEntry] = []
        # Mostly what is missing is an exact form of the last ones.
        for index in range(num_blocks - 1, -1, -1):
            needs = at.needs(index)
            copy = next((copy for copy in blocks[index].copies if has(copy, needs)), None)
            if copy is None:
                return None
            entries.append(restricted(copy, needs))
        entries.reverse()
        return entries

    def _add_copy(self, block: CachedBlock, added: TableEntry, needs: Sequence[Form]) -> None:
        if any(has(copy, needs) for copy in block.copies):
            return
        for place, copy in enumerate(block.copies):
            if copy.rank == added.rank:
                missing = _missing(copy, added)
                self._unused.remove(block, copy)
                self.shared.retain(block.codec, missing)
                block.copies[place] = _joined(copy, missing)
                self._unused.add(block, block.copies[place])
                return
        self.shared.retain(block.codec, added)
        block.copies.append(added)
        self._unused.add(block, added)

    def _next_victim(self) -> CachedBlock | None:
        # A last block that is in use frees nothing itself, but may stand behind what nobody uses: a
        # window has moved on, or a codec reads another form.
        for queue in (self._idle, self._of_contexts):
            for may_go in (self.is_free, self._has_idle_before):
                for block in queue.values():
                    if not block.num_children and not block.is_pinned and may_go(block):
                        return block
        return None

    def _has_idle_before(self, block: CachedBlock) -> bool:
        """Whether anything of the block, or of those before it, is used by nobody else."""
        at: CachedBlock | None = block
        while at is not None and self._blocks.get(at.key) is at:
            for copy in at.copies:
                for group, held in enumerate(copy.held()):
                    if self.shared.num_users(at.codec, held, group) == 1:
                        return not at.is_pinned
            at = at.parent
        return False

    def _drop(self, block: CachedBlock) -> None:
        for copy in block.copies:
            self._unused.remove(block, copy)
            self.shared.release(block.codec, copy)
        if block.parent is not None:
            block.parent.num_children -= 1
        self._queue_of(block).pop(block.key)
        del self._blocks[block.key]

    def _tree_of(self, root: CachedBlock) -> Iterator[CachedBlock]:
        """Children before their parents."""
        children: dict[BlockKey, list[CachedBlock]] = {}
        for block in self._blocks.values():
            if block.parent is not None:
                children.setdefault(block.parent.key, []).append(block)
        order, stack = [], [root]
        while stack:
            block = stack.pop()
            order.append(block)
            stack += children.get(block.key, [])
        return reversed(order)

    def _present(self, keys: Sequence[BlockKey]) -> list[CachedBlock]:
        return [block for block in map(self._blocks.get, keys) if block is not None]

    def _queue_of(self, block: CachedBlock) -> "OrderedDict[BlockKey, CachedBlock]":
        return self._of_contexts if block.holders else self._idle


def _missing(copy: TableEntry, added: TableEntry) -> TableEntry:
    """What the second has and the first lacks."""
    return TableEntry(
        added.rank,
        tuple(
            NO_BLOCK if held.block_id != NO_BLOCK else extra.block_id
            for held, extra in zip(copy.held(), added.held(), strict=True)
        ),
        tuple(
            NO_BLOCK if held.encoded_id != NO_BLOCK else extra.encoded_id
            for held, extra in zip(copy.held(), added.held(), strict=True)
        ),
    )


def _joined(copy: TableEntry, missing: TableEntry) -> TableEntry:
    return TableEntry(
        copy.rank,
        tuple(
            max(held.block_id, extra.block_id)
            for held, extra in zip(copy.held(), missing.held(), strict=True)
        ),
        tuple(
            max(held.encoded_id, extra.encoded_id)
            for held, extra in zip(copy.held(), missing.held(), strict=True)
        ),
    )
