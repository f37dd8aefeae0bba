"""One block of one row becomes encoded on a rank, in all layers, and what that does to attention is
measured: once in as many steps as a block has tokens.

`encoding.BlockEncoding` is the definition. This computes the same with tensors of fixed places, so
that it can be recorded as a CUDA graph and run again, and nothing waits for it.

Shape letters: H query heads, K KV heads, S tokens of a block, D head dimension.
"""

from collections.abc import Mapping
from typing import Final

import torch
from kvcluster_kernels.paging import Attention, PagedRows
from torch import Tensor

from kvcluster.attention.decode_step import Lines
from kvcluster.attention.kernel_attention import KernelAttention
from kvcluster.attention.packed_keys import PackedPages
from kvcluster.attention.part import SequencePart
from kvcluster.cache.store import KVStore, Piece
from kvcluster.types import EXACT

_EXACT_LINE: Final = 0
_ENCODED_LINE: Final = 1


def only_full_blocks(store: KVStore, part: SequencePart) -> list[tuple[int, int]] | None:
    """By KV group the exact block and the encoded one that it becomes, where the part fills one
    block of each group; None where it does not, or where layers hold other tokens than others."""
    if type(part) is not SequencePart or part.has_chunk or part.codec == EXACT:
        return None
    if part.rules.epoch_tokens is not None:
        return None
    found = []
    for group in range(len(store.spec.windows)):
        full = part.full_blocks(group)
        if full is None or len(full.encoded_ids_B) != 1:
            return None
        # A whole block lies in one piece.
        found.append((full.runs[0].start // store.block_size, int(full.encoded_ids_B[0])))
    return found


class EncodeStep:
    """Blocks of one codec. Mutates the store."""

    def __init__(self, store: KVStore, kernels: KernelAttention, codec: str) -> None:
        self._store = store
        self._spec = store.spec
        self._kernels = kernels
        self._codec = codec
        self._ids = Lines(2, len(store.spec.windows), torch.int64, store.device)
        self._queries: dict[int, Tensor] = {}

    def is_served(self) -> bool:
        """Whether kernels write and read the codec's blocks in all layers, each by itself."""
        rows = self._kernels.rows
        return rows is not None and all(
            geometry.kv_layer is None
            and self._store.joined_layers(layer, self._codec) == (layer,)
            and self._kernels.encodes(layer, self._codec)
            and isinstance(rows.packed(layer, self._codec), PackedPages)
            for layer, geometry in enumerate(self._spec.layers)
        )

    def set_block(
        self, blocks: list[tuple[int, int]], queries: Mapping[int, Tensor], row: int
    ) -> None:
        """What the next run encodes: `only_full_blocks` of a part, and its row among `queries`,
        q_RHD by layer."""
        if not self._queries:
            self._queries = {layer: torch.empty_like(q[:1]) for layer, q in queries.items()}
        torch._foreach_copy_(
            list(self._queries.values()),
            [queries[layer][row : row + 1] for layer in self._queries],
        )
        self._ids.begin()
        self._ids.host[_EXACT_LINE], self._ids.host[_ENCODED_LINE] = zip(*blocks, strict=True)
        self._ids.copy(2)

    def run(self) -> Tensor:
        """Two sums over all layers, float32: those of `EncodingErrors.sums`."""
        rows = self._kernels.rows
        assert rows is not None, "asked for what is not served"
        size = self._store.block_size
        encoded_G = self._ids.on_device[_ENCODED_LINE].to(torch.int32)
        bounds_2 = torch.arange(0, 2 * size, size, dtype=torch.int32, device=encoded_G.device)
        sums = []
        for layer, q_1HD in self._queries.items():
            geometry = self._spec.layers[layer]
            group = self._spec.group_of(geometry)
            exact_1 = self._ids.on_device[_EXACT_LINE, group : group + 1]
            encoded_1 = encoded_G[group : group + 1]
            blocks = self._store.read_blocks(layer, exact_1)
            done = self._kernels.encode(layer, self._codec, encoded_1, blocks)
            packed = rows.packed(layer, self._codec)
            assert done, "asked for what is not served"
            assert isinstance(packed, PackedPages), "asked for what is not served"
            before = self._kernels.attend(q_1HD, *Piece(*(x[0] for x in blocks)), geometry)
            table = PagedRows(encoded_1[None], bounds_2[:1], bounds_2[1:])
            asked = Attention(geometry.scale, geometry.softcap)
            after = packed.decode(q_1HD[:, None], table, asked)
            error_HD = after.out_RTHD[0, 0] - before.out_THD[0]
            sums.append(torch.stack([error_HD.square().sum(), before.out_THD.square().sum()]))
        return torch.stack(sums).sum(dim=0)
