"""Codes as the numbers that they stand for, in float16, for kernels: zero + scale * code.

Where matrix units have enough to do already, that costs less than to fold scales and zero-points
into the other operand. A code in the low bits of the float16 of 1024, which count in ones, is 1024
more than itself; a register of two is put right by one subtraction and made a number by one
multiplication and addition, rounded once (inline assembly; elsewhere by plain operations).

Shape letters: S rows, P numbers of a piece of a row.
"""

import triton
import triton.language as tl

from kvcluster_kernels.softmax import append


@triton.jit
def load_grid(
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    unit: tl.tensor,
    offs_s: tl.tensor,
    offs_p: tl.tensor,
    left: tl.constexpr,
    RANK: tl.constexpr,
    S: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Scale and zero-point of each number, float16, [1, P] where all tokens share them."""
    places = offs_p[None, :]
    if GROUPS > 1:
        places = (offs_s // (S // GROUPS))[:, None] * RANK + places
    mask = (offs_p < left)[None, :]
    scale = tl.load(scale_ptr + places, mask=mask, other=0)
    zero = tl.load(zero_ptr + places, mask=mask, other=0)
    if SCALE_BITS == 8:
        step = (scale.to(tl.uint16) << 5).to(tl.float16, bitcast=True).to(tl.float32) * unit
        zero = (step * zero.to(tl.float32)).to(tl.float16)
        scale = step.to(tl.float16)
    return scale, zero


@triton.jit
def numbers(
    packed_SP: tl.tensor,
    scales: tl.tuple,
    zeros: tl.tuple,
    BITS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tuple:
    """zero + scale * code of each field of the bytes, lowest bits first, float16, rounded once."""
    fields = ()
    if not IS_GPU:
        for field in tl.static_range(8 // BITS):
            if BITS == 8:
                code = packed_SP.to(tl.uint8, bitcast=True) ^ 0x80
            else:
                code = (packed_SP >> (field * BITS)) & ((1 << BITS) - 1)
            number = scales[field].to(tl.float32) * code.to(tl.float32)
            fields = append(fields, (number + zeros[field].to(tl.float32)).to(tl.float16))
    elif BITS == 8:
        fields = append(fields, _numbers8(packed_SP, scales[0], zeros[0]))
    elif BITS == 4:
        fields = _numbers4(packed_SP, scales, zeros)
    else:
        fields = _numbers2(packed_SP, scales, zeros)
    return fields


@triton.jit
def _numbers8(packed: tl.tensor, scale: tl.tensor, zero: tl.tensor) -> tl.tensor:
    return tl.inline_asm_elementwise(
        """
        { .reg .b32 u, a, b, k;
          mov.b32 k, 0x64006400;
          xor.b32 u, $2, 0x80808080;
          prmt.b32 a, u, 0x64646464, 0x4140;
          prmt.b32 b, u, 0x64646464, 0x4342;
          sub.f16x2 a, a, k;
          sub.f16x2 b, b, k;
          fma.rn.f16x2 $0, a, $3, $5;
          fma.rn.f16x2 $1, b, $4, $6; }
        """,
        "=&r,=&r,r,r,r,r,r",
        [packed, scale, zero],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _numbers4(packed: tl.tensor, scales: tl.tuple, zeros: tl.tuple) -> tuple[tl.tensor, ...]:
    scale1 = (scales[1] * 0.0625).to(tl.float16)
    c0, c1 = tl.inline_asm_elementwise(
        """
        { .reg .b32 a, b, c, d, k;
          mov.b32 k, 0x64006400;
          prmt.b32 a, $4, 0, 0x4140;
          prmt.b32 b, $4, 0, 0x4342;
          lop3.b32 c, a, 0x00F000F0, k, 0xEA;
          lop3.b32 d, b, 0x00F000F0, k, 0xEA;
          lop3.b32 a, a, 0x000F000F, k, 0xEA;
          lop3.b32 b, b, 0x000F000F, k, 0xEA;
          sub.f16x2 a, a, k;
          sub.f16x2 b, b, k;
          sub.f16x2 c, c, k;
          sub.f16x2 d, d, k;
          fma.rn.f16x2 $0, a, $5, $7;
          fma.rn.f16x2 $1, b, $6, $8;
          fma.rn.f16x2 $2, c, $9, $11;
          fma.rn.f16x2 $3, d, $10, $12; }
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [packed, scales[0], zeros[0], scale1, zeros[1]],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )
    return c0, c1


@triton.jit
def _numbers2(packed: tl.tensor, scales: tl.tuple, zeros: tl.tuple) -> tuple[tl.tensor, ...]:
    scale1 = (scales[1] * 0.25).to(tl.float16)
    scale2 = (scales[2] * 0.0625).to(tl.float16)
    scale3 = (scales[3] * 0.015625).to(tl.float16)
    c0, c1, c2, c3 = tl.inline_asm_elementwise(
        """
        { .reg .b32 a, b, c, d, k;
          mov.b32 k, 0x64006400;
          prmt.b32 a, $8, 0, 0x4140;
          prmt.b32 b, $8, 0, 0x4342;
          lop3.b32 c, a, 0x00030003, k, 0xEA;
          lop3.b32 d, b, 0x00030003, k, 0xEA;
          sub.f16x2 c, c, k;
          sub.f16x2 d, d, k;
          fma.rn.f16x2 $0, c, $9, $11;
          fma.rn.f16x2 $1, d, $10, $12;
          lop3.b32 c, a, 0x000C000C, k, 0xEA;
          lop3.b32 d, b, 0x000C000C, k, 0xEA;
          sub.f16x2 c, c, k;
          sub.f16x2 d, d, k;
          fma.rn.f16x2 $2, c, $13, $15;
          fma.rn.f16x2 $3, d, $14, $16;
          lop3.b32 c, a, 0x00300030, k, 0xEA;
          lop3.b32 d, b, 0x00300030, k, 0xEA;
          sub.f16x2 c, c, k;
          sub.f16x2 d, d, k;
          fma.rn.f16x2 $4, c, $17, $19;
          fma.rn.f16x2 $5, d, $18, $20;
          lop3.b32 c, a, 0x00C000C0, k, 0xEA;
          lop3.b32 d, b, 0x00C000C0, k, 0xEA;
          sub.f16x2 c, c, k;
          sub.f16x2 d, d, k;
          fma.rn.f16x2 $6, c, $21, $23;
          fma.rn.f16x2 $7, d, $22, $24; }
        """,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [packed, scales[0], zeros[0], scale1, zeros[1], scale2, zeros[2], scale3, zeros[3]],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )
    return c0, c1, c2, c3
