"""Array codecs `JoinedKeys` and `JoinedValues`: one latent for several layers.

Neighbouring layers have keys in common: xKV (Chang et al. 2025, arXiv 2503.18893) finds one basis
for a group of them. Here the keys (or the values) of a token in the layers of a group, all heads
side by side, layer after layer, are projected as one vector on the leading directions that
calibration found for the group. It is `LatentKeys` (or `LatentValues`) of a layer that has the
heads of all of them: `Member.whole`, which is also how blocks are written.

The first layer of a group holds the planes, and the others hold none. Each layer reads them all
and restores its own heads with its own columns of `up`.

A block can be written only when all layers of the group have computed it: see
`cache/exact_region.py` for what follows from that.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension, F = K * D, C latent
dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor

from kvcluster.codec.array import ArrayCodec
from kvcluster.codec.basis import Basis
from kvcluster.codec.latent import LatentKeys, LatentStorage, LatentValues, Rotation
from kvcluster.types import LayerGeometry


@dataclass(frozen=True, slots=True)
class Member:
    """A layer's place among those that share a latent."""

    whole: ArrayCodec
    """Writes the blocks of all of them: their heads side by side, [B, layers * K, S, D]."""
    place: int
    num_layers: int


class JoinedValues(LatentValues):
    """One layer's values in a latent of several: read like a latent of its own."""

    def __init__(
        self, member: Member, own: Basis, *, num_heads: int, rank: int, storage: LatentStorage
    ) -> None:
        """`own`: the layer's part of the group's basis."""
        super().__init__(own, num_heads=num_heads, rank=rank, storage=storage)
        self.member = member

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> NoReturn:  # noqa: ARG002
        _refuse_alone(self.member)


class JoinedKeys(LatentKeys):
    """One layer's keys in a latent of several, likewise."""

    def __init__(
        self,
        member: Member,
        own: Basis,
        *,
        num_heads: int,
        rank: int,
        rotation: Rotation | None,
        storage: LatentStorage,
    ) -> None:
        super().__init__(own, num_heads=num_heads, rank=rank, rotation=rotation, storage=storage)
        self.member = member

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> NoReturn:  # noqa: ARG002
        _refuse_alone(self.member)


def _refuse_alone(member: Member) -> NoReturn:
    raise ValueError(
        f"blocks of {member.num_layers} layers are written together, by `encode_together`"
    )


Joined: TypeAlias = JoinedKeys | JoinedValues


def member_of(codec: ArrayCodec) -> Member | None:
    """The layer's place in its group; None for a codec of one layer."""
    return codec.member if isinstance(codec, Joined) else None


def holds_planes(codec: ArrayCodec) -> bool:
    """Whether the layer stores its planes: the first one of a group does so for all."""
    member = member_of(codec)
    return member is None or member.place == 0


def layer_groups(layers: Sequence[LayerGeometry], size: int) -> tuple[range, ...]:
    """All layers in groups of neighbours that are of one shape, window and scale: `size` of them
    each, fewer at the end of such a run."""
    groups: list[range] = []
    for index, layer in enumerate(layers):
        last = groups[-1] if groups else range(0)
        if 0 < len(last) < size and layers[last[-1]] == layer:
            groups[-1] = range(last.start, index + 1)
        else:
            groups.append(range(index, index + 1))
    return tuple(groups)


def joined_keys(
    basis: Basis,
    *,
    num_heads: int,
    rank: int,
    rotations: Sequence[Rotation | None],
    storage: LatentStorage,
) -> list[JoinedKeys]:
    """The codec of each layer of a group, in their order. `num_heads` of one layer, `rotations` of
    all; `basis` is the group's, on the device of the blocks."""
    num_layers = len(rotations)
    whole = LatentKeys(
        basis,
        num_heads=num_layers * num_heads,
        rank=rank,
        rotation=None if all(r is None for r in rotations) else _SideBySide(rotations),
        storage=storage,
    )
    return [
        JoinedKeys(
            Member(whole, place, num_layers),
            own,
            num_heads=num_heads,
            rank=rank,
            rotation=rotation,
            storage=storage,
        )
        for place, (own, rotation) in enumerate(
            zip(_parts(basis, num_layers), rotations, strict=True)
        )
    ]


def joined_values(
    basis: Basis, num_layers: int, *, num_heads: int, rank: int, storage: LatentStorage
) -> list[JoinedValues]:
    """The same for values."""
    whole = LatentValues(basis, num_heads=num_layers * num_heads, rank=rank, storage=storage)
    return [
        JoinedValues(
            Member(whole, place, num_layers), own, num_heads=num_heads, rank=rank, storage=storage
        )
        for place, own in enumerate(_parts(basis, num_layers))
    ]


def encode_together(
    codecs: Sequence[Sequence[ArrayCodec]],
    blocks: Sequence[Sequence[Tensor]],
    positions_BS: Tensor,
) -> list[tuple[Tensor, ...]]:
    """The planes that each of some layers holds, those of the keys first. The layers are a group,
    or one alone; `codecs` and `blocks` have one entry for each: the codecs of its keys and its
    values, and x_BKSD of its keys and, unless they are part of the keys, of its values."""
    held: list[list[Tensor]] = [[] for _ in codecs]
    for array in range(len(blocks[0])):
        of_array = [layer[array] for layer in codecs]
        x_BKSD = [arrays[array] for arrays in blocks]
        member = member_of(of_array[0])
        if member is not None:
            held[0] += member.whole.encode(torch.cat(x_BKSD, dim=1), positions_BS)
            continue
        for planes, codec, own_BKSD in zip(held, of_array, x_BKSD, strict=True):
            planes += codec.encode(own_BKSD, positions_BS)
    return [tuple(planes) for planes in held]


def _parts(basis: Basis, num_layers: int) -> list[Basis]:
    """Each layer's rows of `down` and columns of `up`; views."""
    parts = (
        x.chunk(num_layers, dim)
        for x, dim in ((basis.mean_F, 0), (basis.down_FC, 0), (basis.up_CF, 1))
    )
    return [
        Basis(mean_F=mean_F, down_FC=down_FC, up_CF=up_CF, spectrum_F=basis.spectrum_F)
        for mean_F, down_FC, up_CF in zip(*parts, strict=True)
    ]


class _SideBySide:
    """The rotation of the heads of several layers, layer after layer."""

    def __init__(self, rotations: Sequence[Rotation | None]) -> None:
        self._rotations = rotations

    def apply(self, x_BKSD: Tensor, positions_BS: Tensor) -> Tensor:
        parts = zip(self._rotations, x_BKSD.chunk(len(self._rotations), dim=1), strict=True)
        return torch.cat(
            [own.float() if r is None else r.apply(own, positions_BS) for r, own in parts], dim=1
        )

    def undo(self, x_BKSD: Tensor, positions_BS: Tensor) -> Tensor:
        parts = zip(self._rotations, x_BKSD.chunk(len(self._rotations), dim=1), strict=True)
        return torch.cat(
            [own.float() if r is None else r.undo(own, positions_BS) for r, own in parts], dim=1
        )
