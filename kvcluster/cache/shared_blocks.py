"""Blocks with several users: tables of one tenant that begin alike, and what is kept for later.

Lives in the engine process. Counts are the pools'; here entries of tables are counted as a whole.
"""

from kvcluster.cache.block_table import BlockTable, HeldBlock, TableEntry
from kvcluster.cache.partition import Partition
from kvcluster.types import EXACT, NO_BLOCK


class SharedBlocks:
    """Counts users of one partition's blocks."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition

    def retain(self, codec: str, entry: TableEntry) -> None:
        """Count one more user of every block of an entry that is in use."""
        for group, held in enumerate(entry.held()):
            if held.block_id != NO_BLOCK:
                self.partition.pool(held.rank, group).retain(held.block_id)
            if held.encoded_id != NO_BLOCK:
                encoded = self.partition.encoded_pool(codec, held.rank, group)
                encoded.retain(held.encoded_id)
            self.partition.on_users_changed(codec, group, held)

    def release(self, codec: str, entry: TableEntry) -> None:
        """Take one user of every block of an entry away."""
        for group, held in enumerate(entry.held()):
            self.partition.release(codec, group, held)

    def num_users(self, codec: str, held: HeldBlock, group: int) -> int:
        """Most users of what an entry holds in a group; 0: it holds nothing."""
        users = 0
        if held.block_id != NO_BLOCK:
            users = self.partition.pool(held.rank, group).ref_count(held.block_id)
        if held.encoded_id != NO_BLOCK:
            encoded = self.partition.encoded_pool(codec, held.rank, group)
            users = max(users, encoded.num_users(held.encoded_id))
        return users

    def adopt(
        self, table: BlockTable, entry: TableEntry, lender: "SharedBlocks | None" = None
    ) -> TableEntry | None:
        """Share an entry with the table; returns it as the table has it. Shared blocks are never
        written: what is still to be encoded gets an encoded block of its own. None, and nothing
        taken: there is none left. `lender`: of the published prefixes, where it comes from there;
        its blocks stay counted as theirs."""
        (lender or self).retain(table.codec, entry)
        codec, is_encoded = table.codec, table.codec != EXACT and len(table) > 0
        encoded = list(entry.encoded_ids or (NO_BLOCK,) * self.partition.num_groups)
        for group in table.groups if is_encoded else ():
            if entry.block_ids[group] == NO_BLOCK:
                continue
            while (block := self.partition.take_encoded(codec, entry.rank, group)) == NO_BLOCK:
                if not self.partition.make_room(table):
                    break
            encoded[group] = block
            if block == NO_BLOCK:
                given = entry.encoded_ids or (NO_BLOCK,) * len(encoded)
                own = (
                    NO_BLOCK if shared != NO_BLOCK else taken
                    for taken, shared in zip(encoded, given, strict=True)
                )
                self.release(codec, entry._replace(encoded_ids=tuple(own)))
                none = (NO_BLOCK,) * len(entry.block_ids)
                (lender or self).release(codec, entry._replace(block_ids=none))
                return None
        adopted = entry._replace(encoded_ids=tuple(encoded) if is_encoded else ())
        table.add(adopted, lent=None if lender is None else entry)
        return adopted
