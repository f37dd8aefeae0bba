"""How much room the files of a context take at most: known before anything is written."""

from typing import Final

from kvcluster.cache.capacity import block_bytes_per_group
from kvcluster.cache.held_forms import Form
from kvcluster.cache.partitions import CachePartitions
from kvcluster.engine.prefixes import Prefixes
from kvcluster.types import PAGE_BLOCKS, ModelSpec, Policy, Rank, TenantId

_RECORD_BYTES: Final = 128
"""Tag, place and block key of a record, and its number in the header."""
_FILE_BYTES: Final = 1024
"""Magic, salt and form of a file."""
_LAYER_BYTES: Final = 1024
"""Names and shapes of a layer's arrays, in each file."""
_HELD_AT_ONCE: Final = 32 * 1024 * 1024
"""Bytes that a rank has beside its cache while it writes or reads."""


class SpillSizes:
    """Of one engine. Holds nothing."""

    def __init__(
        self, spec: ModelSpec, partitions: CachePartitions, prefixes: Prefixes, block_size: int
    ) -> None:
        self._spec = spec
        self._partitions = partitions
        self._prefixes = prefixes
        self._block_bytes = block_bytes_per_group(spec, block_size)
        self.num_ranks = partitions.num_ranks
        self.entries_at_once = max(1, _HELD_AT_ONCE // sum(self._block_bytes))
        """Entries that a rank writes into one file, and reads in one go."""

    def most_bytes(self, tenant: TenantId, policy: Policy, num_entries: int) -> int:
        """Bytes that the files of so many whole blocks do not exceed, that of the note left out."""
        forms, codec = self._prefixes.forms(policy).at(num_entries), policy.storage
        partition = self._partitions.of(tenant)
        num_bytes = 0
        for entry in range(num_entries):
            for group, form in enumerate(forms.needs(entry)):
                if form is Form.EXACT:
                    num_bytes += self._block_bytes[group] + _RECORD_BYTES
                elif form is Form.ENCODED:
                    pool = partition.encoded_pool(codec, Rank(0), group)
                    page_bytes = PAGE_BLOCKS * self._block_bytes[group]
                    num_bytes += page_bytes // pool.blocks_per_page + _RECORD_BYTES
        num_files = self.num_ranks + num_entries // self.entries_at_once
        file_bytes = _FILE_BYTES + len(codec) + _LAYER_BYTES * len(self._spec.layers)
        return num_bytes + num_files * file_bytes
