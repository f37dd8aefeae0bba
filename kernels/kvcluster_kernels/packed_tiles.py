"""Blocks of packed formats as tiles of numbers, for kernels that multiply many rows with each.

With many rows, what becomes of a number once costs little beside its products, so that nothing is
folded into queries or weights but what is one number for a whole block. A tile's columns are in the
order of the fields of its bytes, and its rows in groups padded to powers of two: whoever multiplies
with a tile loads and stores the other side in that order.

Shape letters: G groups of rows that share scales, R rows of a group, C bytes of a row.
"""

import triton
import triton.language as tl

from kvcluster_kernels.codes import num_fields, row_bytes
from kvcluster_kernels.softmax import append


@triton.jit
def block_tile(
    planes: tl.tuple,
    page: tl.tensor,
    place: tl.tensor,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A block's tile and the factor that it is to be multiplied with. BITS are 0 for floats.
    `planes` are pointers to codes, scale, zero and unit, and the strides of their pages; then, of
    codes of 3 bits, the pointer to the third and its stride."""
    codes_ptr = planes[0] + page * planes[4]
    scale_ptr = planes[1] + page * planes[5]
    if BITS == 0:
        tile = float8_tile(codes_ptr + place * (ROWS * LENGTH), ROWS, LENGTH, DTYPE)
        factor = tl.load(scale_ptr + place)
    else:
        high_ptr = codes_ptr
        if BITS == 3:
            high_ptr = planes[8] + page * planes[9] + place * (ROWS * LENGTH // 8)
        tile = integer_tile(
            codes_ptr + place * (ROWS * row_bytes(LENGTH, BITS)),
            high_ptr,
            scale_ptr + place * (GROUPS * LENGTH),
            planes[2] + page * planes[6] + place * (GROUPS * LENGTH),
            ROWS,
            LENGTH,
            BITS,
            GROUPS,
            DTYPE,
            IS_GPU,
        )
        factor = 1.0
        if SCALE_BITS == 8:
            factor = tl.load(planes[3] + page * planes[7] + place)
    return tile, factor


@triton.jit
def integer_tile(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> tl.tensor:
    """Numbers of a block of ROWS rows of LENGTH codes, [padded rows, padded row], zeros where there
    are none, in arithmetic of DTYPE. With scales of 8 bits they are to be multiplied with the
    block's unit."""
    R: tl.constexpr = ROWS // GROUPS
    C: tl.constexpr = row_bytes(LENGTH, BITS)
    FIELDS: tl.constexpr = num_fields(BITS)
    PADDED_G: tl.constexpr = triton.next_power_of_2(GROUPS)
    PADDED_R: tl.constexpr = triton.next_power_of_2(R)
    PADDED_C: tl.constexpr = triton.next_power_of_2(C)
    IS_PADDED: tl.constexpr = (PADDED_G != GROUPS) or (PADDED_R != R) or (PADDED_C != C)
    groups = tl.arange(0, PADDED_G)[:, None, None]
    rows = tl.arange(0, PADDED_R)[None, :, None]
    bytes_ = tl.arange(0, PADDED_C)[None, None, :]
    code_ptrs = codes_ptr + (groups * R + rows) * C + bytes_
    if IS_PADDED:
        mask = (groups < GROUPS) & (rows < R) & (bytes_ < C)
        packed_GRC = tl.load(code_ptrs, mask=mask, other=0)
    else:
        packed_GRC = tl.load(code_ptrs)
    if BITS == 3:
        H: tl.constexpr = LENGTH // 8
        # Behind a row's last byte, what is read is not used.
        third_GRC = tl.load(high_ptr + tl.minimum(groups * R + rows, ROWS - 1) * H + bytes_ % H)
        fields = _numbers3(packed_GRC, third_GRC, bytes_ // H)
    else:
        fields = numbers(packed_GRC, BITS, IS_GPU)
    tiles = ()
    for field in tl.static_range(FIELDS):
        place = groups * LENGTH + field * C + bytes_
        seen = (groups < GROUPS) & (bytes_ < C)
        if scale_ptr.dtype.element_ty == tl.uint8:
            # The upper byte of a float16 less its sign: the rest of it is zero.
            bits = tl.load(scale_ptr + place, mask=seen, other=0).to(tl.uint16) << 5
            scale_G1C = bits.to(tl.float16, bitcast=True).to(DTYPE)
            zero_G1C = tl.load(zero_ptr + place, mask=seen, other=0).to(DTYPE) * scale_G1C
        else:
            scale_G1C = tl.load(scale_ptr + place, mask=seen, other=0.0).to(DTYPE)
            zero_G1C = tl.load(zero_ptr + place, mask=seen, other=0.0).to(DTYPE)
        x_GRC = fields[field].to(DTYPE) * scale_G1C + zero_G1C
        if IS_PADDED:
            x_GRC = tl.where(mask, x_GRC, 0.0)
        tiles = append(tiles, tl.reshape(x_GRC, (PADDED_G * PADDED_R, PADDED_C)))
    return side_by_side(tiles)


@triton.jit
def float8_tile(
    ptr: tl.tensor, ROWS: tl.constexpr, LENGTH: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """Numbers of a block of ROWS rows of LENGTH e4m3 floats, likewise; to be multiplied with the
    block's scale."""
    PADDED_R: tl.constexpr = triton.next_power_of_2(ROWS)
    PADDED_C: tl.constexpr = triton.next_power_of_2(LENGTH)
    rows = tl.arange(0, PADDED_R)[:, None]
    columns = tl.arange(0, PADDED_C)[None, :]
    if PADDED_R != ROWS or PADDED_C != LENGTH:
        mask = (rows < ROWS) & (columns < LENGTH)
        x_RC = tl.load(ptr + rows * LENGTH + columns, mask=mask, other=0.0)
    else:
        x_RC = tl.load(ptr + rows * LENGTH + columns)
    # By way of float16, to which the processor converts and which holds all of them.
    return x_RC.to(tl.float16).to(DTYPE)


@triton.jit
def place_of_column(COLUMNS: tl.constexpr, LENGTH: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Which of LENGTH numbers of a row is in each column of a tile; LENGTH where there is none.
    BITS are those of codes, 0 for floats."""
    C: tl.constexpr = row_bytes(LENGTH, BITS) if BITS else LENGTH
    PADDED_C: tl.constexpr = triton.next_power_of_2(C)
    place = tl.arange(0, COLUMNS)
    # Where all are in order, the compiler must see that they are: it then moves several at a time.
    if PADDED_C != C:
        bytes_ = place % PADDED_C
        place = tl.where(bytes_ < C, place // PADDED_C * C + bytes_, LENGTH)
    return place


@triton.jit
def place_of_row(PADDED_ROWS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr) -> tl.tensor:
    """Which of ROWS rows is in each row of a tile; ROWS where there is none."""
    R: tl.constexpr = ROWS // GROUPS
    PADDED_R: tl.constexpr = triton.next_power_of_2(R)
    place = tl.arange(0, PADDED_ROWS)
    if PADDED_ROWS != ROWS:
        rows = place % PADDED_R
        is_row = (rows < R) & (place < GROUPS * PADDED_R)
        place = tl.where(is_row, place // PADDED_R * R + rows, ROWS)
    return place


@triton.jit
def numbers(packed: tl.tensor, BITS: tl.constexpr, IS_GPU: tl.constexpr) -> tl.tuple:
    """The fields of bytes as float16, lowest bits first. Codes of 8 bits are stored less 128."""
    if IS_GPU:
        if BITS == 8:
            fields = append((), _numbers8(packed))
        elif BITS == 4:
            fields = _numbers4(packed)
        else:
            fields = _numbers2(packed)
    else:
        fields = ()
        codes = packed.to(tl.uint8, bitcast=True) ^ (0x80 if BITS == 8 else 0)
        for field in tl.static_range(8 // BITS):
            code = (codes >> (field * BITS)) & (2**BITS - 1)
            fields = append(fields, code.to(tl.float16))
    return fields


@triton.jit
def _numbers3(packed: tl.tensor, third: tl.tensor, half: tl.tensor) -> tl.tuple:
    """Of codes whose lower two bits are fields of one byte, and whose third is in another byte: in
    its first bit or, of the second half of a row, in its second, and in each second one on."""
    aligned = third >> half.to(tl.uint8)
    fields = ()
    for field in tl.static_range(4):
        code = (packed >> (2 * field)) & 3 | ((aligned >> (2 * field)) & 1) << 2
        fields = append(fields, code.to(tl.float16))
    return fields


# A code in the lowest bits of the float16 1024 makes 1024 + code, in higher ones 1024 + code times
# a power of two, which is then taken away again.
@triton.jit
def _numbers8(packed: tl.tensor) -> tl.tensor:
    return tl.inline_asm_elementwise(
        """
        { .reg .b32 u, one;
          mov.b32 one, 0x64006400;
          xor.b32 u, $2, 0x80808080;
          prmt.b32 $0, u, 0x64646464, 0x4140;
          prmt.b32 $1, u, 0x64646464, 0x4342;
          sub.f16x2 $0, $0, one;
          sub.f16x2 $1, $1, one; }
        """,
        "=&r,=&r,r",
        [packed],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _numbers4(packed: tl.tensor) -> tl.tuple:
    return tl.inline_asm_elementwise(
        """
        { .reg .b32 a, b, one, part, rest;
          mov.b32 one, 0x64006400;
          mov.b32 part, 0x2C002C00;
          mov.b32 rest, 0xD400D400;
          prmt.b32 a, $4, 0, 0x4140;
          prmt.b32 b, $4, 0, 0x4342;
          lop3.b32 $0, a, 0x000F000F, one, 0xEA;
          lop3.b32 $1, b, 0x000F000F, one, 0xEA;
          lop3.b32 $2, a, 0x00F000F0, one, 0xEA;
          lop3.b32 $3, b, 0x00F000F0, one, 0xEA;
          sub.f16x2 $0, $0, one;
          sub.f16x2 $1, $1, one;
          fma.rn.f16x2 $2, $2, part, rest;
          fma.rn.f16x2 $3, $3, part, rest; }
        """,
        "=&r,=&r,=&r,=&r,r",
        [packed],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _numbers2(packed: tl.tensor) -> tl.tuple:
    return tl.inline_asm_elementwise(
        """
        { .reg .b32 a, b, one, part, rest;
          mov.b32 one, 0x64006400;
          prmt.b32 a, $8, 0, 0x4140;
          prmt.b32 b, $8, 0, 0x4342;
          lop3.b32 $0, a, 0x00030003, one, 0xEA;
          lop3.b32 $1, b, 0x00030003, one, 0xEA;
          lop3.b32 $2, a, 0x000C000C, one, 0xEA;
          lop3.b32 $3, b, 0x000C000C, one, 0xEA;
          lop3.b32 $4, a, 0x00300030, one, 0xEA;
          lop3.b32 $5, b, 0x00300030, one, 0xEA;
          lop3.b32 $6, a, 0x00C000C0, one, 0xEA;
          lop3.b32 $7, b, 0x00C000C0, one, 0xEA;
          sub.f16x2 $0, $0, one;
          sub.f16x2 $1, $1, one;
          mov.b32 part, 0x34003400;
          mov.b32 rest, 0xDC00DC00;
          fma.rn.f16x2 $2, $2, part, rest;
          fma.rn.f16x2 $3, $3, part, rest;
          mov.b32 part, 0x2C002C00;
          mov.b32 rest, 0xD400D400;
          fma.rn.f16x2 $4, $4, part, rest;
          fma.rn.f16x2 $5, $5, part, rest;
          mov.b32 part, 0x24002400;
          mov.b32 rest, 0xCC00CC00;
          fma.rn.f16x2 $6, $6, part, rest;
          fma.rn.f16x2 $7, $7, part, rest; }
        """,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        [packed],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def side_by_side(tiles: tl.tuple) -> tl.tensor:
    """One tile of one, two or four, one behind another along the columns."""
    if len(tiles) == 1:
        x = tiles[0]
    elif len(tiles) == 2:
        x_RCF = tl.join(tiles[0], tiles[1])
        x = tl.reshape(tl.permute(x_RCF, (0, 2, 1)), (x_RCF.shape[0], 2 * x_RCF.shape[1]))
    else:
        x_RCFE = tl.join(tl.join(tiles[0], tiles[1]), tl.join(tiles[2], tiles[3]))
        x = tl.reshape(tl.permute(x_RCFE, (0, 3, 2, 1)), (x_RCFE.shape[0], 4 * x_RCFE.shape[1]))
    return x
