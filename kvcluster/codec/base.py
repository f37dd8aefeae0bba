"""The protocol of a codec: how kept tokens are written. One file per codec, one registry line.

Shape letters: T tokens written, S tokens read, K KV heads, D head dimension.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from kvcluster.types import LayerGeometry


class KVShape(NamedTuple):
    """Shape of one layer's pool on one rank."""

    geometry: LayerGeometry
    num_blocks: int
    block_size: int


class EncodedKV(NamedTuple):
    """Stored tokens of one layer, as a codec wrote them: what is kept, sent and moved.

    Every plane is [KV head, slot, ...]: any run of slots is a view, and a head's slots lie
    together, which is how attention reads them.
    """

    planes: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.planes[0].shape[1])

    @property
    def num_bytes(self) -> int:
        return sum(plane.numel() * plane.element_size() for plane in self.planes)

    def slice(self, start: int, end: int) -> "EncodedKV":
        """A view of slots [start, end)."""
        return EncodedKV(tuple(plane[:, start:end] for plane in self.planes))

    def take(self, slots_T: Tensor) -> "EncodedKV":
        """A copy of the slots, in the given order."""
        return EncodedKV(tuple(plane.index_select(1, slots_T) for plane in self.planes))


class Codec(Protocol):
    """How the numbers of a kept token are stored. Stateless; all state is in the planes."""

    name: str

    def bytes_per_token(self, geometry: LayerGeometry, bytes_per_element: int) -> float:
        """Stored bytes of one token in one layer, scales and padding included."""
        ...

    def allocate(self, shape: KVShape, like: Tensor) -> EncodedKV:
        """Zeroed planes of `shape.num_blocks * shape.block_size` slots, on `like`'s device."""
        ...

    def encode(self, pool: EncodedKV, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Write tokens into the slots of `pool`, in place."""
        ...

    def restore(self, encoded: EncodedKV) -> tuple[Tensor, Tensor]:
        """k_KSD and v_KSD as attention reads them; views where nothing has to be computed."""
        ...
