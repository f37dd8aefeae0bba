"""What a sequence holds between two steps, as a function of its length alone: which of its blocks,
in which KV groups, exact or encoded. Torch-free.

A sequence may begin where another one stands only if the same blocks in the same forms are there:
then every later row reads what it would have read after computing all of them itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kvcluster.cache.block_table import TableEntry
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.types import EXACT, NO_BLOCK, BlockId


class Form(StrEnum):
    NONE = "none"
    """No later row reads the block in this KV group."""
    EXACT = "exact"
    ENCODED = "encoded"


@dataclass(frozen=True, slots=True)
class HeldForms:
    """The rules of one policy on one model."""

    windows: Sequence[int | None]
    """One KV group each."""
    block_size: int
    codec: str = EXACT
    region: ExactRegion = field(default_factory=ExactRegion)
    recent_blocks: int | None = None
    """See `BlockTable`."""

    def at(self, num_blocks: int) -> "FormsAt":
        """What is held when so many whole blocks are computed."""
        return FormsAt(
            self.codec == EXACT,
            self.region.first_block(num_blocks),
            tuple(self._released(group, num_blocks) for group in range(len(self.windows))),
        )

    def _released(self, group: int, num_blocks: int) -> range:
        # As `BlockReleases` does it after each step.
        window = self.windows[group]
        if window is not None:
            return range(max(0, (num_blocks * self.block_size - window + 1) // self.block_size))
        if self.recent_blocks is not None:
            # The first block holds the attention sinks.
            return range(1, max(1, num_blocks - self.recent_blocks + 1))
        return range(0)


@dataclass(frozen=True, slots=True)
class FormsAt:
    """The same for one length."""

    is_exact: bool
    first_exact: int
    """Entries from this one on are exact, and the first one."""
    released: tuple[range, ...]
    """Per KV group, the entries that no later row reads."""

    def needs(self, entry: int) -> tuple[Form, ...]:
        """Per KV group, what is held of an entry."""
        is_exact = self.is_exact or entry == 0 or entry >= self.first_exact
        held = Form.EXACT if is_exact else Form.ENCODED
        if not any(self.released):
            return (held,) * len(self.released)
        return tuple(Form.NONE if entry in released else held for released in self.released)


def has(entry: TableEntry, needs: Sequence[Form]) -> bool:
    """Whether an entry holds all of these forms."""
    return all(
        form is Form.NONE or _id_of(entry, group, form) != NO_BLOCK
        for group, form in enumerate(needs)
    )


def restricted(entry: TableEntry, needs: Sequence[Form]) -> TableEntry:
    """The entry with these forms only. Mostly it has no others, and is returned as it is."""
    if entry.encoded_ids:
        is_all = all(form is Form.ENCODED for form in needs) and not any(
            block != NO_BLOCK for block in entry.block_ids
        )
    else:
        is_all = all(form is Form.EXACT for form in needs)
    if is_all:
        return entry

    def ids(form: Form) -> tuple[BlockId, ...]:
        return tuple(
            _id_of(entry, group, form) if needed is form else NO_BLOCK
            for group, needed in enumerate(needs)
        )

    encoded = ids(Form.ENCODED)
    return TableEntry(
        entry.rank,
        ids(Form.EXACT),
        encoded if any(block != NO_BLOCK for block in encoded) else (),
    )


def _id_of(entry: TableEntry, group: int, form: Form) -> BlockId:
    if form is Form.EXACT:
        return entry.block_ids[group]
    return entry.encoded_ids[group] if entry.encoded_ids else NO_BLOCK
