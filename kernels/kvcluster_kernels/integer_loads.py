"""What tiles of encoded blocks hold: codes as fields of bytes, levels, scales and zero-points.

Shape letters: I rows, C bytes of a row of codes.
"""

import triton
import triton.language as tl

from kvcluster_kernels.codes import unpack, unpack3
from kvcluster_kernels.levels import unpack_levels, unpack_levels3

SCALE_UNIT = tl.constexpr(128.0)
"""What scales of 8 bits are multiplied with, so that the largest of a block are about 1."""


@triton.jit
def load_tile(
    ptr: tl.tensor, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BYTES: tl.constexpr
) -> tl.tensor:
    """ROWS rows of bytes that lie one after another, zeros behind them."""
    offs_i = tl.arange(0, BLOCK_ROWS)
    offs_c = tl.arange(0, BYTES)
    return _load(
        ptr + offs_i[:, None] * BYTES + offs_c[None, :],
        (offs_i < ROWS)[:, None],
        ROWS == BLOCK_ROWS,
    )


@triton.jit
def load_fields(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    offs_i: tl.tensor,
    offs_c: tl.tensor,
    mask_IC: tl.tensor,
    C: tl.constexpr,
    BITS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_GPU: tl.constexpr,
    IS_LEVEL: tl.constexpr,
) -> tl.tuple:
    """Of bytes of rows of C, all where the tile IS_WHOLE, what their fields hold: codes as
    `codes.unpack` has them, or levels. `high_ptr`: the rows of third bits of codes of 3."""
    packed_IC = _load(codes_ptr + offs_i[:, None] * C + offs_c[None, :], mask_IC, IS_WHOLE)
    if BITS == 3:
        HALF: tl.constexpr = C // 2
        place_IC = offs_i[:, None] * HALF + (offs_c % HALF)[None, :]
        third_IC = _load(high_ptr + place_IC, mask_IC, IS_WHOLE)
        half_IC = tl.broadcast_to((offs_c // HALF)[None, :], packed_IC.shape)
        if IS_LEVEL:
            fields = unpack_levels3(packed_IC, third_IC, half_IC, IS_GPU)
        else:
            fields = unpack3(packed_IC, third_IC, half_IC, IS_GPU)
    elif IS_LEVEL:
        fields = unpack_levels(packed_IC, BITS, IS_GPU)
    else:
        fields = unpack(packed_IC, BITS, IS_GPU)
    return fields


@triton.jit
def load_levels(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tuple:
    """Levels of all bytes of ROWS rows of C, from the FIRST on."""
    offs_i, offs_c = FIRST + tl.arange(0, ROWS), tl.arange(0, C)
    return load_fields(
        codes_ptr, high_ptr, offs_i, offs_c, offs_i[:, None] >= 0, C, BITS, True,  # noqa: FBT003
        IS_GPU, IS_LEVEL=True,
    )  # fmt: skip


@triton.jit
def load_scales(ptr: tl.tensor, COUNT: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """COUNT scales, float16; those of 8 bits times `SCALE_UNIT` over their unit."""
    if ptr.dtype.element_ty == tl.uint8:
        scale = (_load_bytes(ptr, COUNT, BLOCK) << 5).to(tl.float16, bitcast=True)
        scale = (scale * SCALE_UNIT).to(tl.float16)
    else:
        scale = _load_halves(ptr, COUNT, BLOCK).to(tl.float16, bitcast=True)
    return scale


@triton.jit
def load_zeros(ptr: tl.tensor, COUNT: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """COUNT zero-points, float16, as they are stored."""
    if ptr.dtype.element_ty == tl.int8:
        # The bits of a float16 of 1024 and the byte, made positive.
        zero = ((_load_bytes(ptr, COUNT, BLOCK) ^ 0x80) | 0x6400).to(tl.float16, bitcast=True)
        zero = (zero - 1152.0).to(tl.float16)
    else:
        zero = _load_halves(ptr, COUNT, BLOCK).to(tl.float16, bitcast=True)
    return zero


@triton.jit
def _load(pointers: tl.tensor, mask: tl.tensor, IS_WHOLE: tl.constexpr) -> tl.tensor:
    """What is there, 0 where the mask is false; nothing is asked of a mask that is all true."""
    return tl.load(pointers) if IS_WHOLE else tl.load(pointers, mask=mask, other=0)


@triton.jit
def _load_halves(ptr: tl.tensor, COUNT: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """COUNT numbers of 16 bits, zeros behind them. They are read four bytes at a time: fewer of a
    thread are not copied ahead, and the loop would wait for each."""
    offs = tl.arange(0, BLOCK // 2)
    words = _load(ptr.to(tl.pointer_type(tl.uint32)) + offs, offs < COUNT // 2, BLOCK == COUNT)
    return tl.join((words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16)).reshape(BLOCK)


@triton.jit
def _load_bytes(ptr: tl.tensor, COUNT: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """COUNT bytes, uint16, likewise."""
    halves = _load_halves(ptr, COUNT // 2, BLOCK // 2)
    return tl.join(halves & 0xFF, halves >> 8).reshape(BLOCK)
