"""The recorded steps of a rank, where there are kernels to record."""

from typing import TYPE_CHECKING

from kvcluster.attention.implementation import Implementation
from kvcluster.cache.store import KVStore
from kvcluster.model.loader import LoadedModel

if TYPE_CHECKING:
    from kvcluster.model.decode_graphs import DecodeGraphs


def decode_graphs(
    model: LoadedModel, store: KVStore, implementation: Implementation
) -> "DecodeGraphs | None":
    """None where rows are not read by kernels."""
    if implementation.rows is None:
        return None
    # Only here: kernels want Triton, which a machine without a GPU need not have.
    from kvcluster.attention.kernel_attention import KernelAttention
    from kvcluster.model.decode_graphs import DecodeGraphs

    if not isinstance(implementation, KernelAttention):
        return None
    return DecodeGraphs(model, store, implementation)
