"""Contexts off the GPUs over a `FakeRing`: real sealed files whose records are the tokens of fake
blocks, and an executor that runs at once what is handed to threads.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

from kvcluster.cache.sealed_files import open_sealed, write_sealed
from kvcluster.cache.sealed_records import PartHeader, RecordPlace
from kvcluster.cache.spill import PartReceipt, SpillOwner, SpillTicket
from kvcluster.engine.plan import NewBlock
from kvcluster.engine.spill_plan import SpillRead, SpillWrite
from kvcluster.errors import SealedCacheDamaged
from kvcluster.types import EXACT, NO_BLOCK
from tests.fake_ring import FakeRing, Held

_ITEM_BYTES = array("I").itemsize


class FakeRanks:
    """`SpillRanks` of a ring with one KV group: it believes no order, and writes no block that
    anybody could read already."""

    def __init__(self, ring: FakeRing) -> None:
        self._ring = ring
        self.reads: list[SpillOwner] = []
        """Whose spills were read, in order."""

    async def write_spill(self, order: SpillWrite) -> Sequence[PartReceipt]:
        stored, receipts = order.stored, []
        for rank in range(len(self._ring.pool_sizes)):
            for part, entries in order.parts_of(rank):
                held = [self._held(stored.codec, stored.blocks[entry]) for entry in entries]
                contents = [
                    self._content(each, entry) for each, entry in zip(held, entries, strict=True)
                ]
                places = tuple(
                    RecordPlace("block", 0, entry, len(content), stored.block_keys[entry])
                    for entry, content in zip(entries, contents, strict=True)
                )
                header = PartHeader(content=b"", places=places)
                receipts.append(write_sealed(order.ticket, part, header, contents))
        return receipts

    async def read_spill(self, order: SpillRead) -> None:
        self.reads.append(order.ticket.owner)
        stored, size = order.stored, self._ring.block_size
        found = _records(order.ticket, stored.block_keys)
        tokens: list[int] = []
        for entry in range(len(stored.blocks)):
            content = array("I")
            content.frombytes(found[entry][: size * _ITEM_BYTES])
            tokens += content
            if entry not in order.wanted:
                continue
            assert found[entry][size * _ITEM_BYTES :] == _digest(tokens)
            held = self._held(stored.codec, stored.blocks[entry])
            assert held not in self._ring._tokens, "what is read into has been zeroed"
            assert held not in self._ring._users, "what is read into is nobody's"
            self._ring._tokens[held] = (list(tokens), len(tokens))

    def _held(self, codec: str, block: NewBlock) -> Held:
        """The one form in which an entry is stored."""
        if block.block_ids[0] != NO_BLOCK:
            return Held(block.rank, 0, EXACT, block.block_ids[0])
        return Held(block.rank, 0, codec, block.encoded_ids[0])

    def _content(self, held: Held, entry: int) -> bytes:
        tokens, end = self._ring._tokens[held]
        size = self._ring.block_size
        assert end == (entry + 1) * size, "the block is of this entry"
        return array("I", tokens[end - size : end]).tobytes() + _digest(tokens[:end])


def _digest(tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("I", tokens).tobytes(), digest_size=8).digest()


def _records(ticket: SpillTicket, block_keys: Sequence[bytes]) -> dict[int, bytes]:
    """By entry. Raises: SealedCacheDamaged, as the ranks do, where a block has another name."""
    found = {}
    for receipt in ticket.receipts:
        with closing(open_sealed(ticket, receipt)) as reader:
            for index, place in enumerate(reader.header.places):
                if place.block_key != block_keys[place.entry]:
                    raise SealedCacheDamaged("it is of other tokens")
                found[place.entry] = reader.read(index)
    return found


class InlineExecutor(ThreadPoolExecutor):
    """Of an event loop: what goes to a thread is done before anybody waits for it."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **named))
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            future.set_exception(error)
        return future
