"""Decode over paged caches of packed formats in PyTorch: the definitions of the kernels, on any
device. Blocks are gathered and restored to numbers, then attended to.

Shape letters: those of `paging.py`; S tokens of a block or of a row in line, L and C the second
last and the last axis as stored, G groups.
"""

import torch
from torch import Tensor

from kvcluster_kernels.decode_plain import attend_tokens
from kvcluster_kernels.float8_decode import Float8Pages
from kvcluster_kernels.integer_decode import IntegerPages, code_bits
from kvcluster_kernels.levels import levels
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, Partial
from kvcluster_kernels.rotated_decode import RotatedPages
from kvcluster_kernels.rotated_decode import code_bits as rotated_bits


def decode_integers(
    q_RTHD: Tensor,
    keys: IntegerPages,
    values: IntegerPages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,  # noqa: ARG001
) -> Partial:
    """As the kernel; computed in float64 where queries are, else in float32."""
    dtype = torch.promote_types(q_RTHD.dtype, torch.float32)
    k_RBKSD = restore_integers(keys, rows.blocks_RB, q_RTHD.shape[3], dtype)
    v_RBKDS = restore_integers(values, rows.blocks_RB, k_RBKSD.shape[3], dtype)
    return attend_tokens(
        q_RTHD, in_line(k_RBKSD), in_line(v_RBKDS.transpose(3, 4)), rows, attention
    )


def restore_integers(
    pages: IntegerPages, blocks_RB: Tensor, contiguous: int, dtype: torch.dtype
) -> Tensor:
    """x_RBKLC of the blocks: zero + scale * code."""
    bits = code_bits(pages, contiguous)
    codes = _codes_of(pages, bits, blocks_RB).to(dtype)
    scale, zero = (gather_blocks(plane, blocks_RB) for plane in (pages.scale, pages.zero))
    if pages.unit is None:
        step, offset = scale.to(dtype), zero.to(dtype)
    else:
        unit = gather_blocks(pages.unit, blocks_RB)[..., None, None].to(dtype)
        step = (scale.to(torch.int16) << 5).view(torch.float16).to(dtype) * unit
        offset = step * zero.to(dtype)
    group = codes.shape[3] // step.shape[3]
    return codes * step.repeat_interleave(group, 3) + offset.repeat_interleave(group, 3)


def _codes_of(pages: IntegerPages | RotatedPages, bits: int, blocks_RB: Tensor) -> Tensor:
    if pages.high is None:
        return unpack(gather_blocks(pages.codes, blocks_RB), bits)
    low = unpack(gather_blocks(pages.codes, blocks_RB), 2)
    return low | unpack(gather_blocks(pages.high, blocks_RB), 1) << 2


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes, uint8, of bytes whose fields are the parts of the last axis, lowest bits first."""
    if bits == 8:
        return packed.view(torch.uint8) ^ 0x80
    mask = (1 << bits) - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


def gather_blocks(plane: Tensor, blocks_RB: Tensor) -> Tensor:
    """Blocks of an array `[pages, blocks of a page, ...]`, by row."""
    ids_RB = blocks_RB.long()
    return plane[ids_RB // plane.shape[1], ids_RB % plane.shape[1]]


def in_line(x_RBKSD: Tensor) -> Tensor:
    """x_RKSD: a row's blocks one after another."""
    return x_RBKSD.transpose(1, 2).flatten(2, 3)


def decode_float8(
    q_RTHD: Tensor,
    keys: Float8Pages,
    values: Float8Pages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,  # noqa: ARG001
) -> Partial:
    """As the kernel; computed in float64 where queries are, else in float32."""
    dtype = torch.promote_types(q_RTHD.dtype, torch.float32)
    k_RBKSD = restore_float8(keys, rows.blocks_RB, dtype)
    v_RBKDS = restore_float8(values, rows.blocks_RB, dtype)
    return attend_tokens(
        q_RTHD, in_line(k_RBKSD), in_line(v_RBKDS.transpose(3, 4)), rows, attention
    )


def restore_float8(pages: Float8Pages, blocks_RB: Tensor, dtype: torch.dtype) -> Tensor:
    """x_RBKLC of the blocks: scale * value."""
    scale = gather_blocks(pages.scale, blocks_RB)[..., None, None].to(dtype)
    # Blocks are picked as bytes: not every device indexes float8.
    stored = gather_blocks(pages.values.view(torch.uint8), blocks_RB)
    return stored.view(torch.float8_e4m3fn).to(dtype) * scale


def decode_rotated(
    q_RTHD: Tensor,
    keys: RotatedPages,
    values: RotatedPages,
    rotation_DD: Tensor,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,  # noqa: ARG001
) -> Partial:
    """As the kernel; computed in float64 where queries are, else in float32."""
    dtype = torch.promote_types(q_RTHD.dtype, torch.float32)
    rotation_DD = rotation_DD.to(dtype)
    k_RBKSD = restore_rotated_keys(keys, rotation_DD, rows.blocks_RB)
    v_RBKSD = restore_rotated_values(values, rotation_DD, rows.blocks_RB)
    return attend_tokens(q_RTHD, in_line(k_RBKSD), in_line(v_RBKSD), rows, attention)


def restore_rotated_keys(pages: RotatedPages, rotation_DD: Tensor, blocks_RB: Tensor) -> Tensor:
    """k_RBKSD: mean + scale * R^T level[code], in the dtype of the rotation."""
    level_RBKSD = levels_of(pages, rotation_DD.shape[0], rotation_DD.dtype, blocks_RB)
    scale_RBKS1 = gather_blocks(pages.scale, blocks_RB)[..., None]
    k_RBKSD = (level_RBKSD * scale_RBKS1) @ rotation_DD
    if pages.mean is not None:
        k_RBKSD = k_RBKSD + gather_blocks(pages.mean, blocks_RB)[:, :, :, None]
    return k_RBKSD


def restore_rotated_values(pages: RotatedPages, rotation_DD: Tensor, blocks_RB: Tensor) -> Tensor:
    """v_RBKSD, likewise."""
    scale_RBKS = gather_blocks(pages.scale, blocks_RB)
    level_RBKDS = levels_of(pages, scale_RBKS.shape[3], rotation_DD.dtype, blocks_RB)
    return (level_RBKDS * scale_RBKS[..., None, :]).transpose(3, 4) @ rotation_DD


def levels_of(
    pages: RotatedPages, contiguous: int, dtype: torch.dtype, blocks_RB: Tensor
) -> Tensor:
    """Levels of the codes of blocks, in the order that codes are stored in."""
    bits = rotated_bits(pages, contiguous)
    codes = _codes_of(pages, bits, blocks_RB)
    return levels(bits).to(pages.codes.device, dtype)[codes.int()]
