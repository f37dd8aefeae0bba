"""Attention over a cache that drops tokens and reads some of the rest, for one sequence in a pass.

Retention comes first, then the codec, then selection. All depend on absolute positions alone.

With a retention by position (`full`, `window`) blocks lie where they are written, and are encoded
and read as in `kvcluster.quality.strict`, as far as they are still there.

With a retention by score, a query reads the survivors of the epochs before its own, which are
stored as `kvcluster.quality.survivor_list` says, and the tokens of its own epoch, which are exact.
To a selection they are one list of blocks: those of the survivors, then those of the epoch.

Layers with a window of the model's own are left to `StrictAttention`.

Shape letters: T query tokens, S keys, B blocks, H query heads, K KV heads, G heads that choose
blocks for themselves, D head dimension.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple, TypeGuard

import torch
from torch import Tensor

from kvcluster.attention.local import attend, attend_causal
from kvcluster.attention.partial import Partial, merge, merge_sinks
from kvcluster.codec.array import BlockShape
from kvcluster.codec.heads import check_single_heads
from kvcluster.quality.stored import StoredBytes
from kvcluster.quality.strict import (
    CodecsOfLayer,
    ExactTokens,
    KeysValues,
    LayerCodecs,
    StrictAttention,
    stored_dims,
)
from kvcluster.quality.survivor_list import (
    SurvivorList,
    block_bytes,
    cut,
    encoded_blocks,
    sealed,
    stored_as,
)
from kvcluster.retention.base import Heads, Need, RetentionPolicy
from kvcluster.retention.candidates import Queries
from kvcluster.retention.full import FullRetention
from kvcluster.retention.scored import ScoredRetention
from kvcluster.retention.window import WindowRetention
from kvcluster.selection.base import BlockSelection, KeySummaries, Rows, reads, summaries
from kvcluster.types import LayerGeometry, ModelSpec

_TILE_TOKENS: Final = 512
"""Queries that attend at one time at most, where retention is by position."""
_TILE_ELEMENTS: Final = 1 << 27
"""Of the mask of one head over those queries: 128 MiB."""


class _Columns(NamedTuple):
    """Keys as a tile of queries meets them, and the block of each."""

    kv: KeysValues
    block_S: Tensor
    seen_TS: Tensor
    """By causality, and in which of its forms a key is read."""


class Reader(NamedTuple):
    """Queries of one layer."""

    q_THD: Tensor
    sinks_H: Tensor | None = None


class RetainedAttention:
    """A `LayerAttention` for one forward pass over one sequence, positions 0 to T - 1 in order.

    Use one per pass. Computes on the device of its tensors, in float32; scores in float64.
    """

    def __init__(
        self,
        spec: ModelSpec,
        retention: RetentionPolicy,
        codecs_of_layer: CodecsOfLayer | None = None,
        *,
        exact: ExactTokens,
        selection: BlockSelection | None = None,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Positions from `num_prompt_tokens` on are output, to a selection; None: none is.

        Raises: ValueError for parts that cut blocks of different sizes, or a retention that is
        neither by position nor by score. With one by score a lag concerns layers with a window
        alone: in the others the open epoch is exact."""
        _check_parts(retention, exact, selection)
        self._spec = spec
        self._retention = retention
        self._codecs_of_layer: CodecsOfLayer = codecs_of_layer or (lambda _layer: None)
        self._exact = exact
        self._selection = selection
        self._num_prompt = num_prompt_tokens
        self._strict = StrictAttention(spec, self._codecs_of_layer, exact)
        self._own = StoredBytes()
        self._num_read = 0
        self._num_causal = 0

    def stored(self) -> StoredBytes:
        """Bytes of the layers attended so far, as the last token reads them: the survivors of the
        epochs before its own, and its own epoch."""
        return self._own + self._strict.stored()

    def read_share(self) -> float:
        """Keys read by all queries and heads, of those that full attention reads; over the layers
        that have no window of the model's own. 1 when there is none."""
        return self._num_read / self._num_causal if self._num_causal else 1.0

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """See `LayerAttention`. Raises: ValueError from a codec that cannot encode the blocks, or
        that cannot hold survivors that differ by head, and with a retention by score for a layer
        that others share keys and values with: those are to be given to `attend_sharing`."""
        geometry = self._spec.layers[layer]
        is_full = isinstance(self._retention, FullRetention) and self._selection is None
        if geometry.window is not None or is_full:
            return self._strict.attend(layer, q_THD, k_TKD, v_TKD, sinks_H)
        if _is_scored(self._retention):
            if len(self._spec.readers_of(self._spec.kv_layer_of(layer))) > 1:
                raise ValueError(
                    f"retention {self._retention.name} keeps tokens by what all their readers give "
                    f"them, and layer {layer} shares its keys and values with another: one pass, "
                    "layer by layer, cannot tell"
                )
            readers = {layer: Reader(q_THD, sinks_H)}
            return self.attend_sharing(readers, k_TKD, v_TKD)[layer]
        written = KeysValues(k_TKD.transpose(0, 1), v_TKD.transpose(0, 1))
        partial = _joined(self._by_position(layer, q_THD, written))
        return self._out(Reader(q_THD, sinks_H), partial)

    def attend_sharing(
        self, readers: Mapping[int, "Reader"], k_TKD: Tensor, v_TKD: Tensor
    ) -> dict[int, Tensor]:
        """out_THD of all layers that read the same keys and values, by layer, those that store them
        among them. For a retention by score and layers without a window of the model's own."""
        assert _is_scored(self._retention), "other layers do not depend on each other"
        written = KeysValues(k_TKD.transpose(0, 1), v_TKD.transpose(0, 1))
        found = self._by_epochs(self._retention, readers, written)
        return {
            layer: self._out(reader, _joined(found[layer])) for layer, reader in readers.items()
        }

    def _out(self, reader: "Reader", partial: Partial) -> Tensor:
        num_tokens, num_heads, _ = reader.q_THD.shape
        self._num_causal += num_heads * (num_tokens * (num_tokens + 1) // 2)
        if reader.sinks_H is not None:
            partial = merge_sinks(partial, reader.sinks_H)
        return partial.out_THD.to(reader.q_THD.dtype)

    def _codecs(self, layer: int) -> LayerCodecs:
        return self._codecs_of_layer(layer) or LayerCodecs(None, None)

    def _by_position(self, layer: int, q_THD: Tensor, written: KeysValues) -> list[Partial]:
        size, num_tokens = self._exact.block_size, len(q_THD)
        codecs, retention = self._codecs(layer), self._retention
        encoded = range(int(self._exact.exact_sinks), (num_tokens - 1) // size - self._exact.lag)
        dropped = range(0)
        if isinstance(retention, WindowRetention):
            dropped = retention.dropped_blocks(num_tokens - 1)
        num_encoded = len(set(encoded) - set(dropped))
        geometry = self._spec.layers[layer]
        read = stored_as(written, codecs, geometry, encoded, size)
        if geometry.kv_layer is None:
            self._count(written, codecs, geometry, num_encoded, retention.num_held(num_tokens))
        keys = self._summaries(written)
        tile = max(1, min(_TILE_TOKENS, _TILE_ELEMENTS // num_tokens) // size) * size
        partials = []
        for first in range(0, num_tokens, tile):
            last = min(first + tile, num_tokens)
            q_tile = q_THD[first:last]
            rows = self._rows_by_position(q_tile, first)
            columns = self._columns_by_position(rows, first, written, read)
            partials.append(self._attend_blocks(layer, rows, columns, keys))
        return partials

    def _summaries(self, kv: KeysValues) -> KeySummaries | None:
        if self._selection is None:
            return None
        return summaries(kv.k_KTD, self._exact.block_size, self._selection.needs)

    def _is_prompt(self, positions_T: Tensor) -> Tensor:
        if self._num_prompt is None:
            return torch.ones_like(positions_T, dtype=torch.bool)
        return positions_T < self._num_prompt

    def _rows_by_position(self, q_THD: Tensor, first: int) -> Rows:
        positions_T = torch.arange(first, first + len(q_THD), device=q_THD.device)
        own_T = positions_T // self._exact.block_size
        blocks_B = torch.arange(int(own_T[-1]) + 1, device=q_THD.device)
        readable_TB = blocks_B <= own_T[:, None]
        if isinstance(self._retention, WindowRetention):
            first_T1 = own_T[:, None] - self._retention.num_blocks + 1
            readable_TB &= (blocks_B == 0) | (blocks_B >= first_T1)
        return Rows(q_THD, own_T, readable_TB, self._is_prompt(positions_T))

    def _columns_by_position(
        self, rows: Rows, first: int, written: KeysValues, read: KeysValues
    ) -> _Columns:
        """Keys as they are read and, where they differ, near ones also as they were written: each
        row sees one of the two."""
        size, lag = self._exact.block_size, self._exact.lag
        last, device = first + len(rows.q_THD), rows.q_THD.device
        positions_T1 = torch.arange(first, last, device=device)[:, None]
        positions_S = torch.arange(last, device=device)
        if read is written:
            kv = written.rows(0, last)
            return _Columns(kv, positions_S // size, positions_S <= positions_T1)
        near = max(0, first // size - lag) * size
        is_written_S = torch.arange(last + last - near, device=device) >= last
        positions_S = torch.cat((positions_S, positions_S[near:]))
        block_S = positions_S // size
        is_near_TS = block_S >= rows.own_T[:, None] - lag
        seen_TS = (positions_S <= positions_T1) & (is_near_TS == is_written_S)
        kv = read.rows(0, last).followed_by(written.rows(near, last))
        return _Columns(kv, block_S, seen_TS)

    def _by_epochs(
        self, retention: ScoredRetention, readers: Mapping[int, Reader], written: KeysValues
    ) -> dict[int, list[Partial]]:
        source = self._spec.kv_layer_of(next(iter(readers)))
        geometry, codecs = self._spec.layers[source], self._codecs(source)
        if retention.heads is Heads.OWN:
            check_single_heads(*codecs, geometry, self._exact.block_size)
        num_tokens = written.k_KTD.shape[1]
        kept = SurvivorList.empty(written)
        partials: dict[int, list[Partial]] = {layer: [] for layer in readers}
        for first in range(0, num_tokens, retention.epoch_tokens):
            last = min(first + retention.epoch_tokens, num_tokens)
            own = written.rows(first, last)
            queries = {
                layer: Queries(q_THD[first:last], first, self._spec.layers[layer], sinks_H)
                for layer, (q_THD, sinks_H) in readers.items()
            }
            for layer, rows in queries.items():
                partials[layer].append(self._attend_epoch(layer, rows, kept.kv, own))
            if last < num_tokens:
                before = kept
                kept = cut(retention, kept, own, list(queries.values()))
                kept = sealed(kept, before, codecs, geometry, self._exact, retention.heads)
        num_held = retention.num_held(num_tokens)
        num_encoded = len(encoded_blocks(kept.positions_KJ.shape[1], self._exact))
        self._count(written, codecs, geometry, num_encoded, num_held)
        return partials

    def _attend_epoch(
        self, layer: int, queries: Queries, earlier: KeysValues, own: KeysValues
    ) -> Partial:
        geometry, size, q_THD = queries.layer, self._exact.block_size, queries.q_THD
        num_rows, num_earlier = len(q_THD), earlier.k_KTD.shape[1]
        if self._selection is None:
            self._num_read += q_THD.shape[1] * (
                num_rows * num_earlier + num_rows * (num_rows + 1) // 2
            )
            return merge(attend(q_THD, *earlier, geometry), attend_causal(q_THD, *own, geometry, 0))
        keys = self._summaries(own)
        before = self._summaries(earlier) if num_earlier else None
        if keys is not None and before is not None:
            keys = before.followed_by(keys)
        own_T = torch.arange(num_rows, device=q_THD.device)
        earlier_S = torch.arange(num_earlier, device=q_THD.device)
        num_blocks = -(-num_earlier // size)
        block_S = torch.cat((earlier_S // size, num_blocks + own_T // size))
        seen_TS = torch.cat(
            (
                torch.ones(num_rows, num_earlier, dtype=torch.bool, device=q_THD.device),
                own_T <= own_T[:, None],
            ),
            dim=1,
        )
        own_block_T = num_blocks + own_T // size
        blocks_B = torch.arange(int(own_block_T[-1]) + 1, device=q_THD.device)
        is_prompt_T = self._is_prompt(queries.first + own_T)
        rows = Rows(q_THD, own_block_T, blocks_B <= own_block_T[:, None], is_prompt_T)
        columns = _Columns(earlier.followed_by(own), block_S, seen_TS)
        return self._attend_blocks(layer, rows, columns, keys)

    def _attend_blocks(
        self, layer: int, rows: Rows, columns: _Columns, keys: KeySummaries | None
    ) -> Partial:
        """Attention over the blocks that rows may read and their selection picks."""
        geometry = self._spec.layers[layer]
        reads_GTB = rows.readable_TB[None]
        if self._selection is not None:
            assert keys is not None, "a selection is given summaries"
            num_blocks = rows.readable_TB.shape[1]
            known = KeySummaries(*(plane[:, :num_blocks] for plane in keys))
            reads_GTB = reads(self._selection, layer, geometry, rows, known)
        # Blocks that no row of the tile reads cost nothing.
        used_S = reads_GTB.flatten(0, 1).any(dim=0)[columns.block_S].nonzero()[:, 0]
        k_KSD, v_KSD = (x_KSD[:, used_S] for x_KSD in columns.kv)
        mask_GTS = reads_GTB[:, :, columns.block_S[used_S]] & columns.seen_TS[:, used_S]
        num_heads, num_choosing = rows.q_THD.shape[1], len(mask_GTS)
        sharing = num_heads // num_choosing
        self._num_read += int(mask_GTS.sum()) * sharing
        if num_choosing == 1:
            return attend(rows.q_THD, k_KSD, v_KSD, geometry, mask_GTS[0])
        partials = []
        for choosing, mask_TS in enumerate(mask_GTS):
            heads = slice(choosing * sharing, (choosing + 1) * sharing)
            kv_head = choosing * geometry.num_kv_heads // num_choosing
            one = slice(kv_head, kv_head + 1)
            partials.append(attend(rows.q_THD[:, heads], k_KSD[one], v_KSD[one], geometry, mask_TS))
        return Partial(*(torch.cat(planes, dim=1) for planes in zip(*partials, strict=True)))

    def _count(
        self,
        written: KeysValues,
        codecs: LayerCodecs,
        geometry: LayerGeometry,
        num_encoded: int,
        num_held: int,
    ) -> None:
        """Count a layer that holds so many tokens, so many blocks of them encoded."""
        size = self._exact.block_size
        num_heads, num_tokens, _ = written.k_KTD.shape
        for codec, dim in stored_dims(codecs, geometry):
            blocks = num_encoded if codec is not None else 0
            self._own += StoredBytes(
                num_tokens=num_tokens,
                exact_elements=(num_held - blocks * size) * num_heads * dim,
                encoded_elements=blocks * size * num_heads * dim,
                encoded_bytes=blocks * block_bytes(codec, BlockShape(num_heads, size, dim)),
                dropped_elements=(num_tokens - num_held) * num_heads * dim,
            )


def _check_parts(
    retention: RetentionPolicy, exact: ExactTokens, selection: BlockSelection | None
) -> None:
    sizes = [exact.block_size]
    if _is_scored(retention) or isinstance(retention, WindowRetention):
        sizes.append(retention.block_size)
    elif not isinstance(retention, FullRetention):
        raise ValueError(f"retention {retention.name} is neither by position nor by score")
    if selection is not None:
        sizes.append(selection.block_size)
    if len(set(sizes)) > 1:
        raise ValueError(f"all parts must have one block size, not {sizes}")


def _is_scored(retention: RetentionPolicy) -> TypeGuard[ScoredRetention]:
    return retention.needs is not Need.NOTHING


def _joined(partials: list[Partial]) -> Partial:
    return Partial(*(torch.cat(planes) for planes in zip(*partials, strict=True)))
