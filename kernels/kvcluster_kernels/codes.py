"""Products with packed codes, for kernels: codes become operands without arithmetic.

A byte holds the fields of codes that lie apart (first half and second half of an axis, or
quarters), so that a mask of a run of bytes is a run of neighbours. A masked byte as the bits of a
float16 is a subnormal number, code * 2^(offset of the field - 24), which matrix units multiply
exactly: the other operand is scaled by the field, the sum by 2^24. On a GPU a register of four
bytes is unpacked by a few byte permutations and masks (inline assembly); elsewhere by plain
operations that give the same.

Shape letters: I rows, C bytes of a row.
"""

import triton
import triton.language as tl
from triton import JITFunction

CODE_UNIT = tl.constexpr(2.0**24)
"""What products with codes are to be multiplied with."""


def has_assembly(kernel: object) -> bool:
    """Whether a kernel can contain inline assembly: not in the interpreter."""
    return isinstance(kernel, JITFunction)


@triton.constexpr_function
def num_fields(bits: int) -> int:
    """Arrays that a byte of codes, or of the lower two bits of codes of 3, is unpacked to; one of
    numbers that are no codes."""
    return {16: 1, 8: 1, 4: 2, 3: 4, 2: 4}[bits]


@triton.constexpr_function
def row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of so many codes, or of the lower two bits of codes of 3."""
    return count * {8: 8, 4: 4, 3: 2, 2: 2}[bits] // 8


@triton.constexpr_function
def field_unit(field: int, bits: int) -> float:
    """What codes of a field are multiplied with in what they are unpacked to, over 2^-24."""
    return 2.0 ** (4 * (field // 2) if bits == 3 else field * bits)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, IS_GPU: tl.constexpr) -> tl.tensor:
    """acc + a b."""
    if not IS_GPU:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def unpack(packed_IC: tl.tensor, BITS: tl.constexpr, IS_GPU: tl.constexpr) -> tl.tuple:
    """The fields of the bytes, lowest bits first, field f as float16 code * 2^(f * BITS - 24)."""
    if BITS == 8:
        fields = (_unpack8(packed_IC, IS_GPU),)
    elif BITS == 4:
        fields = _unpack4(packed_IC, IS_GPU)
    else:
        fields = _unpack2(packed_IC, IS_GPU)
    return fields


@triton.jit
def _unpack8(packed: tl.tensor, IS_GPU: tl.constexpr) -> tl.tensor:
    """Codes that are stored less 128."""
    if IS_GPU:
        codes = tl.inline_asm_elementwise(
            """
            { .reg .b32 u;
              xor.b32 u, $2, 0x80808080;
              prmt.b32 $0, u, 0, 0x4140;
              prmt.b32 $1, u, 0, 0x4342; }
            """,
            "=&r,=r,r",
            [packed],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        codes = _bits(packed.to(tl.uint8, bitcast=True) ^ 0x80)
    return codes


@triton.jit
def _unpack4(packed: tl.tensor, IS_GPU: tl.constexpr) -> tuple[tl.tensor, ...]:
    if IS_GPU:
        c0, c1 = tl.inline_asm_elementwise(
            """
            { .reg .b32 a, b;
              prmt.b32 a, $4, 0, 0x4140;
              prmt.b32 b, $4, 0, 0x4342;
              and.b32 $0, a, 0x000F000F;
              and.b32 $1, b, 0x000F000F;
              and.b32 $2, a, 0x00F000F0;
              and.b32 $3, b, 0x00F000F0; }
            """,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        c0 = _bits(packed & 0x0F)
        c1 = _bits(packed & 0xF0)
    return c0, c1


@triton.jit
def _unpack2(packed: tl.tensor, IS_GPU: tl.constexpr) -> tuple[tl.tensor, ...]:
    if IS_GPU:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            """
            { .reg .b32 a, b;
              prmt.b32 a, $8, 0, 0x4140;
              prmt.b32 b, $8, 0, 0x4342;
              and.b32 $0, a, 0x00030003;
              and.b32 $1, b, 0x00030003;
              and.b32 $2, a, 0x000C000C;
              and.b32 $3, b, 0x000C000C;
              and.b32 $4, a, 0x00300030;
              and.b32 $5, b, 0x00300030;
              and.b32 $6, a, 0x00C000C0;
              and.b32 $7, b, 0x00C000C0; }
            """,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        c0 = _bits(packed & 0x03)
        c1 = _bits(packed & 0x0C)
        c2 = _bits(packed & 0x30)
        c3 = _bits(packed & 0xC0)
    return c0, c1, c2, c3


@triton.jit
def unpack3(
    packed_IC: tl.tensor, third_IC: tl.tensor, half_IC: tl.tensor, IS_GPU: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """The fields of codes of 3 bits, times `field_unit` * 2^-24: of their lower two bits, of bytes
    with their third bits, and of whether those are each second bit from the second on, not from the
    first. Four neighbours have the same half."""
    if IS_GPU:
        # Nibbles are codes: of fields 0 and 2 in one word, of 1 and 3 in the other.
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
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
            [packed_IC, third_IC, half_IC],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        aligned_IC = third_IC >> half_IC.to(tl.uint8)
        c0 = _bits((packed_IC & 3) | (aligned_IC & 1) << 2)
        c1 = _bits((packed_IC >> 2 & 3) | (aligned_IC & 4))
        c2 = _bits((packed_IC & 0x30) | (aligned_IC & 0x10) << 2)
        c3 = _bits((packed_IC >> 2 & 0x30) | (aligned_IC & 0x40))
    return c0, c1, c2, c3


@triton.jit
def _bits(masked: tl.tensor) -> tl.tensor:
    return masked.to(tl.uint16).to(tl.float16, bitcast=True)
