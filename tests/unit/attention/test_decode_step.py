"""The tensors of a decode step hold, step after step, what tables built anew would hold."""

import torch
from kvcluster_kernels.paging import PagedRows

from kvcluster.attention.decode_step import DecodeInputs
from kvcluster.attention.part import CacheRules, SequencePart
from kvcluster.attention.row_tables import row_tables
from kvcluster.cache.shard import SequenceMap
from kvcluster.cache.store import KVStore
from kvcluster.types import PAGE_BLOCKS, Route
from tests.codec_models import CPU, plain_codecs
from tests.scripted_model import ScriptedModel, geometry

BLOCK_SIZE = 16
MODEL = ScriptedModel(geometry(), geometry(window=40), max_tokens=512)


def store() -> KVStore:
    return KVStore(
        MODEL.spec,
        blocks_per_group=[64, 64],
        block_size=BLOCK_SIZE,
        like=torch.empty(0),
        codecs=plain_codecs(MODEL.spec),
    )


class Growing:
    """A sequence whose blocks are dealt from the end of the pools."""

    def __init__(self, codec: str, first_block: int, num_tokens: int) -> None:
        self.rules = CacheRules(codec=codec, exact_blocks=1)
        self.table = SequenceMap(block_size=BLOCK_SIZE, num_ranks=1, num_groups=2)
        self.next_block = first_block
        self.num_tokens = num_tokens

    def part(self, row: int) -> SequencePart:
        while self.table.capacity_tokens <= self.num_tokens:
            block = self.next_block
            self.table.append(0, (block, block + 1), (block + 2, block + 3))
            self.next_block -= 1
        self.num_tokens += 1
        return SequencePart(
            self.table,
            start=self.num_tokens - 1,
            num_tokens=1,
            route=Route.PASS_KV,
            rank=0,
            row_offset=row,
            rules=self.rules,
        )


def in_lists(rows: PagedRows) -> list[list[int]]:
    """Of each row: the blocks that are read, the start and the end."""
    found = []
    for blocks_B, start, end in zip(rows.blocks_RB, rows.starts_R, rows.ends_R, strict=True):
        num_blocks = -(-int(end) // BLOCK_SIZE)
        found.append([*blocks_B[:num_blocks].tolist(), int(start), int(end)])
    return found


def test_inputs_follow_sequences_that_grow_come_and_go() -> None:
    inputs = DecodeInputs(store(), max_rows=4)
    long, short, late = (
        Growing(codec, first, length)
        for codec, first, length in (("int8", 60, 90), ("exact", 30, 12), ("rotated4", 20, 33))
    )

    for step in range(40):
        sequences = [long, short] if step < 15 else [late, long] if step < 30 else [late]
        parts = [sequence.part(row) for row, sequence in enumerate(sequences)]
        shape = inputs.set_rows(parts, list(range(step, step + len(parts))))

        assert inputs.token_ids(shape.num_rows).tolist() == [step, step + 1][: len(parts)]
        assert inputs.positions(shape.num_rows).tolist() == [part.start for part in parts]
        for group, window in enumerate(MODEL.spec.windows):
            built, kept = row_tables(parts, group, window, CPU), inputs.row_tables(group, shape)
            assert in_lists(kept.exact) == in_lists(built.exact)
            assert kept.encoded.keys() == built.encoded.keys()
            for codec, rows in built.encoded.items():
                assert in_lists(kept.encoded[codec]) == in_lists(rows)
            pages_R, offsets_R = inputs.places(group, shape.num_rows)
            slots_R = pages_R * PAGE_BLOCKS * BLOCK_SIZE + offsets_R
            assert slots_R.tolist() == [part.slot(group) for part in parts]
