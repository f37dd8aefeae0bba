"""What one rank does for contexts on disk: writes its share, sealed, and reads its share back.

Beside the steps, in a thread of its own. The lock is held while the cache's memory is touched, a
few blocks at a time, and never while the disk is waited for.
"""

from collections.abc import Iterator, Sequence
from threading import Lock

import torch

from kvcluster.attention.failures import BROKEN, places
from kvcluster.cache.saved import SavedCache, StoredForm, read_held, stored_form, write_held
from kvcluster.cache.shard import SequenceMap
from kvcluster.cache.spill import PartReceipt
from kvcluster.cache.spill_parts import opened_form, write_part
from kvcluster.cache.store import KVStore
from kvcluster.engine.spill_plan import SpillRead, SpillWrite, StoredBlocks
from kvcluster.errors import ComputationFailed, KvClusterError
from kvcluster.log import get_logger

log = get_logger(__name__)


class SpillShare:
    """One rank's side. Reads and mutates its store."""

    def __init__(
        self, store: KVStore, *, rank: int, num_ranks: int, exact_blocks: int, lock: Lock
    ) -> None:
        """`exact_blocks` as for the rank's `StepRunner`; `lock` is held by each of its steps."""
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._exact_blocks = exact_blocks
        self._lock = lock

    def write(self, order: SpillWrite) -> list[PartReceipt]:
        """Write what this rank holds. Raises: SpillDiskFull, SpillUnavailable."""
        stored, table = order.stored, self._table(order.stored)
        form = self._form(stored)
        receipts = []
        for part, entries in order.parts_of(self._rank):
            with self._lock:
                held = read_held(
                    self._store,
                    table,
                    rank=self._rank,
                    form=form,
                    num_tokens=stored.num_tokens,
                    only=frozenset(entries),
                )
                # Also the way to the host: a step that records a graph allows no copy beside it.
                on_host = {name: x.cpu() for name, x in held.tensors.items()}
            saved = SavedCache(held.header, on_host)
            keys = {entry: stored.block_keys[entry] for entry in entries}
            receipts.append(write_part(order.ticket, part, saved, keys))
        return receipts

    def read(self, order: SpillRead) -> None:
        """Read the wanted entries of this rank into their blocks.

        Raises: SealedCacheDamaged, SavedCacheMismatch, SpillUnavailable; ComputationFailed for
        whatever else goes wrong with this context alone. Then nobody may begin with these blocks.
        """
        try:
            self._read(order)
        except (KvClusterError, *BROKEN):
            raise
        except Exception as error:  # noqa: BLE001 - what a policy does may raise anything.
            kind = type(error).__name__
            log.error("context_not_restored", rank=self._rank, error=kind, source=places(error))
            raise ComputationFailed(
                policy=order.stored.codec, doing="restoring a stored context", kind=kind
            ) from None

    def _read(self, order: SpillRead) -> None:
        stored, table = order.stored, self._table(order.stored)
        wanted = frozenset(order.wanted)
        own = [entry for entry in stored.owned(self._rank) if entry in wanted]
        if not own:
            return
        form, keys = self._form(stored), stored.block_keys
        with opened_form(order.ticket, form, stored.num_tokens, keys) as read:
            for entries in _batches(own, order.entries_at_once):
                saved = read(frozenset(entries))
                # Torch has what steps made in this mode written in it alone.
                with self._lock, torch.inference_mode():
                    write_held(self._store, table, rank=self._rank, saved=saved)

    def _form(self, stored: StoredBlocks) -> StoredForm:
        return stored_form(
            self._store.spec,
            self._store.codecs,
            stored.codec,
            block_size=self._store.block_size,
            exact_blocks=self._exact_blocks,
        )

    def _table(self, stored: StoredBlocks) -> SequenceMap:
        table = SequenceMap(
            block_size=self._store.block_size,
            num_ranks=self._num_ranks,
            num_groups=len(stored.released),
        )
        for block in stored.blocks:
            table.append(block.rank, block.block_ids, block.encoded_ids)
        for group, (first, below) in enumerate(stored.released):
            table.release(group, range(first, below))
        return table


def _batches(entries: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]
