"""Packed codes as float16 operands, for the packed decode kernel for Hopper.

As `codes.py` and `levels.py`, whose widths it takes as they are, and 3 bits: a plane of the lower
two bits and one of the third. Third bits of a byte of the former are every second bit of a byte of
the latter, from its first on for bytes of the first half of a row, else from its second.

Shape letters: I rows, C bytes of a row of the lower two bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvcluster_kernels.codes import unpack
from kvcluster_kernels.levels import unpack_levels
from kvcluster_kernels.packed_gluon_layouts import folded_twice


@gluon.constexpr_function
def num_fields(bits):
    """Arrays that a byte of codes, or of their lower two bits, is unpacked to."""
    return {8: 1, 4: 2, 3: 4, 2: 4}[bits]


@gluon.constexpr_function
def row_bytes(count, bits):
    """Bytes of a row of so many codes, of their lower two bits where they have 3."""
    return count // num_fields(bits)


@gluon.constexpr_function
def field_unit(field, bits, is_level):
    """What a field is multiplied with, beside all that codes are, in what it is unpacked to."""
    if is_level:
        return 1.0
    return 2.0 ** (4 * (field // 2) if bits == 3 else field * bits)


@gluon.jit
def load_fields(
    smem, high_smem, ROWS: gl.constexpr, FIRST_ROW: gl.constexpr, SIZE: gl.constexpr,
    FIRST: gl.constexpr, BITS: gl.constexpr, IS_LEVEL: gl.constexpr, TILE: gl.constexpr,
    ALL_ROWS: gl.constexpr, ALL_BYTES: gl.constexpr,
):  # fmt: skip
    """Fields of a tile [ROWS, SIZE bytes] of codes that lie flat in shared memory: float16, in the
    layout TILE. Codes are times field_unit * 2^-24, levels are as they are."""
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
        fields = _levels3(packed, third, half) if IS_LEVEL else _codes3(packed, third, half)
    elif IS_LEVEL:
        fields = unpack_levels(packed, BITS, IS_GPU=True)
    else:
        fields = unpack(packed, BITS, IS_GPU=True)
    return fields


@gluon.jit
def _codes3(packed, third, half):
    # Nibbles are codes: of fields 0 and 2 in one word, of 1 and 3 in the other.
    return gl.inline_asm_elementwise(
        """
        { .reg .b32 w, a, b, p;
          shr.b32 w, $9, $10;
          shl.b32 a, w, 2;
          and.b32 a, a, 0x44444444;
          lop3.b32 a, $8, 0x33333333, a, 0xEA;
          shr.b32 p, $8, 2;
          and.b32 b, w, 0x44444444;
          lop3.b32 b, p, 0x33333333, b, 0xEA;
          prmt.b32 p, a, 0, 0x4140;
          and.b32 $0, p, 0x00070007;
          and.b32 $4, p, 0x00700070;
          prmt.b32 p, a, 0, 0x4342;
          and.b32 $1, p, 0x00070007;
          and.b32 $5, p, 0x00700070;
          prmt.b32 p, b, 0, 0x4140;
          and.b32 $2, p, 0x00070007;
          and.b32 $6, p, 0x00700070;
          prmt.b32 p, b, 0, 0x4342;
          and.b32 $3, p, 0x00070007;
          and.b32 $7, p, 0x00700070; }
        """,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        [packed, third, half],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _levels3(packed, third, half):
    # The same nibbles, as places in tables of the high and the low bytes of eight levels.
    return gl.inline_asm_elementwise(
        """
        { .reg .b32 w, a, b, p, l, h;
          shr.b32 w, $9, $10;
          shl.b32 a, w, 2;
          and.b32 a, a, 0x44444444;
          lop3.b32 a, $8, 0x33333333, a, 0xEA;
          shr.b32 p, $8, 2;
          and.b32 b, w, 0x44444444;
          lop3.b32 b, p, 0x33333333, b, 0xEA;
          prmt.b32 l, 0xD80C604E, 0x4E600CD8, a;
          prmt.b32 h, 0xB3BABDC0, 0x403D3A33, a;
          prmt.b32 $0, l, h, 0x6240;
          prmt.b32 $4, l, h, 0x7351;
          shr.b32 a, a, 16;
          prmt.b32 l, 0xD80C604E, 0x4E600CD8, a;
          prmt.b32 h, 0xB3BABDC0, 0x403D3A33, a;
          prmt.b32 $1, l, h, 0x6240;
          prmt.b32 $5, l, h, 0x7351;
          prmt.b32 l, 0xD80C604E, 0x4E600CD8, b;
          prmt.b32 h, 0xB3BABDC0, 0x403D3A33, b;
          prmt.b32 $2, l, h, 0x6240;
          prmt.b32 $6, l, h, 0x7351;
          shr.b32 b, b, 16;
          prmt.b32 l, 0xD80C604E, 0x4E600CD8, b;
          prmt.b32 h, 0xB3BABDC0, 0x403D3A33, b;
          prmt.b32 $3, l, h, 0x6240;
          prmt.b32 $7, l, h, 0x7351; }
        """,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        [packed, third, half],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=4,
    )


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
