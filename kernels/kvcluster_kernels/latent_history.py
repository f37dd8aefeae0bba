"""Histories of latents for prefill: each latent is expanded once to the keys and values of all KV
heads, which any prefill kernel takes.

Attention of the latents themselves would be over heads as wide as the rank: of 256 and more, where
keys have 128 numbers. The expansion is a matrix product of 2 r K D operations a token, beside the
4 T H D of T query tokens of H heads: of 4,096 tokens of 32 heads of 128, r K D over 33.5 million,
which is one part in 128 at r K D = 256 * 1024.

Shape letters: those of `latent_pages.py`; T query tokens, H query heads, S tokens of a block or of
the history in line, N blocks of a sequence.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.codes import dot, has_assembly
from kvcluster_kernels.float8_decode import Float8Pages
from kvcluster_kernels.integer_decode import IntegerPages, code_bits
from kvcluster_kernels.latent_pages import (
    KeyExpansion,
    LatentPages,
    Latents,
    LatentSections,
    sections_of,
)
from kvcluster_kernels.latent_restore import restore_numbers, restore_values
from kvcluster_kernels.latent_turns import cos_and_sin
from kvcluster_kernels.latent_values import ValuePages
from kvcluster_kernels.packed_restore import restore_columns, restore_rows
from kvcluster_kernels.prefill_arguments import Keys
from kvcluster_kernels.rotated_decode import RotatedPages

_BLOCK_S = 128
_BLOCK_C = 64
_NUM_WARPS = 8
_NUM_STAGES = 3
_MAX_KERNEL_RANK = 1024
"""Of latents that a kernel unpacks: a program has those of a block."""


class LatentHistory(NamedTuple):
    """Encoded blocks of one sequence, of which keys are latents."""

    keys: Latents
    expansion: KeyExpansion
    values: ValuePages | Float8Pages
    """Latents with `value_expansion`; without it, numbers of 16 bits of each KV head. Rotated ones
    with `rotation_DD`."""
    value_expansion: KeyExpansion | None
    """Made without a rotation."""
    blocks_N: Tensor
    """int32: the ids of the sequence's blocks in the pages, in order."""
    positions_N: Tensor
    """int32: of each block's first token, which the others follow."""
    num_keys: int
    """Tokens of these blocks; of the last one, those behind it are not read."""
    key_dim: int
    """Channels of a key's head. An expansion knows them as well, on the device alone."""
    value_dim: int
    rotation_DD: Tensor | None = None
    """What rotated values are multiplied with to be rotated back."""

    @property
    def block_tokens(self) -> int:
        return int(sections_of(self.keys)[0].codes.shape[3])

    @property
    def num_kv_heads(self) -> int:
        return int(self.expansion.up_KJCE.shape[0])

    def part(self, first: int, end: int, num_keys: int) -> "LatentHistory":
        """Of some blocks."""
        return self._replace(
            blocks_N=self.blocks_N[first:end],
            positions_N=self.positions_N[first:end],
            num_keys=num_keys,
        )


def check_latents(q_THD: Tensor, history: LatentHistory) -> None:
    """Raises: ValueError when shapes do not fit, with what was expected."""
    num_heads, dim = q_THD.shape[1:]
    if num_heads % history.num_kv_heads or dim != history.key_dim:
        raise ValueError(
            f"latent prefill: {num_heads} query heads of {dim}, {history.num_kv_heads} KV heads of "
            f"{history.key_dim}"
        )
    rank = sum(section.rank for section in sections_of(history.keys))
    if rank != history.expansion.up_KJCE.shape[2]:
        raise ValueError(f"latent prefill: latents of {rank} numbers, another way back")
    if len(history.positions_N) != len(history.blocks_N):
        raise ValueError("latent prefill: want the position of each block")
    if history.num_keys > len(history.blocks_N) * history.block_tokens:
        raise ValueError(f"latent prefill: {history.num_keys} keys do not fit into the blocks")


def in_order_of(q_THD: Tensor, expansion: KeyExpansion) -> Tensor:
    """Queries with their channels in the order of expanded keys: first ones of all pairs first."""
    return q_THD[..., expansion.channels_JE[:, : q_THD.shape[2] // 2].flatten()]


def restore_latents(history: LatentHistory, dtype: torch.dtype) -> Keys:
    """All keys, in the order of `in_order_of`, and values of the history, in new memory. On a CPU
    in Triton's interpreter. `latent_plain.restore_keys` and `restore_values` are the definition.

    Raises: ValueError for planes that do not go together.
    """
    blocks_N = history.blocks_N[: triton.cdiv(history.num_keys, history.block_tokens)]
    num_heads, num_slots = history.num_kv_heads, len(blocks_N) * history.block_tokens
    expansion, values = history.expansion, history.values
    k_KSD = blocks_N.new_empty((num_heads, num_slots, history.key_dim), dtype=dtype)
    _expand(_latents_in_line(history.keys, blocks_N), expansion, history.positions_N, k_KSD)
    v_KSD = blocks_N.new_empty((num_heads, num_slots, history.value_dim), dtype=dtype)
    if isinstance(values, RotatedPages):
        assert history.rotation_DD is not None, "rotated values without their rotation"
        stored_KSD = restore_values(values, blocks_N, history.block_tokens)
        v_KSD.copy_(stored_KSD @ history.rotation_DD.half())
    elif history.value_expansion is not None:
        assert isinstance(values, LatentPages | LatentSections), "values that are no latents"
        _expand(_latents_in_line(values, blocks_N), history.value_expansion, None, v_KSD)
    elif isinstance(values, LatentPages):
        v_KNSD = v_KSD.view(num_heads, len(blocks_N), history.block_tokens, history.value_dim)
        v_KNSD.copy_(_gathered(values.codes, blocks_N).transpose(0, 1))
    else:
        assert not isinstance(values, LatentSections), "latents without a way back"
        bits = 0 if isinstance(values, Float8Pages) else code_bits(values, history.block_tokens)
        restore_columns(values, blocks_N, v_KSD, bits)
    return Keys(k_KSD[None], v_KSD[None], history.num_keys)


def _latents_in_line(pages: Latents, blocks_N: Tensor) -> Tensor:
    """x_SC, float16."""
    if isinstance(pages, LatentSections) or pages.rotated_rank is not None:
        return restore_numbers(pages, blocks_N)
    if pages.scale is None:
        return _gathered(pages.codes, blocks_N)[:, 0].flatten(0, 1)
    if pages.bits in (8, 4) and pages.rank <= _MAX_KERNEL_RANK and pages.zero is not None:
        integers = IntegerPages(pages.codes, pages.scale, pages.zero, pages.unit)
        num_slots = len(blocks_N) * pages.codes.shape[3]
        x_1SC = blocks_N.new_empty((1, num_slots, pages.rank), dtype=torch.float16)
        restore_rows(integers, blocks_N, x_1SC, pages.bits)
        return x_1SC[0]
    return restore_numbers(pages, blocks_N)


def _gathered(plane: Tensor, blocks_N: Tensor) -> Tensor:
    ids_N = blocks_N.long()
    return plane[ids_N // plane.shape[1], ids_N % plane.shape[1]]


def _expand(
    latents_SC: Tensor, expansion: KeyExpansion, positions_N: Tensor | None, x_KSD: Tensor
) -> None:
    """Write what latents stand for; turned where blocks have positions."""
    num_heads, num_slots, dim = x_KSD.shape
    rank, num_pairs = expansion.up_KJCE.shape[2:]
    _expand_kernel[(triton.cdiv(num_slots, _BLOCK_S), num_heads)](
        latents_SC,
        expansion.up_KJCE,
        expansion.mean_KJE,
        expansion.frequencies_E,
        expansion.channels_JE if positions_N is None else positions_N,
        x_KSD,
        num_slots,
        RANK=rank,
        PAIRS=num_pairs,
        DIM=dim,
        BLOCK_TOKENS=1 if positions_N is None else num_slots // len(positions_N),
        BLOCK_S=_BLOCK_S,
        BLOCK_C=_BLOCK_C,
        HAS_POSITIONS=positions_N is not None,
        IS_GPU=has_assembly(_expand_kernel),
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
    )


@triton.jit(do_not_specialize=("num_slots",), do_not_specialize_on_alignment=("positions_ptr",))
def _expand_kernel(
    latents_ptr: tl.tensor,
    up_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    frequencies_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    x_ptr: tl.tensor,
    num_slots: tl.tensor,
    RANK: tl.constexpr,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> None:
    HALF: tl.constexpr = DIM // 2
    head = tl.program_id(1)
    slots_S = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    is_slot_S = slots_S < num_slots
    offs_c, offs_e = tl.arange(0, BLOCK_C), tl.arange(0, PAIRS)
    rows_S = latents_ptr + slots_S.to(tl.int64) * RANK
    up_ptr += head * (2 * RANK * PAIRS)
    first_SE = tl.zeros([BLOCK_S, PAIRS], tl.float32)
    second_SE = tl.zeros([BLOCK_S, PAIRS], tl.float32)
    for c in tl.range(0, RANK, BLOCK_C):
        if RANK % BLOCK_C == 0:
            latent_SC = tl.load(
                rows_S[:, None] + (c + offs_c)[None, :], mask=is_slot_S[:, None], other=0.0
            )
            up_ptrs = up_ptr + (c + offs_c)[:, None] * PAIRS + offs_e[None, :]
            up_first_CE = tl.load(up_ptrs)
            up_second_CE = tl.load(up_ptrs + RANK * PAIRS)
        else:
            mask_C = c + offs_c < RANK
            latent_SC = tl.load(
                rows_S[:, None] + (c + offs_c)[None, :],
                mask=is_slot_S[:, None] & mask_C[None, :],
                other=0.0,
            )
            up_ptrs = up_ptr + (c + offs_c)[:, None] * PAIRS + offs_e[None, :]
            up_first_CE = tl.load(up_ptrs, mask=mask_C[:, None], other=0.0)
            up_second_CE = tl.load(up_ptrs + RANK * PAIRS, mask=mask_C[:, None], other=0.0)
        first_SE = dot(latent_SC, up_first_CE, first_SE, IS_GPU)
        second_SE = dot(latent_SC, up_second_CE, second_SE, IS_GPU)
    mean_ptr += head * (2 * PAIRS)
    first_SE += tl.load(mean_ptr + offs_e)[None, :]
    second_SE += tl.load(mean_ptr + PAIRS + offs_e)[None, :]
    if HAS_POSITIONS:
        starts_S = tl.load(positions_ptr + slots_S // BLOCK_TOKENS, mask=is_slot_S, other=0)
        position_S = (starts_S + slots_S % BLOCK_TOKENS).to(tl.float32)
        frequency_E = tl.load(frequencies_ptr + offs_e)
        cos_SE, sin_SE = cos_and_sin(position_S[:, None] * frequency_E[None, :], IS_GPU)
        turned_SE = first_SE * cos_SE - second_SE * sin_SE
        second_SE = second_SE * cos_SE + first_SE * sin_SE
        first_SE = turned_SE
    own_S = x_ptr + (head.to(tl.int64) * num_slots + slots_S) * DIM
    mask_SE = is_slot_S[:, None] & (offs_e < HALF)[None, :]
    pointers = own_S[:, None] + offs_e[None, :]
    tl.store(pointers, first_SE.to(x_ptr.dtype.element_ty), mask=mask_SE)
    tl.store(pointers + HALF, second_SE.to(x_ptr.dtype.element_ty), mask=mask_SE)
