"""Batches for decode kernels, with every number that must not be read poisoned, and how far a
kernel may be from its definition.

Shape letters: those of `kvcluster_kernels.paging`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from kvcluster_kernels import decode_plain
from kvcluster_kernels.decode import ExactPages
from kvcluster_kernels.paging import Attention, PagedRows, Partial
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What to draw."""

    lengths: tuple[int, ...]
    """Tokens that each row reads."""
    skipped: int = 0
    """Tokens of each row's first block that it does not."""
    num_tokens: int = 1
    num_heads: int = 4
    num_kv_heads: int = 2
    dim_k: int = 64
    dim_v: int = 64
    block_size: int = 16
    page_blocks: int = 4
    has_positions: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Of each row."""
        return tuple(
            -(-(length + self.skipped) // self.block_size) if length else 0
            for length in self.lengths
        )


def draw_rows(batch: Batch, generator: torch.Generator, device: torch.device) -> PagedRows:
    """Each row's blocks, anywhere in the pages, and positions with gaps, as of a shard."""
    used, width = sum(batch.num_blocks), max(1, *batch.num_blocks)
    ids = torch.randperm(used, generator=generator) + 1
    # Block 0 is no row's: it stands behind the last of each.
    blocks_RB = torch.zeros(len(batch.lengths), width, dtype=torch.int32)
    positions_RB = torch.zeros_like(blocks_RB)
    ends = []
    for row, (length, count) in enumerate(zip(batch.lengths, batch.num_blocks, strict=True)):
        blocks_RB[row, :count] = ids[:count]
        ids = ids[count:]
        gaps = torch.randint(1, 3, (count,), generator=generator)
        positions_RB[row, :count] = gaps.cumsum(0) * batch.block_size
        ends.append(length + batch.skipped if length else 0)
    skips = [batch.skipped if length else 0 for length in batch.lengths]
    rows = PagedRows(blocks_RB, torch.tensor(skips, dtype=torch.int32), _int32(ends))
    if batch.has_positions:
        # The query tokens are at the end of what their row reads, so the first see less of it.
        last_R = torch.gather(positions_RB, 1, _last_block(batch)[:, None])[:, 0]
        last_R = last_R + (_int32(ends) - 1) % batch.block_size
        steps_T = torch.arange(batch.num_tokens, dtype=torch.int32) - batch.num_tokens + 1
        rows = rows._replace(
            block_positions_RB=positions_RB,
            q_positions_RT=(last_R[:, None] + steps_T).to(torch.int32),
        )
    return PagedRows(*(None if x is None else x.to(device) for x in rows))


def draw_queries(batch: Batch, generator: torch.Generator, device: torch.device) -> Tensor:
    shape = (len(batch.lengths), batch.num_tokens, batch.num_heads, batch.dim_k)
    return torch.randn(shape, generator=generator).to(batch.dtype).to(device)


def draw_exact(
    batch: Batch, rows: PagedRows, generator: torch.Generator, device: torch.device
) -> ExactPages:
    """Pages in which every token that no row reads is NaN."""
    num_pages = -(-(sum(batch.num_blocks) + 1) // batch.page_blocks)
    arrays = []
    for dim in (batch.dim_k, batch.dim_v):
        blocks_BKSD = torch.full(
            (num_pages * batch.page_blocks, batch.num_kv_heads, batch.block_size, dim), torch.nan
        )
        for row, count in enumerate(batch.num_blocks):
            x_KSD = torch.randn(
                batch.num_kv_heads, count * batch.block_size, dim, generator=generator
            )
            x_KSD[:, : int(rows.starts_R[row])] = torch.nan
            x_KSD[:, int(rows.ends_R[row]) :] = torch.nan
            ids_B = rows.blocks_RB[row, :count].long().cpu()
            blocks_BKSD[ids_B] = x_KSD.unflatten(1, (count, batch.block_size)).transpose(0, 1)
        in_pages = blocks_BKSD.unflatten(0, (num_pages, batch.page_blocks)).transpose(1, 2)
        # As in the cache, a page has more than one array: its stride is larger than itself.
        x_PKND = in_pages.flatten(2, 3)
        padded = torch.full((num_pages, x_PKND[0].numel() + 64), torch.nan, dtype=batch.dtype)
        padded[:, : x_PKND[0].numel()] = x_PKND.flatten(1).to(batch.dtype)
        arrays.append(padded.to(device)[:, : x_PKND[0].numel()].unflatten(1, x_PKND.shape[1:]))
    return ExactPages(*arrays, batch.block_size)


def row_by_row(
    definition: Callable[[Tensor, PagedRows], Partial], q_RTHD: Tensor, rows: PagedRows
) -> Partial:
    """What the definition gives of these queries, in float64, one row of the batch at a time:
    it gathers what a row reads, and on a GPU tests run side by side."""
    partials = [
        definition(
            q_RTHD[row : row + 1].double(),
            PagedRows(*(None if x is None else x[row : row + 1] for x in rows)),
        )
        for row in range(len(q_RTHD))
    ]
    return Partial(*map(torch.cat, zip(*partials, strict=True)))


def assert_close_to_definition(
    found: Partial, q_RTHD: Tensor, pages: ExactPages, rows: PagedRows, attention: Attention
) -> None:
    """Each number of `found` within the error that its dtype allows.

    In float64 from the same numbers: a score is off by the rounding of a float32 sum of D products
    and of a few operations on it, which is relative to weights; weights are rounded to the dtype of
    the values, and sums in float32 to the same relative order. All of it is relative to the sum of
    weights times magnitudes of values, |w| |v|.
    """
    k_PKND, v_PKND, block_size = pages
    exact = ExactPages(k_PKND.double(), v_PKND.double(), block_size)
    absolute = exact._replace(v_PKND=exact.v_PKND.abs())
    want, magnitude = (
        row_by_row(lambda q, row, x=x: decode_plain.decode(q, x, row, attention), q_RTHD, rows)
        for x in (exact, absolute)
    )
    bounds = Bounds(q_RTHD, k_PKND, attention, weights=q_RTHD.dtype)
    assert_within(found, want, magnitude.out_RTHD, bounds)


@dataclass(frozen=True)
class Bounds:
    """How much rounding there may be."""

    q_RTHD: Tensor
    k_PKND: Tensor
    attention: Attention
    weights: torch.dtype
    operands: torch.dtype = torch.float64
    """What queries are rounded to before they are multiplied: their own dtype is exact."""

    @property
    def score(self) -> float:
        """Of the scores, absolute: D roundings of float32 on the largest sum of magnitudes, which
        is not above |q| |k|, and 8 on the score itself."""
        dim = self.q_RTHD.shape[-1]
        largest = self.q_RTHD.float().norm(dim=-1).max() * _norm(self.k_PKND)
        eps = torch.finfo(torch.float32).eps * (dim + 8) + torch.finfo(self.operands).eps
        return float(largest * self.attention.scale * eps)

    @property
    def weight(self) -> float:
        """Of the weights, relative."""
        return 2 * self.score + torch.finfo(self.weights).eps + 64 * torch.finfo(torch.float32).eps


def assert_within(found: Partial, want: Partial, magnitude_RTHD: Tensor, bounds: Bounds) -> None:
    """Also that rows without keys have 0 and -inf."""
    assert found.out_RTHD.dtype == found.lse_RTH.dtype == torch.float32
    blind_RTH = want.lse_RTH == -torch.inf
    assert torch.equal(found.lse_RTH == -torch.inf, blind_RTH)
    assert not found.out_RTHD[blind_RTH].any()
    error_RTH = (found.lse_RTH.double() - want.lse_RTH)[~blind_RTH].abs()
    assert error_RTH.numel() == 0 or error_RTH.max() <= bounds.score + 1e-5
    error_RTHD = (found.out_RTHD.double() - want.out_RTHD).abs()
    assert not error_RTHD.isnan().any()
    assert bool((error_RTHD <= bounds.weight * magnitude_RTHD).all()), (
        f"{float((error_RTHD / magnitude_RTHD.clamp(min=1e-30)).max()):.3g} of the sum of "
        f"magnitudes, where {bounds.weight:.3g} is allowed"
    )


def _norm(x: Tensor) -> Tensor:
    """Of the longest vector, without poison."""
    norms = x.float().norm(dim=-1)
    return norms[~norms.isnan()].max() if (~norms.isnan()).any() else norms.new_zeros(())


def _last_block(batch: Batch) -> Tensor:
    return torch.tensor([max(0, count - 1) for count in batch.num_blocks])


def _int32(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


RAGGED = Batch(lengths=(37, 0, 1, 64), skipped=5)
"""Rows that end inside a block, read nothing, one token, and whole blocks behind skipped ones."""

EXACT_BATCHES = {
    "head size 64": RAGGED,
    "head size 96": replace(RAGGED, dim_k=96, dim_v=96),
    "head size 128": replace(RAGGED, dim_k=128, dim_v=128),
    "head size 256": replace(RAGGED, dim_k=256, dim_v=256),
    "values narrower than keys": replace(RAGGED, dim_k=96, dim_v=64),
    "one group of 12 heads": replace(RAGGED, num_heads=12, num_kv_heads=1),
    "8 query tokens, causal": replace(RAGGED, num_tokens=8, has_positions=True, num_heads=8),
    "16 query tokens of 16 heads": replace(
        RAGGED, num_tokens=16, num_heads=16, num_kv_heads=1, lengths=(70, 3), has_positions=True
    ),
    "blocks as long as tiles": replace(RAGGED, block_size=64, lengths=(190, 0, 65)),
    "blocks longer than tiles": replace(RAGGED, block_size=128, lengths=(190, 0, 129)),
}
