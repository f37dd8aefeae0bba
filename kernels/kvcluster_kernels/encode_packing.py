"""Codes of a block into whole bytes, for kernels: as the codecs' `packing.py` lays them out.

A byte holds the fields of codes that lie as far apart as there are bytes, the first in its lowest
bits. Codes of 3 bits are two planes, of their low two bits and of the third.

Shape letters: I rows, Q codes of a part of a row. A row has its parts one after another: as many as
a byte has fields, 8 for codes of 3 bits.
"""

import triton
import triton.language as tl


@triton.jit
def _merged(
    parts: tl.tuple,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Bytes of every STEP-th part from the FIRST on: WIDTH bits of each code from SHIFT on."""
    MASK: tl.constexpr = (1 << WIDTH) - 1
    packed_IQ = (parts[FIRST] >> SHIFT) & MASK
    for field in tl.static_range(1, 8 // WIDTH):
        packed_IQ |= ((parts[FIRST + field * STEP] >> SHIFT) & MASK) << (field * WIDTH)
    return packed_IQ


@triton.jit
def store_codes(
    codes_ptr: tl.tensor,
    high_codes_ptr: tl.tensor,
    parts: tl.tuple,
    offs_i: tl.tensor,
    offs_q: tl.tensor,
    mask_IQ: tl.tensor,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    """Write the codes, uint8, of a head of a block, of which `parts` have COUNT in a row each."""
    places = offs_i[:, None] * COUNT + offs_q[None, :]
    if BITS == 3:
        tl.store(high_codes_ptr + places, _merged(parts, 0, 1, 2, 1), mask=mask_IQ)
        pairs = offs_i[:, None] * (2 * COUNT) + offs_q[None, :]
        tl.store(codes_ptr + pairs, _merged(parts, 0, 2, 0, 2), mask=mask_IQ)
        tl.store(codes_ptr + pairs + COUNT, _merged(parts, 1, 2, 0, 2), mask=mask_IQ)
    elif BITS == 8:
        signed = (parts[0] ^ 0x80).to(tl.int8, bitcast=True)
        tl.store(codes_ptr + places, signed, mask=mask_IQ)
    else:
        tl.store(codes_ptr + places, _merged(parts, 0, 1, 0, BITS), mask=mask_IQ)
