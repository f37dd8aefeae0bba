"""Packed codes as float16 operands, for the packed decode kernel for Hopper.

As `codes.py` and `levels.py`, whose widths it takes as they are, and 3 bits: a plane of the lower
two bits and one of the third. Third bits of a byte of the former are every second bit of a byte of
the latter, from its first on for bytes of the first half of a row, else from its second.

Shape letters: I rows, C bytes of a row of the lower two bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvcluster_kernels.codes import unpack, unpack3
from kvcluster_kernels.levels import unpack_levels, unpack_levels3
from kvcluster_kernels.packed_gluon_layouts import folded_twice


@gluon.jit
def load_fields(
    smem, high_smem, ROWS: gl.constexpr, FIRST_ROW: gl.constexpr, SIZE: gl.constexpr,
    FIRST: gl.constexpr, BITS: gl.constexpr, IS_LEVEL: gl.constexpr, TILE: gl.constexpr,
    ALL_ROWS: gl.constexpr, ALL_BYTES: gl.constexpr,
):  # fmt: skip
    """Fields of a tile [ROWS, SIZE bytes] of codes that lie flat in shared memory: float16, in the
    layout TILE. Codes are times `field_unit` * 2^-24, levels are as they are."""
    codes = smem.reshape([ALL_ROWS, ALL_BYTES])
    packed = codes.slice(FIRST_ROW, ROWS, 0).slice(FIRST, SIZE, 1).load(TILE)
    if BITS == 3:
        tile3: gl.constexpr = folded_twice(TILE)
        high = high_smem.reshape([ALL_ROWS, ALL_BYTES // 2]).slice(FIRST_ROW, ROWS, 0)
        third = gl.expand_dims(high.load(gl.SliceLayout(1, tile3)), 1)
        third = third.broadcast_to([ROWS, 2, SIZE // 2])
        half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, tile3)))
        half = half[None, :, None].broadcast_to([ROWS, 2, SIZE // 2])
        third = gl.convert_layout(third.reshape([ROWS, SIZE]), TILE, assert_trivial=True)
        half = gl.convert_layout(half.reshape([ROWS, SIZE]), TILE, assert_trivial=True)
        if IS_LEVEL:
            fields = unpack_levels3(packed, third, half, IS_GPU=True)
        else:
            fields = unpack3(packed, third, half, IS_GPU=True)
    elif IS_LEVEL:
        fields = unpack_levels(packed, BITS, IS_GPU=True)
    else:
        fields = unpack(packed, BITS, IS_GPU=True)
    return fields


@gluon.jit
def scales_of(x):
    """Scales, float16; those of 8 bits, whose unit is a scale of 128, times that over it."""
    if x.dtype == gl.uint8:
        halves = gl.inline_asm_elementwise(
            """
            { .reg .b32 a, b;
              prmt.b32 a, $2, 0, 0x4140;
              prmt.b32 b, $2, 0, 0x4342;
              shl.b32 $0, a, 5;
              shl.b32 $1, b, 5; }
            """,
            "=&r,=r,r",
            [x],
            dtype=gl.float16,
            is_pure=True,
            pack=4,
        )
        x = (halves * 128.0).to(gl.float16)
    return x


@gluon.jit
def zeros_of(x):
    """Zero-points, float16, as they are stored."""
    if x.dtype == gl.int8:
        # The bits of a float16 of 1024 and the byte, made positive.
        halves = gl.inline_asm_elementwise(
            """
            { .reg .b32 u;
              xor.b32 u, $2, 0x80808080;
              prmt.b32 $0, u, 0x64646464, 0x4140;
              prmt.b32 $1, u, 0x64646464, 0x4342; }
            """,
            "=&r,=r,r",
            [x],
            dtype=gl.float16,
            is_pure=True,
            pack=4,
        )
        x = (halves - 1152.0).to(gl.float16)
    return x
