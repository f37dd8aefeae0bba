"""Prefill attention over lists of encoded blocks, which are restored first.

Shape letters: those of `sparse_prefill.py`.
"""

from torch import Tensor

from kvcluster_kernels.latent_history import LatentHistory, check_latents, in_order_of
from kvcluster_kernels.packed_history import AnyHistory, restored
from kvcluster_kernels.prefill_arguments import Keys, PartialAttention
from kvcluster_kernels.rotated_history import RotatedHistory, check_rotated
from kvcluster_kernels.sparse_prefill import TileBlocks, sparse_prefill


def prefill_chosen(
    q_THD: Tensor,
    history: AnyHistory | Keys,
    chosen: TileBlocks,
    *,
    scale: float,
    softcap: float | None = None,
) -> PartialAttention:
    """As `sparse_prefill` without a mask; lists have places of blocks in the history, all of which
    is restored, to the dtype of the queries. Keys are such already.

    Raises: ValueError when shapes do not fit.
    """
    if isinstance(history, Keys):
        return sparse_prefill(q_THD, history, chosen, scale=scale, softcap=softcap)
    if isinstance(history, RotatedHistory):
        check_rotated(q_THD, history)
        rotation_DD = history.rotation_DD
        q_THD = (q_THD.float() @ rotation_DD.T).to(q_THD.dtype)
    elif isinstance(history, LatentHistory):
        check_latents(q_THD, history)
        q_THD = in_order_of(q_THD, history.expansion)
    keys = restored(history, q_THD.shape[2], q_THD.dtype)
    found = sparse_prefill(q_THD, keys, chosen, scale=scale, softcap=softcap)
    if isinstance(history, RotatedHistory):
        return found._replace(out_THD=found.out_THD @ history.rotation_DD)
    return found
