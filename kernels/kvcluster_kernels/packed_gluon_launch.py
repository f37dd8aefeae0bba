"""Launches the packed decode kernel for Hopper, where it serves the call.

Shape letters: those of `paging.py`.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kvcluster_kernels.packed_launch import page_strides, plan_launch
from kvcluster_kernels.paging import (
    Attention,
    DecodeSettings,
    PagedRows,
    SplitPartials,
    overlaps,
)

try:
    from kvcluster_kernels.packed_gluon import packed_kernel
except (ImportError, AttributeError):
    # Experimental in Triton: another version may have other names, and then there is no kernel.
    packed_kernel = None

_BITS = (8, 4, 3, 2)
_DIMS = (64, 128, 256)
_BLOCK_SIZES = (64, 128)
_COLUMNS = 16
"""Query rows of a program that one warp has room for. Several programs unpack the same codes where
there are more, in fewer instructions still than those of the kernels for any GPU, which spill."""
_LEAST_BYTES = 16
"""Of a row of codes, or of their lower two bits: a product is of 16 numbers at least."""


class Planes(NamedTuple):
    """One array as the kernel reads it, `[pages, blocks of a page, ...]`."""

    codes: Tensor
    """[P, N, K, S, D * bits / 8] of keys, [P, N, K, D, S * bits / 8] of values; of 3 bits the lower
    two."""
    high: Tensor | None
    """Of 3 bits, the third."""
    scale: Tensor
    zero: Tensor | None
    """Zero-points; of rotated keys, their mean."""
    unit: Tensor | None
    """Of scales of 8 bits."""


class Codes(NamedTuple):
    """What the codes of keys and of values are."""

    k_bits: int
    v_bits: int
    k_groups: int = 1
    """Groups of tokens of a block that have scales of their own."""
    v_groups: int = 1
    """Groups of channels, likewise."""
    rotated_q_RTHD: Tensor | None = None
    """Float32, where codes are levels of rotated vectors."""


def reason_against(
    q_RTHD: Tensor, keys: Planes, values: Planes, codes: Codes, attention: Attention
) -> str | None:
    """Why the kernel does not serve these arguments; None: it does."""
    if (
        packed_kernel is None
        or not triton.__version__.startswith("3.6.")
        or q_RTHD.device.type != "cuda"
        or torch.cuda.get_device_capability(q_RTHD.device) != (9, 0)
    ):
        return "it is for Hopper and Triton 3.6"
    block_size, dim_v = keys.codes.shape[3], values.codes.shape[3]
    width = min(keys.codes.shape[4], values.codes.shape[4])
    fields = 4 if codes.v_bits in (2, 3) else 8 // codes.v_bits
    if q_RTHD.shape[3] not in _DIMS or dim_v not in _DIMS or block_size not in _BLOCK_SIZES:
        return f"heads of {q_RTHD.shape[3]} and {dim_v}, blocks of {block_size}"
    if width < _LEAST_BYTES or block_size // codes.k_groups < _LEAST_BYTES:
        return f"rows of {width} bytes, groups of {block_size // codes.k_groups} tokens"
    if codes.v_bits == 3 and codes.k_groups > fields:
        return f"{codes.k_groups} groups of tokens with values of 3 bits"
    return None if attention.scale > 0 else f"a scale of {attention.scale}"


def default_settings(codes: Codes) -> DecodeSettings:
    """The best at 128K tokens that was measured on an H100 (`tests/bench_results`). A block ahead
    is enough where more time goes into codes than into the bytes of the next."""
    bits = max(codes.k_bits, codes.v_bits)
    if bits == 8:
        return DecodeSettings(num_stages=2, programs_per_processor=6, columns=_COLUMNS)
    num_stages = 3 if bits == 4 and codes.rotated_q_RTHD is None else 2
    return DecodeSettings(num_stages=num_stages, programs_per_processor=8, columns=_COLUMNS)


def splits(
    q_RTHD: Tensor,
    keys: Planes,
    values: Planes,
    codes: Codes,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
    kernel: Any = packed_kernel,
    *,
    begins_early: bool = False,
) -> SplitPartials:
    """As `integer_decode.integer_splits` and `rotated_decode.rotated_splits`, whose definitions are
    this one's. `num_stages` are blocks whose bytes are there or under way; a program is one warp.
    `kernel`: what to launch instead, with the same arguments.

    Raises: ValueError for arrays that do not go together.
    """
    num_kv_heads, block_size = keys.codes.shape[2:4]
    dim_v = values.codes.shape[3]
    launch = plan_launch(
        q_RTHD,
        rows,
        attention,
        settings or default_settings(codes),
        num_kv_heads=num_kv_heads,
        dim_v=dim_v,
    )
    early = begins_early and overlaps(q_RTHD.device)
    options = {k: v for k, v in launch.constants.items() if k not in ("num_warps", "num_stages")}
    kernel[launch.grid](
        q_RTHD if codes.rotated_q_RTHD is None else codes.rotated_q_RTHD,
        q_RTHD,
        *pointers(keys),
        *pointers(values),
        *launch.arguments,
        *page_strides(keys),
        *page_strides(values),
        **options,
        BLOCK_SIZE=block_size,
        PAGE_BLOCKS=keys.codes.shape[1],
        DIM_K=q_RTHD.shape[3],
        DIM_V=dim_v,
        K_BITS=codes.k_bits,
        V_BITS=codes.v_bits,
        K_GROUPS=codes.k_groups,
        V_GROUPS=codes.v_groups,
        SCALE_BITS=16 if keys.unit is None else 8,
        IS_ROTATED=codes.rotated_q_RTHD is not None,
        HAS_MEAN=codes.rotated_q_RTHD is not None and keys.zero is not None,
        STAGES=launch.constants["num_stages"],
        BEGINS_EARLY=early,
        num_warps=1,
        launch_pdl=early,
    )
    return launch.found


def pointers(planes: Planes) -> list[Tensor]:
    """Another plane stands for one that is not there."""
    return [planes.codes if plane is None else plane for plane in planes]
