"""How a rank computes attention over keys that lie on it: in torch, or in kernels of its GPU.

Shape letters: T query tokens, S keys, R rows of decode, J query blocks, B blocks, G heads that
choose, H query heads, K KV heads, D head dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from kvcluster.attention import local, partial
from kvcluster.attention.part import SequencePart
from kvcluster.attention.partial import Partial
from kvcluster.attention.selected_part import RankBlocks, SelectedPart
from kvcluster.cache.store import KVStore, Piece
from kvcluster.selection.base import KeySummaries
from kvcluster.types import LayerGeometry


class RowAttention(Protocol):
    """Single rows of sequences over what this rank keeps of them, all rows in one go."""

    def begin_step(self) -> None:
        """Forget what is known of the parts of the step before."""
        ...

    def serves(self, layer: int, part: SequencePart) -> bool:
        """Whether the row of this part may be among those of a call."""
        ...

    def attend(self, layer: int, parts: Sequence[SequencePart], q_RHD: Tensor) -> Partial:
        """Row r is that of part r, over the part's history on this rank, which may be nothing."""
        ...

    def attend_full(self, layer: int, part: SequencePart, q_1HD: Tensor) -> Partial | None:
        """One row over the part's `full_blocks`, once they are encoded. None: they are to be read
        otherwise."""
        ...


class ChosenAttention(Protocol):
    """Rows that choose which blocks they read. `selected` defines what each method gives."""

    def scores(
        self, geometry: LayerGeometry, part: SelectedPart, q_THD: Tensor, keys: KeySummaries
    ) -> Tensor | None:
        """score_GJB of blocks for the query blocks of the part's rows (`BlockSelection.scores`).
        None: they are to be computed as they are defined."""
        ...

    def attend(
        self,
        layer: int,
        part: SelectedPart,
        blocks: RankBlocks,
        q_THD: Tensor,
        score_GJB: Tensor,
    ) -> Partial | None:
        """All rows of the part over what they read of these blocks, those of this rank, by the
        scores of all of the sequence's. None: tile by tile, as it is defined."""
        ...


class SwitchingKeys(NamedTuple):
    """Keys of which a row reads the latest as they are, and those before as a codec gives them."""

    near: Piece
    """As they are, k_KSD and v_KSD."""
    read: Piece
    """The same keys as they are read later."""
    block_size: int
    lag: int
    """A row in block j reads the blocks from j - lag on as they are. Key 0 begins a block."""


class Implementation(Protocol):
    """Attention over keys of one rank. The functions of `local` define what each method gives."""

    @property
    def rows(self) -> RowAttention | None:
        """Rows of decode; None: each is read by itself."""
        ...

    @property
    def chosen(self) -> ChosenAttention | None:
        """Of rows that choose their blocks; None: tile by tile, as it is defined."""
        ...

    def attend(
        self,
        q_THD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        layer: LayerGeometry,
        mask_TS: Tensor | None = None,
    ) -> Partial:
        """`local.attend`."""
        ...

    def attend_causal(
        self, q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, layer: LayerGeometry, first: int
    ) -> Partial:
        """`local.attend_causal`."""
        ...

    def attend_earlier(
        self, q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, layer: LayerGeometry, *, gap: int
    ) -> Partial:
        """`local.attend_earlier`."""
        ...

    def attend_pages(self, layer: int, part: SequencePart, q_THD: Tensor) -> Partial | None:
        """Rows of a chunk over all of its history on this rank, where that lies. None: it is to be
        gathered."""
        ...

    def attend_switching(
        self, q_THD: Tensor, keys: SwitchingKeys, layer: LayerGeometry, first: int
    ) -> Partial | None:
        """Query row t is key `first + t` and sees no later one. None: it is to be asked block by
        block."""
        ...

    def attention_sums(
        self, q_THD: Tensor, k_KSD: Tensor, layer: LayerGeometry, first: int
    ) -> Tensor | None:
        """sums_KS: how much attention each key gets from query rows of which row t is key
        `first + t` and sees no later one. None: that is to be computed otherwise."""
        ...

    def merge(self, *partials: Partial) -> Partial:
        """`partial.merge`."""
        ...

    def encode(self, layer: int, codec: str, encoded_ids_B: Tensor, kv_BKSD: Piece) -> bool:
        """`KVStore.encode` of blocks of one layer, if this is offered. Says whether it is done."""
        ...

    def restored(self, layer: int, codec: str, encoded_ids_B: Tensor) -> Piece | None:
        """k_KSD and v_KSD of encoded blocks, as `KVStore.decode` gives them. None: they are to be
        decoded there."""
        ...


class PlainAttention:
    """The functions of `local` themselves, on any device."""

    rows: RowAttention | None = None
    chosen: ChosenAttention | None = None
    attend = staticmethod(local.attend)
    attend_causal = staticmethod(local.attend_causal)
    attend_earlier = staticmethod(local.attend_earlier)
    merge = staticmethod(partial.merge)

    def encode(
        self,
        layer: int,  # noqa: ARG002
        codec: str,  # noqa: ARG002
        encoded_ids_B: Tensor,  # noqa: ARG002
        kv_BKSD: Piece,  # noqa: ARG002
    ) -> bool:
        return False

    def restored(
        self,
        layer: int,  # noqa: ARG002
        codec: str,  # noqa: ARG002
        encoded_ids_B: Tensor,  # noqa: ARG002
    ) -> Piece | None:
        return None

    def attend_pages(
        self,
        layer: int,  # noqa: ARG002
        part: SequencePart,  # noqa: ARG002
        q_THD: Tensor,  # noqa: ARG002
    ) -> Partial | None:
        return None

    def attention_sums(
        self,
        q_THD: Tensor,  # noqa: ARG002
        k_KSD: Tensor,  # noqa: ARG002
        layer: LayerGeometry,  # noqa: ARG002
        first: int,  # noqa: ARG002
    ) -> Tensor | None:
        return None

    def attend_switching(
        self,
        q_THD: Tensor,  # noqa: ARG002
        keys: SwitchingKeys,  # noqa: ARG002
        layer: LayerGeometry,  # noqa: ARG002
        first: int,  # noqa: ARG002
    ) -> Partial | None:
        return None


def implementation_for(store: KVStore) -> Implementation:
    """The fastest there is where this cache lies."""
    if store.device.type != "cuda":
        return PlainAttention()
    # Only here: kernels want Triton, which a machine without a GPU need not have.
    from kvcluster.attention.kernel_attention import KernelAttention

    return KernelAttention(store)
