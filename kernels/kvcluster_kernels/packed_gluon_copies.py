"""What the packed decode kernel for Hopper copies ahead: the planes of a block.

Shape letters: those of `integer_decode.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kvcluster_kernels.codes import row_bytes
from kvcluster_kernels.packed_gluon_layouts import FLAT, copied

# Renamed after Triton 3.6.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_SCALE_UNIT = gl.constexpr(128.0)


@gluon.jit
def append(items, item):
    """The tuple and one more."""
    return items + (item,)  # noqa: RUF005


@gluon.jit
def _room(ptr, COUNT: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for so many numbers of a plane, for several blocks."""
    return gl.allocate_shared_memory(ptr.dtype.element_ty, [STAGES, COUNT], FLAT)


@gluon.jit
def planes_of(
    codes_ptr, high_ptr, scale_ptr, zero_ptr, stride_codes, stride_high, stride_scale, stride_zero,
    NUM_CODES: gl.constexpr, BITS: gl.constexpr, NUM_SCALES: gl.constexpr,
    NUM_ZEROS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Shared memory for codes, scales, zeros and third bits of so many numbers of a block, or what
    stands for those that there are none of; and shared memory, pointers and strides of those that
    are copied."""
    codes = _room(codes_ptr, row_bytes(NUM_CODES, BITS), STAGES)
    scale = _room(scale_ptr, NUM_SCALES, STAGES)
    smem = (codes, scale)
    pointers = (codes_ptr, scale_ptr)
    strides = (stride_codes, stride_scale)
    zero = scale
    high = codes
    if NUM_ZEROS > 0:
        zero = _room(zero_ptr, NUM_ZEROS, STAGES)
        smem = append(smem, zero)
        pointers = append(pointers, zero_ptr)
        strides = append(strides, stride_zero)
    if BITS == 3:
        high = _room(high_ptr, NUM_CODES // 8, STAGES)
        smem = append(smem, high)
        pointers = append(pointers, high_ptr)
        strides = append(strides, stride_high)
    return (codes, high, scale, zero), (smem, pointers, strides)


@gluon.jit
def _start_copy(smem, ptr):
    """Copy a plane of a block; does not wait."""
    COUNT: gl.constexpr = smem.shape[0]
    SIZE: gl.constexpr = smem.dtype.primitive_bitwidth // 8
    offsets = gl.arange(0, COUNT, copied(COUNT, SIZE))
    _copy(smem, ptr + offsets)


@gluon.jit
def start_copies(planes, slot, block, head, num_kv_heads, PAGE_BLOCKS: gl.constexpr):
    """Copy the planes of a block; does not wait."""
    smem, pointers, strides = planes
    page = (block // PAGE_BLOCKS).to(gl.int64)
    place = block % PAGE_BLOCKS * num_kv_heads + head
    for plane in gl.static_range(len(pointers)):
        start = pointers[plane] + page * strides[plane] + place * smem[plane].shape[1]
        _start_copy(smem[plane].index(slot), start)


@gluon.jit
def in_slot(planes, slot):
    """Codes, third bits, scales and zeros of one block of `planes_of`."""
    codes, high, scale, zero = planes
    return codes.index(slot), high.index(slot), scale.index(slot), zero.index(slot)


@gluon.jit
def load_units(planes, block, head, num_kv_heads, PAGE_BLOCKS: gl.constexpr):
    """Of scales of 8 bits of a block's keys and values: what a scale of `scales_of` is one of."""
    k_unit_ptr, v_unit_ptr, stride_k_unit, stride_v_unit = planes
    page = (block // PAGE_BLOCKS).to(gl.int64)
    place = block % PAGE_BLOCKS * num_kv_heads + head
    k_unit = gl.load(k_unit_ptr + page * stride_k_unit + place)
    v_unit = gl.load(v_unit_ptr + page * stride_v_unit + place)
    return k_unit / _SCALE_UNIT, v_unit / _SCALE_UNIT
