"""Codes as the numbers that they stand for, in float16, for kernels: zero + scale * code.

Where matrix units have enough to do already, that costs less than to fold scales and zero-points
into the other operand. A code in the low bits of the float16 of 1024, which count in ones, is 1024
more than itself; a register of two is put right by one subtraction and made a number by one
multiplication and addition, rounded once (inline assembly; elsewhere by plain operations).

Shape letters: S rows, P numbers of a piece of a row.
"""

import triton
import triton.language as tl

from kvcluster_kernels.codes import CODE_UNIT, field_unit, num_fields, unpack3
from kvcluster_kernels.integer_loads import load_scales
from kvcluster_kernels.latent_pages import (
    form_bits,
    form_count,
    form_fields,
    form_groups,
    form_is_rotated,
    form_piece,
    form_rank,
    form_scale_bits,
)
from kvcluster_kernels.levels import unpack_levels, unpack_levels3
from kvcluster_kernels.softmax import append


@triton.jit
def load_unit(block: tl.tuple, FORMS: tl.constexpr, SECTION: tl.constexpr) -> tl.tensor:
    """Of a block's scales of 8 bits."""
    return tl.load(block[4]) if form_scale_bits(FORMS, SECTION) == 8 else 1.0


@triton.jit
def load_numbers(
    block: tl.tuple,
    unit: tl.tensor,
    FIRST: tl.constexpr,
    S: tl.constexpr,
    FORMS: tl.constexpr,
    SECTION: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tuple:
    """Numbers of each token of a block: of a piece of the codes of a section from the FIRST on,
    what each field of the bytes holds, [S, P]; 0 behind a row's last. `block` has where its planes
    begin: codes, third bits, scales, zero-points, unit."""
    P: tl.constexpr = form_piece(FORMS, SECTION)
    BITS: tl.constexpr = form_bits(FORMS, SECTION)
    COUNT: tl.constexpr = form_count(FORMS, SECTION)
    IS_WHOLE: tl.constexpr = COUNT % P == 0
    offs_s, offs_p = tl.arange(0, S), tl.arange(0, P)
    stored_SP = load_piece(block[0], offs_s, FIRST + offs_p, COUNT, COUNT, IS_WHOLE)
    if BITS == 16:
        fields = (stored_SP,)
    elif form_is_rotated(FORMS, SECTION):
        fields = _levels(stored_SP, block, offs_s, FIRST + offs_p, FORMS, SECTION, IS_GPU)
    else:
        scales = ()
        zeros = ()
        for field in tl.static_range(num_fields(BITS)):
            place = field * COUNT + FIRST
            scale, zero = load_grid(
                block[2] + place, block[3] + place, unit, offs_s, offs_p, COUNT - FIRST,
                form_rank(FORMS, SECTION), S, form_groups(FORMS, SECTION),
                form_scale_bits(FORMS, SECTION),
            )  # fmt: skip
            scales = append(scales, scale)
            zeros = append(zeros, zero)
        if BITS == 3:
            fields = numbers3(
                stored_SP, block[1], offs_s, FIRST + offs_p, COUNT, scales, zeros, IS_GPU
            )
        else:
            fields = numbers(stored_SP, scales, zeros, BITS, IS_GPU)
    return fields


@triton.jit
def load_piece(
    ptr: tl.tensor,
    offs_s: tl.tensor,
    offs_p: tl.tensor,
    COUNT: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
) -> tl.tensor:
    """Some of the COUNT numbers of each token of a block; 0 behind them."""
    pointers = ptr + offs_s[:, None] * STRIDE + offs_p[None, :]
    if IS_WHOLE:
        stored = tl.load(pointers)
    else:
        stored = tl.load(pointers, mask=(offs_p < COUNT)[None, :], other=0)
    return stored


@triton.jit
def _load_third(
    ptr: tl.tensor, offs_s: tl.tensor, offs_p: tl.tensor, COUNT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Bytes of third bits of codes in these of COUNT bytes, and which half of them those are in."""
    HALF: tl.constexpr = COUNT // 2
    third_SP = tl.load(
        ptr + offs_s[:, None] * HALF + (offs_p % HALF)[None, :],
        mask=(offs_p < COUNT)[None, :],
        other=0,
    )
    return third_SP, tl.broadcast_to((offs_p // HALF)[None, :], third_SP.shape)


@triton.jit
def numbers3(
    packed_SP: tl.tensor,
    third_ptr: tl.tensor,
    rows_S: tl.tensor,
    places_P: tl.tensor,
    COUNT: tl.constexpr,
    scales: tl.tuple,
    zeros: tl.tuple,
    IS_GPU: tl.constexpr,
) -> tl.tuple:
    """As `numbers`, of codes of 3 bits: these of the COUNT bytes of each row, and rows of third
    bits."""
    third_SP, half_SP = _load_third(third_ptr, rows_S, places_P, COUNT)
    # The assembly takes four neighbours to have the same half.
    codes = unpack3(packed_SP, third_SP, half_SP, IS_GPU and COUNT % 8 == 0)
    fields = ()
    for field in tl.static_range(4):
        code_SP = codes[field].to(tl.float32) * (CODE_UNIT / field_unit(field, 3))
        number_SP = scales[field].to(tl.float32) * code_SP + zeros[field].to(tl.float32)
        fields = append(fields, number_SP.to(tl.float16))
    return fields


@triton.jit
def _levels(
    stored_SP: tl.tensor,
    block: tl.tuple,
    offs_s: tl.tensor,
    offs_p: tl.tensor,
    FORMS: tl.constexpr,
    SECTION: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tuple:
    """Levels of rotated codes times the scale of their token."""
    COUNT: tl.constexpr = form_count(FORMS, SECTION)
    if form_bits(FORMS, SECTION) == 3:
        third_SP, half_SP = _load_third(block[1], offs_s, offs_p, COUNT)
        levels = unpack_levels3(stored_SP, third_SP, half_SP, IS_GPU and COUNT % 8 == 0)
    else:
        levels = unpack_levels(stored_SP, form_bits(FORMS, SECTION), IS_GPU)
    scale_S = load_scales(block[2], offs_s.shape[0], offs_s.shape[0])
    fields = ()
    for field in tl.static_range(form_fields(FORMS, SECTION)):
        # A level behind a row's last is none: what it meets is 0.
        fields = append(fields, (levels[field] * scale_S[:, None]).to(tl.float16))
    return fields


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
