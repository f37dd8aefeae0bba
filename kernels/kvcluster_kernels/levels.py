"""Codes of the Lloyd-Max codebook of N(0, 1) as float16 levels, for kernels (TurboQuant, arXiv
2504.19874).

The two bytes of a level stand in tables of eight bytes, which one byte permutation of a GPU reads
for four codes at a time (inline assembly). Elsewhere the same tables are shifted.

Shape letters: I rows, C bytes of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.softmax import append

BITS = (4, 3, 2)
"""The code widths of these kernels."""

_HIGH4 = tl.constexpr(0x41403E3D3B393630)
"""Of 4 bits, the high bytes of the positive levels, the smallest in the lowest byte."""
_LOW4 = tl.constexpr(0x772379068A41351C)
"""Their low bytes."""
_HIGH3 = tl.constexpr(0x403D3A33B3BABDC0)
"""Of 3 bits, the high bytes of all levels, ascending, the first in the lowest byte."""
_LOW3 = tl.constexpr(0x4E600CD8D80C604E)
_HIGH2 = tl.constexpr(0x3E37B7BE)
"""Of 2 bits, the high bytes of all levels, ascending."""
_LOW2 = tl.constexpr(0x0B3F3F0B)


def levels(bits: int) -> Tensor:
    """The 2^bits levels that kernels multiply with, float16, ascending."""
    packed = torch.arange(2**bits, dtype=torch.uint8)
    high, low = {
        4: (_HIGH4.value, _LOW4.value),
        3: (_HIGH3.value, _LOW3.value),
        2: (_HIGH2.value, _LOW2.value),
    }[bits]
    words = []
    for code in packed.tolist():
        place = (code if code >= 8 else 7 - code) & 7 if bits == 4 else code
        negative = 0x8000 if bits == 4 and code < 8 else 0
        words.append((high >> 8 * place & 0xFF) << 8 | (low >> 8 * place & 0xFF) | negative)
    return torch.tensor(words, dtype=torch.int32).to(torch.uint16).view(torch.float16)


@triton.jit
def unpack_levels(packed_IC: tl.tensor, BITS: tl.constexpr, IS_GPU: tl.constexpr) -> tl.tuple:
    """The level of each field of the bytes, float16, lowest bits first."""
    if not IS_GPU:
        fields = ()
        for field in tl.static_range(8 // BITS):
            code_IC = (packed_IC >> (field * BITS)).to(tl.int64) & (2**BITS - 1)
            fields = append(fields, _look_up(code_IC, BITS))
    elif BITS == 4:
        fields = _levels4(packed_IC)
    else:
        fields = _levels2(packed_IC)
    return fields


@triton.jit
def unpack_levels3(
    packed_IC: tl.tensor, third_IC: tl.tensor, half_IC: tl.tensor, IS_GPU: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """As `codes.unpack3`: the levels of codes of 3 bits."""
    if IS_GPU:
        # The same nibbles, as places in tables of the low and the high bytes of eight levels.
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
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
            [packed_IC, third_IC, half_IC],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        aligned_IC = third_IC >> half_IC.to(tl.uint8)
        c0 = _look_up(((packed_IC & 3) | (aligned_IC & 1) << 2).to(tl.int64), 3)
        c1 = _look_up(((packed_IC >> 2 & 3) | (aligned_IC & 4)).to(tl.int64), 3)
        c2 = _look_up(((packed_IC >> 4 & 3) | (aligned_IC >> 2 & 4)).to(tl.int64), 3)
        c3 = _look_up(((packed_IC >> 6 & 3) | (aligned_IC >> 4 & 4)).to(tl.int64), 3)
    return c0, c1, c2, c3


@triton.jit
def _look_up(code_IC: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    if BITS == 4:
        place_IC = tl.where(code_IC >= 8, code_IC, 7 - code_IC) & 7
        sign_IC = tl.where(code_IC >= 8, 0, 0x8000)
        high_IC = (_HIGH4 >> (8 * place_IC)) & 0xFF
        low_IC = (_LOW4 >> (8 * place_IC)) & 0xFF
    elif BITS == 3:
        sign_IC = code_IC * 0
        high_IC = (_HIGH3 >> (8 * code_IC)) & 0xFF
        low_IC = (_LOW3 >> (8 * code_IC)) & 0xFF
    else:
        sign_IC = code_IC * 0
        high_IC = (_HIGH2 >> (8 * code_IC)) & 0xFF
        low_IC = (_LOW2 >> (8 * code_IC)) & 0xFF
    return ((high_IC << 8) | low_IC | sign_IC).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _levels4(packed: tl.tensor) -> tuple[tl.tensor, ...]:
    # A code of the lower half mirrors the upper: its place in the tables is 7 - code. A permutation
    # by whole codes, whose bit 3 asks for the sign of a byte, gives half the sign bit of a level.
    c0, c1 = tl.inline_asm_elementwise(
        """
        { .reg .b32 m, t, s, s1, w1, l, h, n;
          and.b32 m, $4, 0x88888888;
          shr.u32 t, m, 3;
          sub.u32 t, m, t;
          lop3.b32 s, $4, t, 0x77777777, 0x82;
          shr.u32 s1, s, 16;
          shr.u32 w1, $4, 16;
          prmt.b32 l, 0x8A41351C, 0x77237906, s;
          prmt.b32 h, 0x3B393630, 0x41403E3D, s;
          prmt.b32 n, 0x40404040, 0x40404040, $4;
          add.u32 h, h, n;
          add.u32 h, h, n;
          prmt.b32 t, 0x40404040, 0x40404040, w1;
          prmt.b32 $0, l, h, 0x6240;
          prmt.b32 $2, l, h, 0x7351;
          prmt.b32 l, 0x8A41351C, 0x77237906, s1;
          prmt.b32 h, 0x3B393630, 0x41403E3D, s1;
          add.u32 h, h, t;
          add.u32 h, h, t;
          prmt.b32 $1, l, h, 0x6240;
          prmt.b32 $3, l, h, 0x7351; }
        """,
        "=&r,=&r,=&r,=r,r",
        [packed],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )
    return c0, c1


@triton.jit
def _levels2(packed: tl.tensor) -> tuple[tl.tensor, ...]:
    c0, c1, c2, c3 = tl.inline_asm_elementwise(
        """
        { .reg .b32 e, o, e1, o1, l, h;
          and.b32 e, $8, 0x33333333;
          shr.u32 o, $8, 2;
          and.b32 o, o, 0x33333333;
          shr.u32 e1, e, 16;
          shr.u32 o1, o, 16;
          prmt.b32 l, 0x0B3F3F0B, 0, e;
          prmt.b32 h, 0x3E37B7BE, 0, e;
          prmt.b32 $0, l, h, 0x6240;
          prmt.b32 $4, l, h, 0x7351;
          prmt.b32 l, 0x0B3F3F0B, 0, e1;
          prmt.b32 h, 0x3E37B7BE, 0, e1;
          prmt.b32 $1, l, h, 0x6240;
          prmt.b32 $5, l, h, 0x7351;
          prmt.b32 l, 0x0B3F3F0B, 0, o;
          prmt.b32 h, 0x3E37B7BE, 0, o;
          prmt.b32 $2, l, h, 0x6240;
          prmt.b32 $6, l, h, 0x7351;
          prmt.b32 l, 0x0B3F3F0B, 0, o1;
          prmt.b32 h, 0x3E37B7BE, 0, o1;
          prmt.b32 $3, l, h, 0x6240;
          prmt.b32 $7, l, h, 0x7351; }
        """,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=r,r",
        [packed],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )
    return c0, c1, c2, c3
