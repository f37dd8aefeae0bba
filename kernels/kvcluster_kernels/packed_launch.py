"""What the launches of packed decode kernels have in common. They read whole blocks, one at a time.

Shape letters: those of `paging.py`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton
from torch import Tensor

from kvcluster_kernels.paging import (
    Attention,
    DecodeSettings,
    PagedRows,
    SplitPartials,
    check_contiguous,
    check_positions,
    overlaps,
)


class Launch(NamedTuple):
    """A kernel's grid and the arguments that do not depend on the format."""

    found: SplitPartials
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    """`blocks_ptr` to `num_splits`."""
    constants: dict[str, Any]


def plan_launch(
    q_RTHD: Tensor,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings,
    *,
    num_kv_heads: int,
    dim_v: int,
) -> Launch:
    """Raises: ValueError for arrays that do not go together."""
    check_positions(rows, attention)
    check_contiguous(q_RTHD=q_RTHD, **rows._asdict())
    num_rows, num_tokens, num_heads, _ = q_RTHD.shape
    group = num_heads // num_kv_heads
    if group * num_kv_heads != num_heads:
        raise ValueError(f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly")
    block_m = min(settings.columns, max(8, triton.next_power_of_2(num_tokens * group)))
    row_tiles = triton.cdiv(num_tokens * group, block_m)
    num_splits = settings.splits(
        q_RTHD.device,
        num_programs=num_rows * num_kv_heads * row_tiles,
        num_tiles=rows.blocks_RB.shape[1],
    )
    found = SplitPartials.empty(q_RTHD, num_kv_heads=num_kv_heads, num_splits=num_splits, dim=dim_v)
    has_positions = rows.q_positions_RT is not None
    return Launch(
        found,
        (num_splits * row_tiles, num_kv_heads, num_rows),
        (
            rows.blocks_RB,
            rows.starts_R,
            rows.ends_R,
            rows.blocks_RB if rows.block_positions_RB is None else rows.block_positions_RB,
            rows.q_positions_RT if has_positions else rows.blocks_RB,
            found.out_RKXMD,
            found.lse_RKXM,
            attention.scale,
            attention.softcap or 0.0,
            attention.window or 0,
            rows.blocks_RB.shape[1],
            num_splits,
        ),
        {
            "NUM_ROWS": num_tokens * group,
            "GROUP": group,
            "BLOCK_M": block_m,
            "HAS_POSITIONS": has_positions,
            "HAS_SOFTCAP": attention.softcap is not None,
            "HAS_WINDOW": attention.window is not None,
            "OVERLAPS": overlaps(q_RTHD.device),
            "num_warps": settings.num_warps,
            "num_stages": settings.num_stages,
        },
    )


def page_strides(planes: Iterable[Tensor | None]) -> list[int]:
    """0 for a plane that is not there. Raises: ValueError where blocks do not lie together."""
    strides = []
    for plane in planes:
        if plane is not None and not plane[0].is_contiguous():
            raise ValueError("the blocks of a page must lie together")
        strides.append(0 if plane is None else plane.stride(0))
    return strides
