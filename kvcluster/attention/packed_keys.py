"""Which decode kernel reads the encoded blocks of a layer, and with what.

Shape letters: R rows, T query tokens of a row, H query heads, D head dimension; those of
`kvcluster_kernels.paging` for planes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from kvcluster_kernels.block_lists import one_head_planes
from kvcluster_kernels.codes import row_bytes
from kvcluster_kernels.float8_decode import Float8Pages, decode_float8
from kvcluster_kernels.integer_decode import BITS as INTEGER_BITS
from kvcluster_kernels.integer_decode import IntegerPages, decode_integers
from kvcluster_kernels.levels import BITS as LEVEL_BITS
from kvcluster_kernels.mixed_decode import decode_mixed, reason_against
from kvcluster_kernels.packed_history import AnyHistory
from kvcluster_kernels.packed_prefill import History
from kvcluster_kernels.paging import Attention, PagedRows, Partial
from kvcluster_kernels.rotated_decode import RotatedPages, decode_rotated
from kvcluster_kernels.rotated_history import RotatedHistory
from torch import Tensor

from kvcluster.attention.latent_cache import LatentCache, latent_cache
from kvcluster.codec.float8 import Float8
from kvcluster.codec.method import LayerCodec
from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from kvcluster.codec.rotated import Rotated, rotate
from kvcluster.types import LayerGeometry

Pages = IntegerPages | Float8Pages | RotatedPages


class PackedPages(NamedTuple):
    """The encoded blocks of one layer, as kernels take them."""

    keys: Pages
    values: Pages
    """Of the same kind, or rotated ones beside integers."""
    rotation_DD: Tensor | None = None
    """Of rotated vectors."""

    def decode(self, q_RTHD: Tensor, rows: PagedRows, attention: Attention) -> Partial:
        """Attention of a few query tokens of each row over its blocks."""
        k, v = self.keys, self.values
        if isinstance(k, IntegerPages) and isinstance(v, IntegerPages):
            return decode_integers(q_RTHD, k, v, rows, attention)
        if isinstance(k, Float8Pages) and isinstance(v, Float8Pages):
            return decode_float8(q_RTHD, k, v, rows, attention)
        assert isinstance(v, RotatedPages), "values of a kind that is not here"
        assert self.rotation_DD is not None, "rotated vectors without their rotation"
        if isinstance(k, IntegerPages):
            return decode_mixed(q_RTHD, k, v, self.rotation_DD, rows, attention)
        assert isinstance(k, RotatedPages), "keys of a kind that is not here"
        return decode_rotated(q_RTHD, k, v, self.rotation_DD, rows, attention)

    def one_head(self) -> "PackedPages":
        """The same blocks, those of each KV head as blocks of one head (`one_head_planes`)."""
        return self._replace(keys=_one_head(self.keys), values=_one_head(self.values))

    def history(self, blocks_N: Tensor, block_size: int) -> AnyHistory | None:
        """Whole blocks for `prefill_history`; None: it does not read this kind."""
        keys, values, num_keys = self.keys, self.values, len(blocks_N) * block_size
        if isinstance(keys, RotatedPages) and isinstance(values, RotatedPages):
            assert self.rotation_DD is not None, "rotated vectors without their rotation"
            return RotatedHistory(keys, values, self.rotation_DD, blocks_N, num_keys)
        if isinstance(keys, RotatedPages) or isinstance(values, RotatedPages):
            return None
        return History(keys, values, blocks_N, num_keys)


def _one_head(pages: Pages) -> Pages:
    planes = {
        name: one_head_planes(plane) for name, plane in pages._asdict().items() if plane is not None
    }
    return pages._replace(**planes)


_TWO_PLANES = 3
"""Bits of codes that are in two planes."""
_LEAST = 16
"""Of what a matrix product sums over, and of the bytes of a row of codes."""


def packed_pages(
    codec: LayerCodec,
    planes: tuple[Sequence[Tensor], Sequence[Tensor]],
    geometry: LayerGeometry,
    block_size: int,
) -> PackedPages | LatentCache | None:
    """Blocks written so, whose planes of keys and values (those of a whole pool) these are; None:
    there is no kernel for them."""
    if geometry.values_in_keys or block_size < _LEAST:
        return None
    keys, values = codec
    if isinstance(keys, Float8) and isinstance(values, Float8):
        return _float8(keys, values, planes)
    if isinstance(keys, ChannelQuantizer) and isinstance(values, TokenQuantizer):
        return _integers(keys, values, planes, geometry, block_size)
    if isinstance(keys, ChannelQuantizer) and isinstance(values, Rotated):
        return _mixed(keys, values, planes, geometry)
    if isinstance(keys, Rotated) and isinstance(values, Rotated):
        return _rotated(keys, values, planes, geometry, block_size)
    return latent_cache(codec, planes, geometry, block_size)


def _float8(
    keys: Float8, values: Float8, planes: tuple[Sequence[Tensor], Sequence[Tensor]]
) -> PackedPages | None:
    if keys.transposed or not values.transposed:
        return None
    return PackedPages(Float8Pages(*planes[0]), Float8Pages(*planes[1]))


def _integers(
    keys: ChannelQuantizer,
    values: TokenQuantizer,
    planes: tuple[Sequence[Tensor], Sequence[Tensor]],
    geometry: LayerGeometry,
    block_size: int,
) -> PackedPages | None:
    key_bytes = row_bytes(geometry.key_dim, keys.bits)
    value_bytes = row_bytes(block_size, values.bits)
    is_served = (
        keys.bits in INTEGER_BITS
        and values.bits in INTEGER_BITS
        and keys.scale_bits == values.scale_bits
        and min(key_bytes, value_bytes, keys.group, values.group) >= _LEAST
        # Groups are rows of an array in registers, of which there are powers of two.
        and _is_power_of_two(min(values.group, geometry.value_dim))
    )
    if not is_served:
        return None
    k, v = _integer_pages(keys.bits, planes[0]), _integer_pages(values.bits, planes[1])
    return PackedPages(k, v)


def _rotated(
    keys: Rotated,
    values: Rotated,
    planes: tuple[Sequence[Tensor], Sequence[Tensor]],
    geometry: LayerGeometry,
    block_size: int,
) -> PackedPages | None:
    dim = geometry.key_dim
    is_served = (
        keys.bits == values.bits
        and keys.bits in LEVEL_BITS
        and values.transposed
        and not keys.transposed
        and not values.centred
        and geometry.value_dim == dim
        and row_bytes(min(dim, block_size), keys.bits) >= _LEAST
    )
    if not is_served:
        return None
    k, v = _rotated_pages(keys.bits, planes[0]), _rotated_pages(values.bits, planes[1])
    return PackedPages(k, v, rotate(torch.eye(dim, device=k.codes.device)).T.contiguous())


def _mixed(
    keys: ChannelQuantizer,
    values: Rotated,
    planes: tuple[Sequence[Tensor], Sequence[Tensor]],
    geometry: LayerGeometry,
) -> PackedPages | None:
    if not values.transposed or values.centred or keys.bits not in INTEGER_BITS:
        return None
    k, v = _integer_pages(keys.bits, planes[0]), _rotated_pages(values.bits, planes[1])
    if values.bits not in LEVEL_BITS or reason_against(k, v, geometry.key_dim) is not None:
        return None
    rotation_DD = rotate(torch.eye(geometry.value_dim, device=v.codes.device)).T.contiguous()
    return PackedPages(k, v, rotation_DD)


def _integer_pages(bits: int, planes: Sequence[Tensor]) -> IntegerPages:
    if bits != _TWO_PLANES:
        return IntegerPages(*planes)
    codes, high, scale, zero, *unit = planes
    return IntegerPages(codes, scale, zero, unit[0] if unit else None, high)


def _rotated_pages(bits: int, planes: Sequence[Tensor]) -> RotatedPages:
    if bits != _TWO_PLANES:
        return RotatedPages(*planes)
    codes, high, scale, *mean = planes
    return RotatedPages(codes, scale, mean[0] if mean else None, high)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
