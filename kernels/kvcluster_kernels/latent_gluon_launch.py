"""Launches the latent decode kernel for Hopper, where it serves the call.

Shape letters: those of `latent_pages.py`.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kvcluster_kernels.codes import row_bytes
from kvcluster_kernels.integer_decode import IntegerPages
from kvcluster_kernels.latent_pages import (
    KeyExpansion,
    LatentPages,
    Latents,
    SectionForm,
    section_planes,
)
from kvcluster_kernels.latent_values import ROTATED, ValueFormat, ValuePages, value_planes
from kvcluster_kernels.packed_launch import page_strides, plan_launch
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, SplitPartials
from kvcluster_kernels.rotated_decode import RotatedPages

try:
    from kvcluster_kernels.latent_gluon import latent_kernel
except (ImportError, AttributeError):
    # Experimental in Triton: another version may have other names, and then there is no kernel.
    latent_kernel = None

_BLOCK_SIZE = 64
_PAIRS = (32, 64)
_DIMS = (64, 128)
_PIECE = 32
"""Bytes of a token's codes that are made numbers together: more leave no registers."""
RANKS = 2 * _PIECE
"""What divides the rank of latents."""
_CHANNELS = 64
"""Of a group of values: a product of four warps has as many rows."""
_ALIGNMENT = 16
"""Of what is copied at a time, in bytes."""
COLUMNS = 16
"""Query rows of a program that it has registers for; it would have to expand keys once more for
others."""
_SLOTS = 3
"""Blocks whose scales are in shared memory."""
_SHARED_BYTES = 227 << 10
_OTHER_BYTES = 1 << 10
"""Of a program, that the GPU takes for itself."""
_MOST_PROGRAMS = 2
"""Of a processor, that it has registers for."""


def reason_against(
    q_RTHD: Tensor,
    keys: Latents,
    expansion: KeyExpansion,
    values: ValuePages,
    attention: Attention,
) -> str | None:
    """Why the kernel does not serve these arguments; None: it does."""
    if (
        latent_kernel is None
        or not triton.__version__.startswith("3.6.")
        or q_RTHD.device.type != "cuda"
        or torch.cuda.get_device_capability(q_RTHD.device) != (9, 0)
    ):
        return "it is for Hopper and Triton 3.6"
    num_rows = q_RTHD.shape[1] * q_RTHD.shape[2] // expansion.up_KJCE.shape[0]
    if num_rows > COLUMNS or attention.scale <= 0:
        return f"{num_rows} query rows, a scale of {attention.scale}"
    return format_against(keys, expansion, values)


def format_against(keys: Latents, expansion: KeyExpansion, values: ValuePages) -> str | None:
    """The same of the formats alone."""
    if not isinstance(keys, LatentPages) or not isinstance(values, RotatedPages | IntegerPages):
        return "it is for latents of one section beside rotated values or integers"
    form = SectionForm.of(keys, _PIECE)
    block_size = keys.codes.shape[3]
    if block_size != _BLOCK_SIZE or form.bits != 4 or form.is_rotated:
        return f"blocks of {block_size}, latents of {form.bits} bits"
    if form.groups != 1 or form.scale_bits != 16 or form.rank % RANKS:
        return f"{form.groups} groups, scales of {form.scale_bits} bits, a rank of {form.rank}"
    value = ValueFormat.of(values, block_size)
    num_heads, num_pairs = expansion.up_KJCE.shape[0], expansion.up_KJCE.shape[3]
    if value.num_heads != num_heads or value.dim not in _DIMS or num_pairs not in _PAIRS:
        return f"{num_pairs} pairs of channels, values of {value.num_heads} x {value.dim}"
    if value.scale_bits != 16 or value.dim % (_CHANNELS * value.groups):
        return f"{value.groups} groups of {value.dim} channels, {value.scale_bits} bits of scales"
    planes = [*section_planes(keys), *value_planes(values)[0]]
    if any(plane.stride(0) * plane.element_size() % _ALIGNMENT for plane in planes):
        return f"pages that do not begin at multiples of {_ALIGNMENT} bytes"
    return None


def shared_bytes(rank: int, num_pairs: int, form: ValueFormat, columns: int) -> int:
    """What a program has of shared memory."""
    up = 4 * rank * num_pairs
    queries_and_scores = 4 * num_pairs * columns + 4 * _BLOCK_SIZE * columns
    line = int(triton.next_power_of_2(rank // 2)) * 4
    codes = form.dim * int(row_bytes(_BLOCK_SIZE, form.bits))
    planes = 1 if form.kind == ROTATED.value else 2
    values = codes + (codes // 2 if form.bits == 3 else 0) + 2 * planes * form.groups * _BLOCK_SIZE
    return up + queries_and_scores + 2 * _SLOTS * line + 2 * values


def default_settings(rank: int, num_pairs: int, form: ValueFormat, columns: int) -> DecodeSettings:
    """As many programs as have their part of `up` in a processor's shared memory: on an H100 two
    took 0.8 of the time of one (`tests/bench_results`)."""
    needed = shared_bytes(rank, num_pairs, form, columns) + _OTHER_BYTES
    return DecodeSettings(
        programs_per_processor=max(1, min(_MOST_PROGRAMS, _SHARED_BYTES // needed)),
        columns=columns,
    )


def splits(
    q_RTHD: Tensor,
    keys: Latents,
    expansion: KeyExpansion,
    values: ValuePages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
    kernel: Any = latent_kernel,
) -> SplitPartials:
    """As `latent_decode.latent_splits`, whose definition is this one's. Of the settings, those of
    the grid and `late_ns`. `kernel`: what to launch instead, with the same arguments.

    Raises: ValueError for arrays that do not go together, or that the kernel does not read.
    """
    against = format_against(keys, expansion, values)
    if against or not isinstance(keys, LatentPages) or isinstance(values, LatentPages):
        raise ValueError(f"latents in Gluon: {against}")
    num_kv_heads, _, rank, num_pairs = expansion.up_KJCE.shape
    if keys.rank != rank or expansion.dim != q_RTHD.shape[3]:
        raise ValueError(f"latents of {keys.rank} numbers and a way back from {rank}")
    form = ValueFormat.of(values, _BLOCK_SIZE)
    columns = max(8, triton.next_power_of_2(q_RTHD.shape[1] * q_RTHD.shape[2] // num_kv_heads))
    chosen = settings or default_settings(rank, num_pairs, form, min(COLUMNS, columns))
    launch = plan_launch(q_RTHD, rows, attention, chosen, num_kv_heads=num_kv_heads, dim_v=form.dim)
    options = {k: v for k, v in launch.constants.items() if k not in ("num_warps", "num_stages")}
    k_planes = (keys.codes, keys.scale, keys.zero)
    v_planes = value_planes(values)[0][:4]
    kernel[launch.grid](
        q_RTHD,
        *expansion[:4],
        *k_planes,
        *v_planes,
        *launch.arguments,
        *page_strides(k_planes),
        *page_strides(v_planes),
        **options,
        BLOCK_SIZE=_BLOCK_SIZE,
        PAGE_BLOCKS=keys.codes.shape[1],
        DIM=q_RTHD.shape[3],
        PAIRS=num_pairs,
        RANK=rank,
        PIECE=_PIECE,
        DIM_V=form.dim,
        V_BITS=form.bits,
        V_GROUPS=form.groups,
        IS_ROTATED=form.kind == ROTATED.value,
        LATE_NS=chosen.late_ns,
        num_warps=4,
    )
    return launch.found
