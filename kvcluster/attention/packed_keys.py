"""Which decode kernel reads the encoded blocks of a layer, and with what.

Shape letters: R rows, T query tokens of a row, H query heads, D head dimension; those of
`kvcluster_kernels.paging` for planes.
"""

from collections.abc import Callable, Sequence

import torch
from kvcluster_kernels.float8_decode import Float8Pages, decode_float8
from kvcluster_kernels.integer_decode import BITS as INTEGER_BITS
from kvcluster_kernels.integer_decode import IntegerPages, decode_integers
from kvcluster_kernels.levels import BITS as LEVEL_BITS
from kvcluster_kernels.paging import Attention, PagedRows, Partial
from kvcluster_kernels.rotated_decode import RotatedPages, decode_rotated
from torch import Tensor

from kvcluster.codec.float8 import Float8
from kvcluster.codec.method import LayerCodec
from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from kvcluster.codec.rotated import Rotated, rotate
from kvcluster.types import LayerGeometry

ReadPacked = Callable[[Tensor, PagedRows, Attention], Partial]
"""Attention of q_RTHD over the rows' blocks of one layer."""

_LEAST = 16
"""Of what a matrix product sums over, and of the bytes of a row of codes."""


def packed_reader(
    codec: LayerCodec,
    planes: tuple[Sequence[Tensor], Sequence[Tensor]],
    geometry: LayerGeometry,
    block_size: int,
) -> ReadPacked | None:
    """A launch of the kernel for blocks written so, whose planes of keys and values (those of a
    whole pool) these are; None: there is no such kernel."""
    if geometry.values_in_keys or block_size < _LEAST:
        return None
    keys, values = codec
    if isinstance(keys, Float8) and isinstance(values, Float8):
        return _float8(keys, values, planes)
    if isinstance(keys, ChannelQuantizer) and isinstance(values, TokenQuantizer):
        return _integers(keys, values, planes, geometry, block_size)
    if isinstance(keys, Rotated) and isinstance(values, Rotated):
        return _rotated(keys, values, planes, geometry, block_size)
    return None


def _float8(
    keys: Float8, values: Float8, planes: tuple[Sequence[Tensor], Sequence[Tensor]]
) -> ReadPacked | None:
    if keys.transposed or not values.transposed:
        return None
    k, v = Float8Pages(*planes[0]), Float8Pages(*planes[1])
    return lambda q_RTHD, rows, attention: decode_float8(q_RTHD, k, v, rows, attention)


def _integers(
    keys: ChannelQuantizer,
    values: TokenQuantizer,
    planes: tuple[Sequence[Tensor], Sequence[Tensor]],
    geometry: LayerGeometry,
    block_size: int,
) -> ReadPacked | None:
    key_bytes = geometry.key_dim * keys.bits // 8
    value_bytes = block_size * values.bits // 8
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
    k, v = IntegerPages(*planes[0]), IntegerPages(*planes[1])
    return lambda q_RTHD, rows, attention: decode_integers(q_RTHD, k, v, rows, attention)


def _rotated(
    keys: Rotated,
    values: Rotated,
    planes: tuple[Sequence[Tensor], Sequence[Tensor]],
    geometry: LayerGeometry,
    block_size: int,
) -> ReadPacked | None:
    dim = geometry.key_dim
    is_served = (
        keys.bits == values.bits
        and keys.bits in LEVEL_BITS
        and values.transposed
        and not keys.transposed
        and not values.centred
        and geometry.value_dim == dim
        and min(dim, block_size) * keys.bits // 8 >= _LEAST
    )
    if not is_served:
        return None
    k, v = RotatedPages(*planes[0]), RotatedPages(*planes[1])
    rotation_DD = rotate(torch.eye(dim, device=k.codes.device)).T.contiguous()
    return lambda q_RTHD, rows, attention: decode_rotated(
        q_RTHD, k, v, rotation_DD, rows, attention
    )


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
