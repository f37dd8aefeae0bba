"""Rows that choose their blocks, by kernels that pick blocks and read lists of them.

What `selected` does tile by tile is the definition. Rows that choose alone, as those of the output
do, are rows of decode whose block tables are what they chose; heads that choose for themselves are
rows of their own. Rows of the prompt are tiles of prefill with lists. Only what a tile reads as a
codec gives it is restored first, a workspace at a time.

Shape letters: T rows, J query blocks, R rows that choose alone, B blocks, G heads that choose, K KV
heads, H query heads, D head dimension, X rows of kernels.
"""

from collections.abc import Collection, Iterator
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from kvcluster_kernels.block_bounds import largest_bounds
from kvcluster_kernels.chosen_blocks import (
    ALWAYS,
    ENCODED,
    EXACT,
    FREE,
    Candidates,
    lists,
    pick,
    row_tables,
)
from kvcluster_kernels.chosen_history import prefill_chosen
from kvcluster_kernels.packed_history import AnyHistory
from kvcluster_kernels.prefill_arguments import Causal, Keys
from kvcluster_kernels.sparse_prefill import TileBlocks, sparse_prefill
from torch import Tensor

from kvcluster.attention.chosen_reasons import SURVIVORS, reason_against
from kvcluster.attention.kernel_rows import KernelRows, Merge
from kvcluster.attention.latent_cache import LatentCache
from kvcluster.attention.partial import Partial, concatenate
from kvcluster.attention.selected_part import RankBlocks, SelectedPart
from kvcluster.cache.store import KVStore, in_blocks, keys_and_values
from kvcluster.codec.array import consecutive
from kvcluster.log import get_logger
from kvcluster.selection.base import KeySummaries
from kvcluster.selection.quest import Quest
from kvcluster.types import EXACT as EXACT_CODEC
from kvcluster.types import LayerGeometry

_WORKSPACE_BYTES: Final = 1 << 30
"""Of keys and values restored at a time."""
_ROWS: Final = 64
"""That are decoded at a time: each has tables as long as its sequence."""

_log = get_logger(__name__)


class PartBlocks(NamedTuple):
    """What the blocks of a sequence are to a part's rows; the same for all layers."""

    flags_JB: Tensor
    num_J: Tensor | None
    left_J: Tensor
    """int32: tokens of a query block's own block behind its last row, where that block is here."""
    exact_ids_B: Tensor
    encoded_ids_B: Tensor | None
    num_tiles: int
    """Query blocks of the prompt; the others are single rows."""
    num_tile_rows: int

    @property
    def candidates(self) -> Candidates:
        return Candidates(self.flags_JB, self.num_J)


class KernelSelected:
    """A `ChosenAttention` over the cache of one rank."""

    def __init__(
        self, store: KVStore, rows: KernelRows, merge: Merge, dtypes: Collection[torch.dtype]
    ) -> None:
        """`merge`: as `partial.merge`. `dtypes`: of the queries that go to kernels."""
        self._store = store
        self._spec = store.spec
        self._rows = rows
        self._merge = merge
        self._dtypes = dtypes
        self._blocks: WeakKeyDictionary[SelectedPart, PartBlocks] = WeakKeyDictionary()
        self._told: set[str] = set()

    def scores(
        self, geometry: LayerGeometry, part: SelectedPart, q_THD: Tensor, keys: KeySummaries
    ) -> Tensor | None:
        selection = part.selecting.selection
        is_each_alone = len(part.query_blocks.own_J) == len(q_THD)
        if not isinstance(selection, Quest) or not is_each_alone:
            return None
        return largest_bounds(q_THD, keys.low_KBD, keys.high_KBD, geometry.scale)

    def attend(
        self,
        layer: int,
        part: SelectedPart,
        blocks: RankBlocks,
        q_THD: Tensor,
        score_GJS: Tensor,
    ) -> Partial | None:
        reason = self._reason_against(layer, part, q_THD)
        if reason is not None:
            if reason not in self._told:
                self._told.add(reason)
                name = part.selecting.selection.name
                _log.warning("selection_without_kernel", selection=name, reason=reason)
            return None
        found = self._blocks.get(part)
        if found is None:
            found = self._blocks[part] = part_blocks(part, blocks)
        worth_GJB = score_GJS
        if found.num_J is None:
            worth_GJB = part.selecting.selection.choose(
                layer, part.query_blocks, part.readable_blocks, score_GJS
            )
        partials = []
        if found.num_tiles:
            tiles = slice(found.num_tiles)
            q_rows = q_THD[: found.num_tile_rows]
            partials.append(self._attend_tiles(layer, part, found, q_rows, worth_GJB[:, tiles]))
        for first in range(found.num_tile_rows, len(q_THD), _ROWS):
            q_rows = q_THD[first : first + _ROWS]
            start = first - found.num_tile_rows + found.num_tiles
            rows = slice(start, start + len(q_rows))
            partials.append(self._attend_rows(layer, part, found, q_rows, worth_GJB, rows))
        return concatenate(partials)

    def _reason_against(self, layer: int, part: SelectedPart, q_THD: Tensor) -> str | None:
        if q_THD.dtype not in self._dtypes:
            return f"queries are {q_THD.dtype}"
        if type(part) is not SelectedPart:
            return SURVIVORS
        codec, num_prompt = part.part.codec, part.num_prompt_rows
        is_read = codec == EXACT_CODEC or self._rows.packed(layer, codec) is not None
        return reason_against(
            self._spec.layers[layer],
            block_size=part.part.block_size,
            num_blocks=part.num_blocks,
            has_tiles=num_prompt > 0,
            has_rows=num_prompt < part.part.num_tokens,
            unread_codec=None if is_read else codec,
        )

    def _attend_rows(
        self,
        layer: int,
        part: SelectedPart,
        blocks: PartBlocks,
        q_RHD: Tensor,
        worth_GJB: Tensor,
        rows: slice,
    ) -> Partial:
        """Rows that choose alone, over what they read here."""
        num_choosing, codec = len(worth_GJB), part.part.codec
        num_J = None if blocks.num_J is None else blocks.num_J[rows]
        exact_rows, encoded_rows = row_tables(
            worth_GJB[:, rows],
            Candidates(blocks.flags_JB[rows], num_J),
            blocks.left_J[rows],
            self._rows.chosen_pools(
                layer, codec, (blocks.exact_ids_B, blocks.encoded_ids_B), num_choosing
            ),
        )
        return self._merge(
            *self._rows.chosen_partials(
                layer, q_RHD, num_choosing, exact_rows, (codec, encoded_rows)
            )
        )

    def _attend_tiles(
        self,
        layer: int,
        part: SelectedPart,
        blocks: PartBlocks,
        q_THD: Tensor,
        worth_GJB: Tensor,
    ) -> Partial:
        """Rows of the prompt, over what they read here."""
        geometry, size = self._spec.layers[layer], self._store.block_size
        flags_JB, reads_GJB = blocks.flags_JB[: blocks.num_tiles], worth_GJB
        if blocks.num_J is not None:
            num_J = blocks.num_J[: blocks.num_tiles]
            reads_GJB = pick(worth_GJB, Candidates(flags_JB, num_J))
        start = part.part.start
        keys = Keys(*self._store.planes(layer), start + len(q_THD), blocks.exact_ids_B, size)
        partials = [
            Partial(
                *sparse_prefill(
                    q_THD,
                    keys,
                    TileBlocks(*lists(reads_GJB, flags_JB, EXACT), size, size),
                    scale=geometry.scale,
                    causal=Causal(start),
                    softcap=geometry.softcap,
                )
            )
        ]
        if blocks.encoded_ids_B is not None:
            is_far_JB = (flags_JB & ENCODED).bool()
            far_B = (reads_GJB & is_far_JB).any(dim=0).any(dim=0).nonzero()[:, 0]
            for piece_B in self._pieces(geometry, far_B):
                chosen = TileBlocks(
                    *lists(reads_GJB[:, :, piece_B], flags_JB[:, piece_B], ENCODED), size, size
                )
                history = self._restorable(layer, part, blocks, piece_B)
                found = prefill_chosen(
                    q_THD, history, chosen, scale=geometry.scale, softcap=geometry.softcap
                )
                partials.append(Partial(*found))
        return self._merge(*partials)

    def _pieces(self, geometry: LayerGeometry, blocks_B: Tensor) -> Iterator[Tensor]:
        """So many at a time as the workspace holds restored."""
        numbers = geometry.num_kv_heads * (geometry.key_dim + geometry.value_dim)
        block_bytes = self._store.block_size * numbers * self._store.planes(0).k_PKSD.element_size()
        if len(blocks_B):
            yield from torch.split(blocks_B, max(1, _WORKSPACE_BYTES // block_bytes))

    def _restorable(
        self, layer: int, part: SelectedPart, blocks: PartBlocks, numbers_B: Tensor
    ) -> AnyHistory | Keys:
        """Encoded blocks, for a kernel to restore; restored already where there is none."""
        assert blocks.encoded_ids_B is not None, "asked for what is not there"
        geometry, size = self._spec.layers[layer], self._store.block_size
        packed = self._rows.packed(layer, part.part.codec)
        ids_B = blocks.encoded_ids_B[numbers_B]
        history: AnyHistory | None = None
        if isinstance(packed, LatentCache):
            history = packed.history(ids_B, (numbers_B * size).int(), geometry)
        elif packed is not None:
            history = packed.history(ids_B, size)
        if history is not None:
            return history
        planes = self._store.read_encoded(layer, part.part.codec, ids_B.long())
        positions_BS = consecutive(numbers_B * size, size)
        arrays = self._store.decode(layer, part.part.codec, planes, positions_BS)
        k_BKSD, v_BKSD = keys_and_values([in_blocks(x, size) for x in arrays], geometry)
        places_B = torch.arange(len(numbers_B), dtype=torch.int32, device=numbers_B.device)
        return Keys(k_BKSD, v_BKSD, len(numbers_B) * size, places_B, size)


def part_blocks(part: SelectedPart, blocks: RankBlocks) -> PartBlocks:
    """What these blocks, those of this rank, are to the part's rows."""
    own_J, readable_JB = part.query_blocks.own_J, part.readable_blocks
    size, device = part.part.block_size, own_J.device
    num_blocks = readable_JB.shape[1]
    numbers_B = torch.arange(num_blocks, device=device)
    ids_B = torch.zeros(2, num_blocks, dtype=torch.int32, device=device)
    ids_B[0, blocks.blocks_B] = blocks.exact_ids_B.int()
    ids_B[1, blocks.blocks_B] = blocks.encoded_ids_B.int()
    is_here_B = torch.zeros(num_blocks, dtype=torch.bool, device=device)
    is_here_B[blocks.blocks_B] = True
    is_own_JB = numbers_B == own_J[:, None]
    is_exact_JB = (part.exact_blocks() | is_own_JB) & is_here_B & readable_JB
    is_encoded_JB = ~is_exact_JB & is_here_B & readable_JB
    flags_JB = is_exact_JB * EXACT + is_encoded_JB * ENCODED
    ranking = part.selecting.selection.ranking(part.query_blocks, readable_JB)
    if ranking is not None:
        flags_JB = flags_JB + torch.where(ranking.always_JB, ALWAYS, readable_JB * FREE)
    last_J = part.part.start + part.query_blocks.num_rows_J.cumsum(0) - 1
    left_J = (size - 1 - last_J % size) * (is_own_JB & is_here_B).any(dim=1)
    num_tile_rows = part.num_prompt_rows
    return PartBlocks(
        flags_JB.to(torch.uint8),
        None if ranking is None else ranking.num_J.int(),
        left_J.int(),
        ids_B[0],
        None if part.part.codec == EXACT_CODEC else ids_B[1],
        len(own_J) - (part.part.num_tokens - num_tile_rows),
        num_tile_rows,
    )
