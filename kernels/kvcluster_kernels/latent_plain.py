"""Decode over paged latents in PyTorch: the definitions of the kernels, on any device.

Shape letters: those of `latent_pages.py`; S tokens of a block or of a row in line.
"""

import torch
from torch import Tensor

from kvcluster_kernels.decode_plain import attend_tokens
from kvcluster_kernels.integer_decode import IntegerPages
from kvcluster_kernels.latent_pages import KeyExpansion, LatentPages, Latents, sections_of
from kvcluster_kernels.latent_values import ValuePages
from kvcluster_kernels.packed_plain import gather_blocks, in_line, levels_of, restore_integers
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, Partial
from kvcluster_kernels.rotated_decode import RotatedPages


def decode_latents(
    q_RTHD: Tensor,
    keys: Latents,
    expansion: KeyExpansion,
    values: ValuePages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,  # noqa: ARG001
) -> Partial:
    """As the kernel; computed in float64 where queries are, else in float32."""
    dtype = torch.promote_types(q_RTHD.dtype, torch.float32)
    k_RKSD = restore_keys(keys, expansion, rows, dtype)
    v_RKSD = restore_values(values, rows.blocks_RB, sections_of(keys)[0].codes.shape[3], dtype)
    v_RKSD = v_RKSD.expand(-1, k_RKSD.shape[1], -1, -1)
    return attend_tokens(q_RTHD, k_RKSD, v_RKSD, rows, attention)


def restore_keys(
    keys: Latents, expansion: KeyExpansion, rows: PagedRows, dtype: torch.dtype
) -> Tensor:
    """k_RKSD of each row in line, at the positions of `rows`."""
    if rows.block_positions_RB is None:
        raise ValueError("latent keys are turned to their positions: give those of the blocks")
    latent_RSC = in_line(restore_latents(keys, rows.blocks_RB, dtype))[:, 0]
    k_RKSJE = torch.einsum("rsc,kjce->rksje", latent_RSC, expansion.up_KJCE.to(dtype))
    k_RKSJE = k_RKSJE + expansion.mean_KJE.to(dtype)[:, None]
    offsets_S = torch.arange(sections_of(keys)[0].codes.shape[3], device=latent_RSC.device)
    starts_RBE = rows.block_positions_RB[..., None].float() * expansion.frequencies_E
    steps_SE = offsets_S[:, None].float() * expansion.frequencies_E
    angles_RBSE = starts_RBE[:, :, None].to(dtype) + steps_SE.to(dtype)
    cos_R1SE, sin_R1SE = (f(angles_RBSE.flatten(1, 2))[:, None] for f in (torch.cos, torch.sin))
    first, second = k_RKSJE.unbind(-2)
    turned = torch.stack(
        [first * cos_R1SE - second * sin_R1SE, second * cos_R1SE + first * sin_R1SE], dim=-2
    )
    k_RKSD = turned.new_empty((*turned.shape[:3], expansion.dim))
    is_channel_JE = expansion.channels_JE >= 0
    k_RKSD[..., expansion.channels_JE[is_channel_JE].long()] = turned[..., is_channel_JE]
    return k_RKSD


def restore_latents(pages: Latents, blocks_RB: Tensor, dtype: torch.dtype) -> Tensor:
    """x_RBKSC of the blocks: what is stored."""
    parts = [_section(section, blocks_RB, dtype) for section in sections_of(pages)]
    return torch.cat(parts, dim=-1)


def _section(pages: LatentPages, blocks_RB: Tensor, dtype: torch.dtype) -> Tensor:
    if pages.scale is None:
        return gather_blocks(pages.codes, blocks_RB).to(dtype)
    if pages.rotated_rank is not None:
        rotated = RotatedPages(pages.codes, pages.scale, high=pages.high)
        scale_RBKS1 = gather_blocks(pages.scale, blocks_RB)[..., None].to(dtype)
        return levels_of(rotated, pages.rank, dtype, blocks_RB) * scale_RBKS1
    assert pages.zero is not None
    integers = IntegerPages(pages.codes, pages.scale, pages.zero, pages.unit, pages.high)
    return restore_integers(integers, blocks_RB, pages.rank, dtype)


def restore_values(
    pages: ValuePages, blocks_RB: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """x_RKSD of each row in line; of rotated values what they are before the rotation back."""
    if isinstance(pages, IntegerPages):
        x_RBKDS = restore_integers(pages, blocks_RB, block_size, dtype)
        return in_line(x_RBKDS.transpose(3, 4))
    if isinstance(pages, RotatedPages):
        level_RBKDS = levels_of(pages, block_size, dtype, blocks_RB)
        scale_RBKS = gather_blocks(pages.scale, blocks_RB).to(dtype)
        return in_line((level_RBKDS * scale_RBKS[..., None, :]).transpose(3, 4))
    return in_line(restore_latents(pages, blocks_RB, dtype))
