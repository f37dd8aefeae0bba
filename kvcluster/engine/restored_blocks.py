"""The blocks of a context while it comes back from disk: taken from the tenant's partition, read
into by the ranks, then kept like those of any prefix. Engine process.
"""

from collections.abc import Sequence
from typing import NoReturn

from kvcluster.cache.block_table import BlockTable, TableEntry
from kvcluster.cache.held_forms import Form, HeldForms, has, restricted
from kvcluster.cache.partition import Partition
from kvcluster.cache.prefix_cache import PrefixCache
from kvcluster.engine.context import Context
from kvcluster.engine.plan import NewBlock
from kvcluster.engine.spill_plan import StoredBlocks
from kvcluster.errors import ClusterOverloaded, QuotaExceeded
from kvcluster.types import NO_BLOCK, Rank

_RETRY_S = 1.0


class RestoredBlocks:
    """One user of every block of a context, those that are still there included. `release` takes
    all away; what was kept by then has its own."""

    def __init__(
        self,
        context: Context,
        cache: PrefixCache,
        partition: Partition,
        forms: HeldForms,
        *,
        is_spread: bool,
    ) -> None:
        """Takes what is there; the rest, `take` does. `is_spread`: over all ranks, not one.

        Raises: QuotaExceeded, ClusterOverloaded; then nothing is taken.
        """
        self._context = context
        self._cache = cache
        self._partition = partition
        self._forms = forms
        self._codec = forms.codec
        self._num_entries = len(context.keys.keys)
        self._at = forms.at(self._num_entries)
        self._entries: list[TableEntry] = []
        self._exact = BlockTable(partition.num_groups)
        self._is_spread = is_spread
        present = self._present()
        for entry in present:
            cache.shared.retain(self._codec, entry)
        self._entries += present
        self.missing = tuple(range(len(present), self._num_entries))
        """The entries that have to be read."""
        try:
            self._check_room()
        except BaseException:
            self.release()
            raise

    def take(self, most: int) -> bool:
        """Take blocks for so many of the missing entries; False: all are taken.

        Raises: QuotaExceeded, ClusterOverloaded; then everything is released.
        """
        probe = BlockTable(self._partition.num_groups, self._codec)
        start = len(self._entries)
        for index in range(start, min(start + most, self._num_entries)):
            needs = self._at.needs(index)
            entry = self._take(needs)
            while entry is None and self._partition.make_room(probe):
                entry = self._take(needs)
            if entry is None:
                self.release()
                self._refuse(is_own=self._partition.is_at_limit())
            self._entries.append(entry)
        return len(self._entries) < self._num_entries

    def stored(self, block_keys: Sequence[bytes]) -> StoredBlocks:
        """Where the entries lie."""
        return stored_blocks(self._entries, self._forms, block_keys)

    def keep(self) -> None:
        """The ranks have read what was missing: others may begin with it."""
        table = BlockTable(self._partition.num_groups, self._codec)
        for entry in self._entries:
            table.add(entry)
        context = self._context
        keys = context.keys.keys
        self._cache.keep(keys, context.tokens, table, self._forms, self._num_entries)
        self._cache.note_scope(keys, context.keys.scope)

    def release(self) -> None:
        """Take our users away. Blocks that have no other are zeroed."""
        for entry in self._entries:
            self._cache.shared.release(self._codec, entry)
        self._entries = []

    def _present(self) -> list[TableEntry]:
        """The leading entries that are there in the forms that are needed."""
        entries: list[TableEntry] = []
        blocks = self._cache.match(self._context.keys.keys, self._context.tokens)
        for index, block in enumerate(blocks):
            needs = self._at.needs(index)
            copy = next((copy for copy in block.copies if has(copy, needs)), None)
            if copy is None:
                break
            entries.append(restricted(copy, needs))
        return entries

    def _check_room(self) -> None:
        partition, groups = self._partition, range(self._partition.num_groups)
        forms = [self._at.needs(index) for index in self.missing]
        num_exact, num_encoded = (
            [sum(needs[group] is form for needs in forms) for group in groups]
            for form in (Form.EXACT, Form.ENCODED)
        )
        counts = [
            num_exact[group]
            + (
                partition.blocks_in(group, num_encoded[group] + 1, self._codec, num_exact=0)
                if num_encoded[group]
                else 0
            )
            for group in groups
        ]
        if not partition.has_room(counts):
            self._refuse(is_own=not partition.is_below_limit(counts))

    def _take(self, needs: Sequence[Form]) -> TableEntry | None:
        for rank in self._ranks():
            entry = self._take_on(rank, needs)
            if entry is not None:
                return entry
        return None

    def _ranks(self) -> list[Rank]:
        """Emptiest first; all on one rank where they are not spread."""
        last = self._entries[-1].rank if self._entries else None
        turn = 0 if last is None else last + 1
        num_ranks = self._partition.num_ranks

        def order(rank: Rank) -> tuple[bool, int, int]:
            stays = not self._is_spread and rank == last
            return (not stays, -self._partition.free_blocks(rank), (rank - turn) % num_ranks)

        return sorted(map(Rank, range(num_ranks)), key=order)

    def _take_on(self, rank: Rank, needs: Sequence[Form]) -> TableEntry | None:
        none = [NO_BLOCK] * self._partition.num_groups
        encoded, taken = list(none), TableEntry(rank, tuple(none))
        for group, form in enumerate(needs):
            if form is Form.ENCODED:
                encoded[group] = self._partition.take_encoded(self._codec, rank, group)
        if any(block != NO_BLOCK for block in encoded):
            taken = taken._replace(encoded_ids=tuple(encoded))
        exact_groups = [group for group, form in enumerate(needs) if form is Form.EXACT]
        if exact_groups:
            self._exact.groups = exact_groups
            exact = self._partition.append(self._exact, rank)
            if exact is not None:
                taken = taken._replace(block_ids=exact.block_ids)
        if has(taken, needs):
            return taken
        self._cache.shared.release(self._codec, taken)
        return None

    def _refuse(self, *, is_own: bool) -> NoReturn:
        what = f"context {self._context.id} on disk does not fit into the cache beside what is used"
        if is_own:
            use = self._partition.use()
            raise QuotaExceeded(
                f"{what}: the tenant has {use.used_bytes} of its {use.share.limit_bytes} bytes; "
                "end a generation or delete a context",
                metadata={
                    "quota": "partitions.gpu.limit_bytes",
                    "used": str(use.used_bytes),
                    "limit": str(use.share.limit_bytes),
                },
            )
        raise ClusterOverloaded(f"{what}: try again when others have ended", retry_after_s=_RETRY_S)


def stored_blocks(
    entries: Sequence[TableEntry], forms: HeldForms, block_keys: Sequence[bytes]
) -> StoredBlocks:
    """Whole blocks of a context as the ranks are told of them."""
    released = forms.at(len(entries)).released
    return StoredBlocks(
        forms.codec,
        len(entries) * forms.block_size,
        tuple(NewBlock(entry.rank, entry.block_ids, entry.encoded_ids) for entry in entries),
        tuple((each.start, max(each.start, each.stop)) for each in released),
        tuple(block_keys),
    )
