"""Single rows over a paged cache by kernels: one launch for all rows and each way of storing.

Shape letters: R rows, H query heads, K KV heads, D head dimension.
"""

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from kvcluster_kernels.absorbed_decode import MAX_ABSORBED_DIM, decode_absorbed
from kvcluster_kernels.block_lists import one_head_pages
from kvcluster_kernels.chosen_blocks import Pools
from kvcluster_kernels.combine_pools import combine_pools
from kvcluster_kernels.decode import ExactPages, decode
from kvcluster_kernels.merge import merge
from kvcluster_kernels.paging import Attention, PagedRows, SplitPartials
from kvcluster_kernels.paging import Partial as RowPartial
from kvcluster_kernels.prefill_arguments import MAX_HEAD_DIM, PartialAttention
from torch import Tensor

from kvcluster.attention.latent_cache import LatentCache
from kvcluster.attention.packed_keys import PackedPages, packed_pages
from kvcluster.attention.part import SequencePart
from kvcluster.attention.partial import Partial
from kvcluster.attention.row_splits import pool_splits
from kvcluster.attention.row_tables import RowTables, full_span, paged_rows, row_tables
from kvcluster.attention.survivors import SurvivorReader
from kvcluster.cache.store import KVStore
from kvcluster.log import get_logger
from kvcluster.types import EXACT, LayerGeometry

Merge = Callable[..., Partial]

_log = get_logger(__name__)


class KernelRows:
    """A `RowAttention` over the cache of one rank. Tables are built once for the layers of a KV
    group."""

    def __init__(self, store: KVStore, merge: Merge) -> None:
        """`merge`: as `partial.merge`."""
        self._store = store
        self._spec = store.spec
        self._merge = merge
        self._pages: dict[tuple[int, str], PackedPages | LatentCache | None] = {}
        self._served: dict[tuple[str, bool], bool] = {}
        self._tables: dict[tuple[int, tuple[SequencePart, ...]], RowTables] = {}
        self._full: WeakKeyDictionary[SequencePart, dict[int, PagedRows]] = WeakKeyDictionary()
        """By part and KV group: the blocks that become encoded."""

    def begin_step(self) -> None:
        self._tables.clear()

    def serves(self, layer: int, part: SequencePart) -> bool:
        if type(part) not in (SequencePart, SurvivorReader) or part.has_chunk:
            return False
        geometry = self._spec.layers[layer]
        if max(geometry.key_dim, geometry.value_dim) > widest_head(geometry):
            return False
        codec = part.codec_in(geometry.window)
        if codec == EXACT:
            return True
        packed = self.packed(layer, codec)
        # Places of survivors tell nothing of the positions of latents.
        are_placed = isinstance(packed, LatentCache) and type(part) is SurvivorReader
        return packed is not None and not are_placed

    def serves_all_layers(self, part: SequencePart) -> bool:
        """Whether `serves` says so of every layer. Survivors are read beside another part."""
        if type(part) is not SequencePart or part.has_chunk:
            return False
        key = (part.codec, part.rules.epoch_tokens is None)
        if key not in self._served:
            layers = range(len(self._spec.layers))
            self._served[key] = all(self.serves(layer, part) for layer in layers)
        return self._served[key]

    def attend(self, layer: int, parts: Sequence[SequencePart], q_RHD: Tensor) -> Partial:
        geometry = self._spec.layers[layer]
        key = (self._spec.group_of(geometry), tuple(parts))
        tables = self._tables.get(key)
        if tables is None:
            tables = row_tables(parts, key[0], geometry.window, q_RHD.device)
            self._tables[key] = tables
        return self._merge(*self.partials(layer, q_RHD, tables))

    def attend_full(self, layer: int, part: SequencePart, q_1HD: Tensor) -> Partial | None:
        geometry = self._spec.layers[layer]
        group = self._spec.group_of(geometry)
        packed = self.packed(layer, part.codec)
        full = part.full_blocks(group)
        if packed is None or full is None or type(part) is not SequencePart:
            return None
        if max(geometry.key_dim, geometry.value_dim) > widest_head(geometry):
            return None
        tables = self._full.setdefault(part, {})
        if group not in tables:
            tables[group] = paged_rows([full_span(full, part.block_size)], q_1HD.device)
        asked = Attention(geometry.scale, geometry.softcap)
        return _in_line(packed.decode(q_1HD.contiguous()[:, None], tables[group], asked))

    def partials(self, layer: int, q_RHD: Tensor, tables: RowTables) -> list[Partial]:
        """Of all rows over what is exact, then over the blocks of each codec."""
        geometry = self._spec.layers[layer]
        asked = Attention(geometry.scale, geometry.softcap)
        q_R1HD = q_RHD.contiguous()[:, None]
        pages = ExactPages(*self._store.planes(layer), self._store.block_size)
        found = [_in_line(exact_decode(geometry)(q_R1HD, pages, tables.exact, asked))]
        for codec, rows in tables.encoded.items():
            packed = self.packed(layer, codec)
            assert packed is not None, "asked for what is not served"
            found.append(_in_line(packed.decode(q_R1HD, rows, asked)))
        return found

    def attend_whole(
        self, layer: int, q_RHD: Tensor, tables: RowTables, sinks_H: Tensor | None
    ) -> Tensor:
        """out_RHD of all rows over all that they read, in q's dtype."""
        geometry = self._spec.layers[layer]
        pools = None if _is_absorbed(geometry) else self._splits(layer, q_RHD, tables)
        if pools is not None:
            out_R1HD = combine_pools(pools, num_tokens=1, out_dtype=q_RHD.dtype, sinks_H=sinks_H)
            return out_R1HD[:, 0]
        partials = [PartialAttention(*each) for each in self.partials(layer, q_RHD, tables)]
        return merge(partials, sinks_H=sinks_H, out_dtype=q_RHD.dtype).out_THD

    def _splits(self, layer: int, q_RHD: Tensor, tables: RowTables) -> list[SplitPartials] | None:
        geometry = self._spec.layers[layer]
        pages = ExactPages(*self._store.planes(layer), self._store.block_size)
        return pool_splits(
            q_RHD.contiguous()[:, None],
            (pages, tables.exact),
            {codec: (self.packed(layer, codec), rows) for codec, rows in tables.encoded.items()},
            Attention(geometry.scale, geometry.softcap),
        )

    def chosen_pools(
        self, layer: int, codec: str, ids: tuple[Tensor, Tensor | None], num_choosing: int
    ) -> Pools:
        """For tables of blocks that rows choose: by the ids of blocks, exact ones and encoded."""
        heads = self._spec.layers[layer].num_kv_heads if num_choosing > 1 else 1
        packed = None if codec == EXACT else self.packed(layer, codec)
        page_blocks = self._store.page_tokens // self._store.block_size
        encoded_heads = 1 if isinstance(packed, LatentCache) else heads
        return Pools(*ids, page_blocks, self._store.block_size, heads, encoded_heads)

    def chosen_partials(
        self,
        layer: int,
        q_RHD: Tensor,
        num_choosing: int,
        exact: PagedRows,
        encoded: tuple[str, PagedRows | None],
    ) -> list[Partial]:
        """Of rows over blocks that they chose, of exact ones and of those of a codec. Tables have a
        row for each of `num_choosing` heads of each row, with ids of blocks that are one KV head's
        (`PackedPages.one_head`) where heads choose for themselves; but for latents, which are of
        all KV heads: each such row reads for all, and the others' results are dropped."""
        geometry, (codec, encoded_rows) = self._spec.layers[layer], encoded
        asked = Attention(geometry.scale, geometry.softcap)
        pages = ExactPages(*self._store.planes(layer), self._store.block_size)
        if num_choosing > 1:
            pages = one_head_pages(pages)
        num_rows, num_heads, dim = q_RHD.shape
        rows_and_heads = (num_rows * num_choosing, 1, num_heads // num_choosing)
        q_X1HD = q_RHD.reshape(*rows_and_heads, dim)
        found = [exact_decode(geometry)(q_X1HD, pages, exact, asked)]
        if encoded_rows is not None:
            packed = self.packed(layer, codec)
            assert packed is not None, "asked for what is not served"
            if num_choosing == 1:
                found.append(packed.decode(q_X1HD, encoded_rows, asked))
            elif isinstance(packed, LatentCache):
                whole_X1HD = q_RHD.repeat_interleave(num_choosing, dim=0)[:, None]
                whole = packed.decode(whole_X1HD, encoded_rows, asked)
                found.append(RowPartial(*(_own_heads(x, num_choosing) for x in whole)))
            else:
                found.append(packed.one_head().decode(q_X1HD, encoded_rows, asked))
        shape = (num_rows, num_heads)
        return [
            Partial(each.out_RTHD.reshape(*shape, -1), each.lse_RTH.reshape(shape))
            for each in found
        ]

    def attend_chosen(
        self,
        layer: int,
        q_RHD: Tensor,
        num_choosing: int,
        exact: PagedRows,
        encoded: tuple[str, PagedRows | None],
        sinks_H: Tensor | None,
    ) -> Tensor:
        """out_RHD of the same, in q's dtype."""
        found = self.chosen_partials(layer, q_RHD, num_choosing, exact, encoded)
        partials = [PartialAttention(*each) for each in found]
        return merge(partials, sinks_H=sinks_H, out_dtype=q_RHD.dtype).out_THD

    def packed(self, layer: int, codec: str) -> PackedPages | LatentCache | None:
        """A layer's blocks of this codec for kernels; None: there is none that reads them."""
        key = (layer, codec)
        if key not in self._pages:
            self._pages[key] = self._find_packed(layer, codec)
        return self._pages[key]

    def _find_packed(self, layer: int, codec: str) -> PackedPages | LatentCache | None:
        found = packed_pages(
            self._store.layer_codec(layer, codec),
            self._store.encoded_planes(layer, codec),
            self._spec.layers[layer],
            self._store.block_size,
        )
        known = [pages for (_, other), pages in self._pages.items() if other == codec]
        is_first = all(pages is not None for pages in known)
        if found is None and is_first:
            _log.warning("codec_without_kernel", policy=codec, layer=layer, reason="read in torch")
        return found


def _is_absorbed(layer: LayerGeometry) -> bool:
    """Whether all query heads share one key, whose first numbers are the value."""
    return layer.values_in_keys and layer.num_kv_heads == 1


def exact_decode(layer: LayerGeometry) -> Callable[..., RowPartial]:
    """The kernel over exact pages of the layer."""
    return decode_absorbed if _is_absorbed(layer) else decode


def widest_head(layer: LayerGeometry) -> int:
    """That a kernel of decode takes in the layer."""
    return MAX_ABSORBED_DIM if _is_absorbed(layer) else MAX_HEAD_DIM


def _own_heads(x_X1H: Tensor, num_choosing: int) -> Tensor:
    """Of rows of all query heads, one for each head that chooses, the heads that it chose for."""
    num_rows = len(x_X1H) // num_choosing
    x_RGGH = x_X1H.reshape(num_rows, num_choosing, num_choosing, -1, *x_X1H.shape[3:])
    return x_RGGH.diagonal(dim1=1, dim2=2).movedim(-1, 1)


def _in_line(found: RowPartial) -> Partial:
    """Rows have one token each."""
    return Partial(found.out_RTHD.flatten(0, 1), found.lse_RTH.flatten(0, 1))
