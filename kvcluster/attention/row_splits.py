"""What a step's rows find in each pool, before anything is merged: one kernel then merges it all.

Shape letters: R rows, T query tokens of a row, H query heads, D head dimension.
"""

from collections.abc import Mapping

from kvcluster_kernels.decode import ExactPages, decode_splits
from kvcluster_kernels.float8_decode import Float8Pages, float8_splits
from kvcluster_kernels.integer_decode import IntegerPages, integer_splits
from kvcluster_kernels.paging import Attention, PagedRows, SplitPartials
from torch import Tensor

from kvcluster.attention.packed_keys import PackedPages


def pool_splits(
    q_RTHD: Tensor,
    exact: tuple[ExactPages, PagedRows],
    encoded: Mapping[str, tuple[object, PagedRows]],
    asked: Attention,
) -> list[SplitPartials] | None:
    """Of the exact pool and of each codec's. None where something has to be done to what a kernel
    found before it can be merged, as with rotated vectors and latents. Each kernel begins beside
    the one before it, and the last one ends last."""
    if not all(_is_merged_as_it_is(pages) for pages, _ in encoded.values()):
        return None
    found = [decode_splits(q_RTHD, *exact, asked)]
    for pages, rows in encoded.values():
        assert isinstance(pages, PackedPages), "asked above"
        k, v = pages.keys, pages.values
        if isinstance(k, IntegerPages) and isinstance(v, IntegerPages):
            found.append(integer_splits(q_RTHD, k, v, rows, asked, begins_early=True))
        elif isinstance(k, Float8Pages) and isinstance(v, Float8Pages):
            found.append(float8_splits(q_RTHD, k, v, rows, asked, begins_early=True))
    return found


def _is_merged_as_it_is(pages: object) -> bool:
    return isinstance(pages, PackedPages) and all(
        isinstance(x, IntegerPages | Float8Pages) for x in (pages.keys, pages.values)
    )
