"""Prefill attention over a history of encoded blocks, the faster way.

Where many query rows share keys, these are restored once, at the speed of memory, and the kernels
for 16-bit numbers attend to them: so many at a time as a workspace of a fixed size holds, which is
all the memory that it takes. Where few do, blocks are read as they are stored; latents, rotated
vectors and codes of 3 bits never are.

Shape letters: those of `packed_prefill.py`.
"""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from kvcluster_kernels import prefill_gluon, prefill_tl
from kvcluster_kernels.latent_history import (
    LatentHistory,
    check_latents,
    in_order_of,
    restore_latents,
)
from kvcluster_kernels.merge import merge
from kvcluster_kernels.packed_prefill import (
    History,
    check_history,
    has_thirds,
    prefill_packed,
)
from kvcluster_kernels.packed_restore import restore
from kvcluster_kernels.paging import num_processors
from kvcluster_kernels.prefill_arguments import Keys, PartialAttention
from kvcluster_kernels.rotated_history import RotatedHistory, check_rotated, restore_rotated

AnyHistory = History | LatentHistory | RotatedHistory

MIN_RESTORED_ROWS = 128
"""Query rows of a KV head (tokens times the query heads that share it) from which on keys are
restored. On an H100, 1,024 rows over 128K keys of 8 heads of 128 took `prefill_packed` 3.7 ms (fp8,
int4) and 5.5 ms (int8), which goes with the rows; restoring took 0.28 ms, and reading what was
restored takes 0.19 ms at least."""
_PIPELINED_ROWS = 128
"""Of a program of the pipelined kernel, or more: with fewer programs than processors, the portable
one is faster, which splits the keys."""
_WORKSPACE_BYTES = 1 << 30


def prefill_history(
    q_THD: Tensor,
    history: AnyHistory,
    *,
    scale: float,
    carry: PartialAttention | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> PartialAttention:
    """As `packed_prefill.prefill_packed`, by whichever of the two is faster.

    Raises: ValueError when shapes do not fit.
    """
    if not isinstance(history, History) or has_thirds(history):
        return prefill_restored(q_THD, history, scale=scale, carry=carry, out_dtype=out_dtype)
    check_history(q_THD, history, scale, carry)
    rows = q_THD.shape[0] * (q_THD.shape[1] // history.num_kv_heads)
    attend = prefill_restored if rows >= MIN_RESTORED_ROWS else prefill_packed
    return attend(q_THD, history, scale=scale, carry=carry, out_dtype=out_dtype)


def prefill_restored(
    q_THD: Tensor,
    history: AnyHistory,
    *,
    scale: float,
    carry: PartialAttention | None = None,
    out_dtype: torch.dtype = torch.float32,
    workspace_bytes: int = _WORKSPACE_BYTES,
) -> PartialAttention:
    """The same over keys and values restored to the dtype of the queries, as many at a time as
    `workspace_bytes` hold, and a block at least.

    Raises: ValueError when shapes do not fit.
    """
    if isinstance(history, RotatedHistory):
        check_rotated(q_THD, history)
        rotation_DD = history.rotation_DD
        q_THD = (q_THD.float() @ rotation_DD.T).to(q_THD.dtype)
        found = _over_pieces(q_THD, history, scale, None, torch.float32, workspace_bytes)
        found = found._replace(out_THD=found.out_THD @ rotation_DD)
        partials = [found] if carry is None else [found, carry]
        return merge(partials, out_dtype=out_dtype)
    if isinstance(history, LatentHistory):
        check_latents(q_THD, history)
        q_THD = in_order_of(q_THD, history.expansion)
    else:
        check_history(q_THD, history, scale, carry)
    return _over_pieces(q_THD, history, scale, carry, out_dtype, workspace_bytes)


def _over_pieces(
    q_THD: Tensor,
    history: AnyHistory,
    scale: float,
    carry: PartialAttention | None,
    out_dtype: torch.dtype,
    workspace_bytes: int,
) -> PartialAttention:
    dim = q_THD.shape[2]
    bytes_per_token = history.num_kv_heads * (dim + history.value_dim) * q_THD.element_size()
    pieces = list(_pieces(history, max(1, workspace_bytes // bytes_per_token)))
    for index, piece in enumerate(pieces):
        is_last = index == len(pieces) - 1
        keys = restored(piece, dim, q_THD.dtype)
        carry = _attend(q_THD, keys, scale, carry, out_dtype if is_last else torch.float32)
    assert carry is not None
    return carry


def restored(piece: AnyHistory, dim: int, dtype: torch.dtype) -> Keys:
    """Keys of so many numbers, and values, as their kind is restored: rotated ones still are, and
    keys of latents are in the order of `in_order_of`."""
    if isinstance(piece, LatentHistory):
        return restore_latents(piece, dtype)
    if isinstance(piece, RotatedHistory):
        return restore_rotated(piece, dtype)
    return restore(piece, dim, dtype)


def _pieces(history: AnyHistory, num_tokens: int) -> Iterator[AnyHistory]:
    """Histories of at most so many tokens, or of one block; one of nothing where there is none."""
    blocks = max(1, num_tokens // history.block_tokens)
    for first in range(0, max(1, history.num_keys), blocks * history.block_tokens):
        first_block = first // history.block_tokens
        num_keys = min(history.num_keys - first, blocks * history.block_tokens)
        yield history.part(first_block, first_block + blocks, num_keys)


def _attend(
    q_THD: Tensor,
    keys: Keys,
    scale: float,
    carry: PartialAttention | None,
    out_dtype: torch.dtype,
) -> PartialAttention:
    num_programs = triton.cdiv(q_THD.shape[0], _PIPELINED_ROWS) * q_THD.shape[1]
    if (
        prefill_gluon.is_available(q_THD.device)
        and not prefill_gluon.reason_against(q_THD, keys)
        and num_programs >= num_processors(q_THD.device)
    ):
        return prefill_gluon.prefill(q_THD, keys, scale=scale, carry=carry, out_dtype=out_dtype)
    return prefill_tl.prefill(q_THD, keys, scale=scale, carry=carry, out_dtype=out_dtype)
