"""The definition of prefill over encoded blocks in plain PyTorch: blocks are restored, then
attended to.

Shape letters: those of `packed_prefill.py`.
"""

import torch
from torch import Tensor

from kvcluster_kernels import packed_plain, prefill_reference
from kvcluster_kernels.float8_decode import Float8Pages
from kvcluster_kernels.integer_decode import IntegerPages
from kvcluster_kernels.packed_prefill import History, check_history
from kvcluster_kernels.prefill_arguments import Keys, PartialAttention


def prefill_packed(
    q_THD: Tensor,
    history: History,
    *,
    scale: float,
    carry: PartialAttention | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> PartialAttention:
    """As the kernel; computed in float64 where queries are, else in float32.

    Raises: ValueError when shapes do not fit.
    """
    check_history(q_THD, history, scale, carry)
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    keys = restored(history, q_THD.shape[2], dtype)
    return prefill_reference.prefill(q_THD, keys, scale=scale, carry=carry, out_dtype=out_dtype)


def restored(history: History, key_dim: int, dtype: torch.dtype) -> Keys:
    """The keys and values of the history, in line."""
    num_blocks = -(-history.num_keys // history.block_tokens)
    blocks_1N = history.blocks_N[None, :num_blocks]
    planes = []
    for pages, contiguous in ((history.keys, key_dim), (history.values, history.block_tokens)):
        if isinstance(pages, Float8Pages):
            planes.append(packed_plain.restore_float8(pages, blocks_1N, dtype))
        else:
            assert isinstance(pages, IntegerPages)
            planes.append(packed_plain.restore_integers(pages, blocks_1N, contiguous, dtype))
    k_KSD, v_KSD = (packed_plain.in_line(x)[0] for x in (planes[0], planes[1].transpose(3, 4)))
    num_keys = history.num_keys
    return Keys.in_line(k_KSD[:, :num_keys].contiguous(), v_KSD[:, :num_keys].contiguous())
