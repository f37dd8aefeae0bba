"""Which tokens of a paged cache each row of a batch reads, and how they are split over a GPU.

Pages are those of the cache: [pages, ..., D] arrays with several blocks of tokens to a page. What
changes from step to step is in tensors on the device, so that a launch waits for nothing and can
be part of a CUDA graph.

Shape letters: R rows of a batch (requests), T query tokens of a row, H query heads, K KV heads,
B blocks of a row, P pages, N tokens of a page, D head dimension, X splits, M query rows of a KV
head (its query heads, for each of the T tokens), L contiguous axis.
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_NUMBERS: Final = ("max_blocks", "num_splits")
"""Arguments of decode kernels that follow from lengths. Triton compiles a kernel anew for integers
that are 1 or divisible by 16, unless it is told not to; a compilation takes seconds."""
ROW_POINTERS: Final = (
    "blocks_ptr",
    "starts_ptr",
    "ends_ptr",
    "block_positions_ptr",
    "q_positions_ptr",
)
"""And what points into tables, with whatever lies before: read a number at a time."""


FROM_L2: Final = tl.constexpr(".cg")
"""How queries are loaded by kernels that begin beside another: what the kernel before that wrote is
in L2, and a processor's own cache may have what was there before."""


class PagedRows(NamedTuple):
    """The blocks of each row. All tensors int32, contiguous, on the device of the cache."""

    blocks_RB: Tensor
    """Ids of the blocks in the cache, in order of position; what lies behind a row's last is not
    read."""
    starts_R: Tensor
    """Tokens of a row's first blocks that are not read."""
    ends_R: Tensor
    """Tokens up to the last that is read, counted from the start of the row's first block. A row
    with `ends <= starts` has nothing here."""
    block_positions_RB: Tensor | None = None
    """Position in the sequence of each block's first token; the others follow it."""
    q_positions_RT: Tensor | None = None
    """Position of each query token, which sees none behind it; wants `block_positions_RB`. Without
    it, every token that is read is visible to all query tokens of its row."""


class Attention(NamedTuple):
    """What is computed of queries and keys."""

    scale: float
    """Of the dot products."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    window: int | None = None
    """Keys less than this far behind the query are visible. Needs positions."""


class Partial(NamedTuple):
    """Attention over some of the keys; merging the partials of all keys gives exact attention."""

    out_RTHD: Tensor
    """Float32; zero where no key was visible."""
    lse_RTH: Tensor
    """Log-sum-exp of the scores, natural logarithm, float32; -inf where no key was visible."""


class SplitPartials(NamedTuple):
    """What the splits of a row found, before they are merged. A split without a visible key has
    LSE -inf and any output."""

    out_RKXMD: Tensor
    lse_RKXM: Tensor
    """To base 2."""

    @classmethod
    def empty(
        cls, q_RTHD: Tensor, *, num_kv_heads: int, num_splits: int, dim: int
    ) -> "SplitPartials":
        """Room that nothing is written to yet."""
        num_rows, num_tokens, num_heads, _ = q_RTHD.shape
        shape = (num_rows, num_kv_heads, num_splits, num_tokens * num_heads // num_kv_heads)
        return cls(
            torch.empty((*shape, dim), dtype=torch.float32, device=q_RTHD.device),
            torch.empty(shape, dtype=torch.float32, device=q_RTHD.device),
        )


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """How a decode kernel is launched. Changes the speed alone."""

    tile: int = 64
    """Tokens that a program reads at a time, a power of two."""
    num_warps: int = 4
    num_stages: int = 6
    """Of the loop over tiles. A tile's block id comes before its bytes, so that half of them, less
    one, are tiles whose bytes are under way."""
    programs_per_processor: int = 3
    """How many programs each streaming multiprocessor shall get, which sets the splits."""
    num_splits: int | None = None
    """Splits of a row, instead of those that follow from the GPU's size."""
    columns: int = 32
    """Query rows of one program of a packed kernel, a power of two; more are more programs."""
    is_portable: bool = False
    """Launch the kernel for any GPU even where there is one for this GPU."""
    late_ns: int = 0
    """Of the kernel for latents on Hopper: how long the later half of the programs wait before they
    begin, so that two of a processor do not want its matrix unit at the same time."""

    def splits(self, device: torch.device, *, num_programs: int, num_tiles: int) -> int:
        """Splits of each row where `num_programs` are launched for each split, of rows of at most
        `num_tiles` tiles."""
        wanted = self.num_splits
        if wanted is None:
            processors = num_processors(device)
            wanted = max(1, processors * self.programs_per_processor // num_programs)
        return max(1, min(wanted, num_tiles))


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 of a CPU, where programs run one after another."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def overlaps(device: torch.device) -> bool:
    """Whether the next kernel can start while the programs of one before it still run, and wait
    for them itself (programmatic dependent launch, since Hopper)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def is_interpreted(kernel: Any) -> bool:
    """Whether launches of the kernel run in Triton's interpreter, which multiplies bfloat16 as
    integers: operands are then widened, which is exact."""
    return not isinstance(kernel, triton.JITFunction)


def check_positions(rows: PagedRows, attention: Attention) -> None:
    """Raises: ValueError where masks need positions that are not there."""
    if rows.block_positions_RB is None and rows.q_positions_RT is not None:
        raise ValueError("positions of queries want those of blocks: give both")
    if attention.window is not None and rows.q_positions_RT is None:
        raise ValueError("a window needs the positions of blocks and queries")


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raises: ValueError for a tensor that kernels would read wrong."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous")


@triton.jit
def let_next_start(OVERLAPS: tl.constexpr) -> None:
    """Let the kernel that merges the splits start where processors have room; it waits itself."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_earlier(OVERLAPS: tl.constexpr) -> None:
    """Until the kernel before this one is done and what it wrote is there, where this one was
    launched without waiting for that (`launch_pdl`)."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()


@triton.jit
def split_tiles(
    row: tl.tensor,
    split: tl.tensor,
    num_splits: tl.tensor,
    starts_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Tiles [begin, stop) of a split, and the tokens [start, end) of its row."""
    start = tl.load(starts_ptr + row)
    end = tl.load(ends_ptr + row)
    first = start // TILE
    count = tl.maximum(tl.cdiv(end, TILE) - first, 0)
    begin = first + (split.to(tl.int64) * count // num_splits).to(tl.int32)
    stop = first + ((split + 1).to(tl.int64) * count // num_splits).to(tl.int32)
    return begin, stop, start, end


@triton.jit
def blocks_of_tile(
    blocks_ptr: tl.tensor,
    tile_start: tl.tensor,
    end: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Id of the block of each token of a tile: a number where they are all of one block."""
    if TILE <= BLOCK_SIZE:
        blocks = tl.load(blocks_ptr + tile_start // BLOCK_SIZE)
    else:
        tokens = tile_start + tl.arange(0, TILE)
        blocks = tl.load(blocks_ptr + tokens // BLOCK_SIZE, mask=tokens < end, other=0)
    return blocks


@triton.jit
def block_offset(
    blocks: tl.tensor, stride_page: tl.tensor, stride_block: tl.tensor, PAGE_BLOCKS: tl.constexpr
) -> tl.tensor:
    """Where blocks begin in an array of pages."""
    pages = (blocks // PAGE_BLOCKS).to(tl.int64)
    return pages * stride_page + (blocks % PAGE_BLOCKS) * stride_block


@triton.jit
def load_queries(
    q_ptr: tl.tensor,
    row: tl.tensor,
    head: tl.tensor,
    num_kv_heads: tl.tensor,
    rows_M: tl.tensor,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """q_MD: the query rows of a KV head, zero where there are none and behind DIM."""
    offs_d = tl.arange(0, BLOCK_D)
    tokens_M = row * (NUM_ROWS // GROUP) + rows_M // GROUP
    places_M = (tokens_M * num_kv_heads + head) * GROUP + rows_M % GROUP
    mask_MD = (rows_M < NUM_ROWS)[:, None] & (offs_d < DIM)[None, :]
    return tl.load(q_ptr + places_M[:, None] * DIM + offs_d[None, :], mask=mask_MD, other=0.0)


@triton.jit
def load_query_positions(
    q_positions_ptr: tl.tensor,
    row: tl.tensor,
    rows_M: tl.tensor,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
) -> tl.tensor:
    """Of the query rows of a KV head; any numbers where there are none."""
    positions_M = rows_M
    if HAS_POSITIONS:
        q_positions_ptr += row * (NUM_ROWS // GROUP)
        positions_M = tl.load(q_positions_ptr + rows_M // GROUP, mask=rows_M < NUM_ROWS, other=0)
    return positions_M
