"""Decode over latents that are attended to as they are: what would expand keys is multiplied into
the queries (DeepSeek-V2, arXiv 2405.04434, appendix C), so that all query heads share one key.

    q . (U c)            = (U^T q) . c                keys without a rotation
    q . [U c, r]         = [U^T q, q_rope] . [c, r]   multi-head latent attention

There r is a rotary key, and the value of a token is its latent, the first numbers of its key: a
tile is read once, and multiplied by the queries and by the weights. Of H query rows it takes
2 H (2 C + R) operations a token and 2 (C + R) bytes, where C = 512 and R = 64: with 128 heads 278
thousand operations take as long on an H100's matrix unit as its 1,152 bytes from memory.

`decode_plain.decode` is the definition. Shape letters: those of `paging.py`; C latent dimension,
N keys of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.combine import combine
from kvcluster_kernels.decode import ExactPages, decode
from kvcluster_kernels.latent_pages import LatentPages
from kvcluster_kernels.paging import (
    ROW_POINTERS,
    Attention,
    DecodeSettings,
    PagedRows,
    Partial,
    SplitPartials,
    block_offset,
    blocks_of_tile,
    check_contiguous,
    check_positions,
    is_interpreted,
    let_next_start,
    overlaps,
    split_tiles,
)
from kvcluster_kernels.softmax import online, store_split, to_base_2, visible_at

MAX_ABSORBED_DIM = 1024
_MAX_TILE_ROWS = 64
"""Rows of a program: with 512 numbers of a value each, their sums take half of all registers."""


def decode_absorbed(
    q_RTHD: Tensor,
    pages: ExactPages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> Partial:
    """As `decode.decode` of one KV head whose values are the first numbers of its keys, and a view
    of them; heads of up to `MAX_ABSORBED_DIM` numbers. `q_RTHD` are absorbed queries.

    Raises: ValueError for other arrays.
    """
    splits = absorbed_splits(q_RTHD, pages, rows, attention, settings)
    return combine(splits, num_tokens=q_RTHD.shape[1])


def absorbed_splits(
    q_RTHD: Tensor,
    pages: ExactPages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> SplitPartials:
    """The same before it is merged, to be merged with more."""
    k_PKND, v_PKND, block_size = pages
    check_positions(rows, attention)
    check_contiguous(q_RTHD=q_RTHD, **rows._asdict())
    num_rows, num_tokens, num_heads, dim = q_RTHD.shape
    page_tokens, latent_dim = v_PKND.shape[2:]
    if k_PKND.shape[1] != 1 or k_PKND.shape[3] != dim or k_PKND.stride(3) != 1:
        raise ValueError(
            f"absorbed queries {tuple(q_RTHD.shape)} want keys of one head of {dim} numbers that "
            f"lie together, not {tuple(k_PKND.shape)}"
        )
    if v_PKND.data_ptr() != k_PKND.data_ptr() or v_PKND.stride() != k_PKND.stride():
        raise ValueError("values must be the first numbers of the keys, as a view")
    if q_RTHD.dtype != k_PKND.dtype:
        raise ValueError(f"queries are {q_RTHD.dtype}, keys are {k_PKND.dtype}")
    block_m = min(_MAX_TILE_ROWS, max(16, triton.next_power_of_2(num_tokens * num_heads)))
    settings = settings or default_settings(block_m)
    row_tiles = triton.cdiv(num_tokens * num_heads, block_m)
    num_splits = settings.splits(
        q_RTHD.device,
        num_programs=num_rows * row_tiles,
        num_tiles=triton.cdiv(rows.blocks_RB.shape[1] * block_size, settings.tile),
    )
    found = SplitPartials.empty(q_RTHD, num_kv_heads=1, num_splits=num_splits, dim=latent_dim)
    has_positions = rows.q_positions_RT is not None
    _absorbed_kernel[(num_splits * row_tiles, num_rows)](
        q_RTHD,
        k_PKND,
        rows.blocks_RB,
        rows.starts_R,
        rows.ends_R,
        rows.block_positions_RB if has_positions else rows.blocks_RB,
        rows.q_positions_RT if has_positions else rows.blocks_RB,
        found.out_RKXMD,
        found.lse_RKXM,
        attention.scale,
        attention.softcap or 0.0,
        attention.window or 0,
        rows.blocks_RB.shape[1],
        num_splits,
        k_PKND.stride(0),
        k_PKND.stride(2),
        NUM_ROWS=num_tokens * num_heads,
        GROUP=num_heads,
        BLOCK_SIZE=block_size,
        PAGE_BLOCKS=page_tokens // block_size,
        DIM=dim,
        LATENT_DIM=latent_dim,
        BLOCK_M=block_m,
        TILE=settings.tile,
        HAS_POSITIONS=has_positions,
        HAS_SOFTCAP=attention.softcap is not None,
        HAS_WINDOW=attention.window is not None,
        OVERLAPS=overlaps(q_RTHD.device),
        UPCAST=is_interpreted(_absorbed_kernel),
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
    return found


def decode_unrotated(
    q_RTHD: Tensor,
    keys: LatentPages,
    basis: tuple[Tensor, Tensor],
    values: LatentPages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> Partial:
    """As `latent_decode.decode_latents` for a layer that does not turn its keys, over latents of 16
    bits of keys and of values. `basis` is what restores keys: up [C, F] and mean [F].

    Raises: ValueError for latents of fewer bits, or scores that are capped: what the mean adds to
    them is added behind the softmax.
    """
    if keys.bits != 16 or values.bits != 16 or values.codes.shape[2] != 1:
        raise ValueError("want latents of 16 bits: others are read by `decode_latents`")
    if attention.softcap is not None:
        raise ValueError("scores that are capped want `decode_latents`")
    up_CF, mean_F = basis
    num_kv_heads = len(mean_F) // q_RTHD.shape[3]
    q_RTKGD = q_RTHD.float().unflatten(2, (num_kv_heads, -1))
    up_CKD = up_CF.float().unflatten(1, (num_kv_heads, -1))
    absorbed_RTHC = torch.einsum("rtkgd,ckd->rtkgc", q_RTKGD, up_CKD).flatten(2, 3)
    of_mean_RTH = (q_RTKGD * mean_F.float().view(num_kv_heads, 1, -1)).sum(-1).flatten(2, 3)
    pages = ExactPages(_one_head(keys), _one_head(values), keys.codes.shape[3])
    found = decode(absorbed_RTHC.half(), pages, rows, attention, settings)
    return found._replace(lse_RTH=found.lse_RTH + of_mean_RTH * attention.scale)


def _one_head(pages: LatentPages) -> Tensor:
    """x_PKND, a view: the tokens of a page's blocks one after another."""
    return pages.codes.transpose(1, 2).flatten(2, 3)


def default_settings(block_m: int) -> DecodeSettings:
    """What nothing is spilled with; one program a processor, whose queries and tiles fill it."""
    if block_m > 32:
        return DecodeSettings(tile=32, num_warps=8, num_stages=4, programs_per_processor=1)
    return DecodeSettings(tile=32, num_warps=4, num_stages=4, programs_per_processor=1)


@triton.jit
def _load_numbers(
    x_ptr: tl.tensor,
    offs_I: tl.tensor,
    mask_I: tl.tensor,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Numbers FIRST .. FIRST + COUNT of some rows, 0 behind them."""
    offs_d = tl.arange(0, BLOCK)
    mask_ID = mask_I[:, None] & (offs_d < COUNT)[None, :]
    return tl.load(x_ptr + offs_I[:, None] + FIRST + offs_d[None, :], mask=mask_ID, other=0.0)


# Numbers stay specialised: told otherwise, Triton 3.9 spills registers in the loop.
@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def _absorbed_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    block_positions_ptr: tl.tensor,
    q_positions_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    max_blocks: tl.tensor,
    num_splits: tl.tensor,
    stride_page: tl.tensor,
    stride_token: tl.tensor,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    DIM: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    OVERLAPS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    let_next_start(OVERLAPS)
    BLOCK_C: tl.constexpr = triton.next_power_of_2(LATENT_DIM)
    REST: tl.constexpr = DIM - LATENT_DIM
    BLOCK_R: tl.constexpr = max(16, triton.next_power_of_2(REST)) if REST > 0 else 16
    ROW_TILES: tl.constexpr = triton.cdiv(NUM_ROWS, BLOCK_M)
    # Programs of one split side by side, so that the latents of the second come from L2.
    split = tl.program_id(0) // ROW_TILES
    rows_M = tl.program_id(0) % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(1)
    begin, stop, start, end = split_tiles(row, split, num_splits, starts_ptr, ends_ptr, TILE)
    mask_M = rows_M < NUM_ROWS
    q_offs_M = (row * NUM_ROWS + rows_M).to(tl.int64) * DIM
    q_MC = _load_numbers(q_ptr, q_offs_M, mask_M, 0, LATENT_DIM, BLOCK_C)
    q_MR = _load_numbers(q_ptr, q_offs_M, mask_M, LATENT_DIM, REST, BLOCK_R)
    q_positions_M = rows_M
    if HAS_POSITIONS:
        q_positions_ptr += row * (NUM_ROWS // GROUP)
        q_positions_M = tl.load(q_positions_ptr + rows_M // GROUP, mask=mask_M, other=0)
    if UPCAST:
        q_MC = q_MC.to(tl.float32)
        q_MR = q_MR.to(tl.float32)
    blocks_ptr += row.to(tl.int64) * max_blocks
    block_positions_ptr += row.to(tl.int64) * max_blocks

    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in tl.range(begin, stop):
        tokens_N = tile * TILE + tl.arange(0, TILE)
        places_N = tokens_N % BLOCK_SIZE
        inside_N = (tokens_N >= start) & (tokens_N < end)
        blocks = blocks_of_tile(blocks_ptr, tile * TILE, end, BLOCK_SIZE, TILE)
        block = block_offset(blocks, stride_page, BLOCK_SIZE * stride_token, PAGE_BLOCKS)
        offs_N = block + places_N * stride_token
        c_NC = _load_numbers(k_ptr, offs_N, inside_N, 0, LATENT_DIM, BLOCK_C)
        if UPCAST:
            c_NC = c_NC.to(tl.float32)
        products_MN = tl.dot(q_MC, tl.trans(c_NC), input_precision="ieee")
        if REST > 0:
            r_NR = _load_numbers(k_ptr, offs_N, inside_N, LATENT_DIM, REST, BLOCK_R)
            if UPCAST:
                r_NR = r_NR.to(tl.float32)
            products_MN = tl.dot(q_MR, tl.trans(r_NR), products_MN, input_precision="ieee")
        mask_N = tl.where(inside_N, 0.0, -float("inf"))
        scores_MN = to_base_2(products_MN, scale, softcap, HAS_SOFTCAP) + mask_N[None, :]
        if HAS_POSITIONS:
            positions = blocks_of_tile(block_positions_ptr, tile * TILE, end, BLOCK_SIZE, TILE)
            distance_MN = q_positions_M[:, None] - (positions + places_N)[None, :]
            scores_MN = visible_at(scores_MN, distance_MN, window, HAS_WINDOW)
        weights_MN, max_M, sum_M, decay_M = online(scores_MN, max_M, sum_M)
        weights_MN = weights_MN.to(c_NC.dtype)
        acc_MC = tl.dot(weights_MN, c_NC, acc_MC * decay_M[:, None], input_precision="ieee")
    place = (row * num_splits + split) * NUM_ROWS
    store_split(
        out_ptr, lse_ptr, acc_MC, max_M, sum_M, place, rows_M, NUM_ROWS, LATENT_DIM, BLOCK_C
    )
