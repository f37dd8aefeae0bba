"""Codes of 8, 4, 3 and 2 bits in whole bytes, along the last axis.

A code is cut into fields of 8, 4, 2 or 1 bits, one plane each, least significant first: only a
3-bit code needs two (2 + 1). In a plane of w-bit fields over N codes, byte j holds the fields of
codes j, j + n, j + 2n, ..., where n = N * w / 8, the first in its lowest bits. So a kernel gets
runs of neighbours from one shift and mask, and never interleaves: for 4 bits the low nibbles are
the first half of the axis and the high nibbles the second.

Codes of 8 bits are stored as int8, code - 128, which integer tensor cores multiply as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcluster.codec.array import Plane
from kvcluster.codec.checks import check_multiple, check_one_of

_FIELDS = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}

CODE_BITS = tuple(_FIELDS)
"""The code widths that can be packed."""


def code_planes(shape: tuple[int, ...], bits: int) -> tuple[Plane, ...]:
    """Planes of codes of this shape, packed along its last axis: `codes4`, or `codes2` and
    `codes1` for 3 bits. Raises: ValueError where the axis does not fill whole bytes."""
    check_one_of("bits", bits, CODE_BITS)
    for width in _FIELDS[bits]:
        check_multiple("the axis that codes are packed along", shape[-1], 8 // width)
    return tuple(
        Plane(
            f"codes{width}",
            (*shape[:-1], shape[-1] * width // 8),
            torch.int8 if width == 8 else torch.uint8,
        )
        for width in _FIELDS[bits]
    )


def num_code_planes(bits: int) -> int:
    return len(_FIELDS[bits])


def pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Contiguous planes of uint8 codes below 2 ** bits."""
    planes = []
    shift = 0
    for width in _FIELDS[bits]:
        planes.append(_pack_field((codes >> shift) & ((1 << width) - 1), width))
        shift += width
    return tuple(planes)


def unpack(planes: Sequence[Tensor], bits: int) -> Tensor:
    """The uint8 codes that `pack` was given, contiguous; planes may have any layout."""
    low, *rest = planes
    codes = _unpack_field(low, _FIELDS[bits][0])
    shift = _FIELDS[bits][0]
    for plane, width in zip(rest, _FIELDS[bits][1:], strict=True):
        codes |= _unpack_field(plane, width) << shift
        shift += width
    return codes


def _pack_field(field: Tensor, width: int) -> Tensor:
    if width == 8:
        return (field ^ 0x80).view(torch.int8).contiguous()
    first, *rest = field.chunk(8 // width, dim=-1)
    packed = first.clone(memory_format=torch.contiguous_format)
    for part_index, part in enumerate(rest, start=1):
        packed |= part << (part_index * width)
    return packed


def _unpack_field(plane: Tensor, width: int) -> Tensor:
    if width == 8:
        return plane.contiguous().view(torch.uint8) ^ 0x80
    mask = (1 << width) - 1
    last = 8 - width
    fields = [(plane >> shift) & mask for shift in range(0, last, width)]
    return torch.cat([*fields, plane >> last], dim=-1)
