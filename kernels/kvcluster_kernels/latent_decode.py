"""Decode over a paged cache of latent keys (Palu, arXiv 2407.21118), which are expanded and turned
to their positions in the kernel, a block at a time, and never written.

    key_th = R(t) (mean_h + latent_t up_h),   score_th = q_h . key_th

A block begins at position b, and its token s is at b + s, so R(b + s) q . k = R(-b) q . R(s) k:
the angles of s are made once for a program, those of b once for a block, for the few query rows.
The angle that follows is b f + s f, each rounded to float32, where a model rounds (b + s) f: they
differ by at most the rounding of the latter, 2^-24 of it.

Latents meet `up` of one KV head, which stays in shared memory; the KV heads of a part of the
sequence run side by side and read the same latents, from L2 all but once.

What bounds it. Expanding keys takes 2 r K D operations of the matrix unit a token, whatever the
query heads. On an H100 at 798 TFLOP/s and 3.0 TB/s, beside 4 K D bytes a token in bfloat16, the
two are even at r = 532 of K D = 1,024; at the four fifths of the matrix unit that kernels reach, at
r = 430. With r = 256 and values of 4 bits it is 1.6 times as fast as bfloat16 at best. Latents of
fewer bits take no fewer operations.

Values are latents as well, whose weighted sums the caller expands once for a query (exact where all
weights of a row are merged: means are added to sums of weight 1); or integers, rotated codes, whose
sums the caller rotates back; or plain numbers of 16 bits.

`latent_gluon.py` is the same for Hopper, of the formats that `latent_gluon_launch.py` names.

`latent_plain.decode_latents` is the definition. Shape letters: those of `latent_pages.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels import latent_gluon_launch
from kvcluster_kernels.codes import dot, has_assembly, num_fields
from kvcluster_kernels.combine import combine
from kvcluster_kernels.latent_pages import (
    KeyExpansion,
    LatentPages,
    Latents,
    SectionForm,
    section_planes,
    sections_of,
)
from kvcluster_kernels.latent_tiles import (
    block_planes,
    expand,
    load_query_pairs,
    load_up,
)
from kvcluster_kernels.latent_turns import cos_and_sin, rotated_keys, turned_back
from kvcluster_kernels.latent_values import (
    ValueFormat,
    ValuePages,
    section_forms,
    store_values,
    value_block,
    value_heads,
    value_planes,
    weigh_values,
    zero_values,
)
from kvcluster_kernels.packed_launch import page_strides, plan_launch
from kvcluster_kernels.paging import (
    ROW_NUMBERS,
    ROW_POINTERS,
    Attention,
    DecodeSettings,
    PagedRows,
    Partial,
    SplitPartials,
    let_next_start,
    load_query_positions,
    split_tiles,
)
from kvcluster_kernels.softmax import to_base_2, visible_columns

_LEAST_TOKENS = 16
"""Of a block, and of a group that shares scales: a matrix product is of 16 numbers at least."""
_SHARED_BYTES = 227 << 10
_OTHER_BYTES = 10 << 10
"""Of a program, beside blocks and the way back: queries, scales, and what moves between warps."""
_PIECE = 64
"""Bytes, or numbers of 16 bits, of a token's latent that are worked on together at most."""
_NUMBERS = 128
"""And numbers. Nothing else of a warp goes on while it waits for their product, so that there
should be few."""


def decode_latents(
    q_RTHD: Tensor,
    keys: Latents,
    expansion: KeyExpansion,
    values: ValuePages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> Partial:
    """Attention of each row's query tokens over its encoded blocks. `q_RTHD` as the model turns
    it. `rows` has positions. The output is the weighted sum of what values store: of latents
    [R, T, H, C], of rotated vectors [R, T, H, D], or of values.

    Raises: ValueError for arrays that do not go together.
    """
    splits = latent_splits(q_RTHD, keys, expansion, values, rows, attention, settings)
    return combine(splits, num_tokens=q_RTHD.shape[1])


def latent_splits(
    q_RTHD: Tensor,
    keys: Latents,
    expansion: KeyExpansion,
    values: ValuePages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None = None,
) -> SplitPartials:
    """The same before it is merged, to be merged with more of its kind."""
    against = latent_gluon_launch.reason_against(q_RTHD, keys, expansion, values, attention)
    if against is None and not (settings and settings.is_portable):
        return latent_gluon_launch.splits(
            q_RTHD, keys, expansion, values, rows, attention, settings
        )
    sections = sections_of(keys)
    block_size, dim = sections[0].codes.shape[3], q_RTHD.shape[3]
    forms = _forms(keys)
    form = ValueFormat.of(values, block_size)
    num_kv_heads, _, rank, num_pairs = expansion.up_KJCE.shape
    _check(sections, expansion, form, rows, dim, block_size // max(x.groups for x in forms))
    v_planes = value_planes(values)
    if v_planes[0][0].shape[:2] != sections[0].codes.shape[:2]:
        raise ValueError("keys and values want pages of as many blocks")
    chosen = settings or default_settings(keys, values, dim)
    launch = plan_launch(q_RTHD, rows, attention, chosen, num_kv_heads=num_kv_heads, dim_v=form.dim)
    k_planes = tuple(section_planes(x) for x in sections)
    _latent_kernel[launch.grid](
        q_RTHD,
        *expansion[:4],
        k_planes,
        v_planes,
        *launch.arguments,
        tuple(tuple(page_strides(planes)) for planes in k_planes),
        tuple(tuple(page_strides(planes)) for planes in v_planes),
        **launch.constants,
        BLOCK_SIZE=block_size,
        PAGE_BLOCKS=sections[0].codes.shape[1],
        DIM=dim,
        PAIRS=num_pairs,
        RANK=rank,
        K_FORMS=forms,
        V_FORM=form,
        V_FORMS=section_forms(values),
        IS_GPU=has_assembly(_latent_kernel),
    )
    return launch.found


def default_settings(keys: Latents, values: ValuePages, dim: int) -> DecodeSettings:
    """As many programs as have their part of `up`, and the bytes of the blocks under way, in a
    processor's shared memory, and their numbers in its registers: two at most. From what was
    compiled; not measured yet."""
    num_stages = 6 if _block_bytes(keys, values) <= 20 << 10 else 4
    while num_stages > 2 and _needed(keys, values, dim, num_stages) > _SHARED_BYTES:
        num_stages -= 2
    needed = _needed(keys, values, dim, num_stages)
    return DecodeSettings(
        num_warps=4,
        num_stages=num_stages,
        programs_per_processor=max(1, min(2, _SHARED_BYTES // needed)),
    )


def fits(keys: Latents, values: ValuePages, dim: int) -> bool:
    """Whether a program's part of `up`, and two blocks, fit a processor: with two stages as many
    are there. `dim`: channels of a head."""
    return _needed(keys, values, dim, 4) <= _SHARED_BYTES


def _needed(keys: Latents, values: ValuePages, dim: int, num_stages: int) -> int:
    """Bytes of shared memory that a program has, and somewhat more."""
    forms = _forms(keys)
    num_columns = int(triton.next_power_of_2(dim))
    num_rows = sum(form.num_arrays * form.piece for form in forms)
    up_bytes = 2 * num_rows * num_columns
    if any(form.groups > 1 for form in forms):
        # The compiler moves it between layouts for the products of such numbers.
        up_bytes *= 3
    return up_bytes + num_stages // 2 * _block_bytes(keys, values) + _OTHER_BYTES


def _forms(keys: Latents) -> tuple[SectionForm, ...]:
    return tuple(
        SectionForm.of(x, min(_PIECE, _NUMBERS // num_fields(x.bits))) for x in sections_of(keys)
    )


def _block_bytes(keys: Latents, values: ValuePages) -> int:
    """Codes of one block that a program reads: latents, and values of one head."""
    of_keys = sum(int(section.codes[0, 0].nbytes) for section in sections_of(keys))
    return of_keys + sum(int(planes[0][0, 0, 0].nbytes) for planes in value_planes(values))


def _check(
    sections: tuple[LatentPages, ...],
    expansion: KeyExpansion,
    form: ValueFormat,
    rows: PagedRows,
    dim: int,
    group: int,
) -> None:
    num_kv_heads, _, rank, _ = expansion.up_KJCE.shape
    own_rank = sum(section.rank for section in sections)
    is_one_head = all(section.codes.shape[2] == 1 for section in sections)
    if not is_one_head or own_rank != rank or expansion.dim != dim:
        raise ValueError(
            f"queries of {dim} channels, latents of {own_rank} numbers and a way back from {rank} "
            f"to {expansion.dim} do not go together"
        )
    if group < _LEAST_TOKENS:
        raise ValueError(f"blocks and groups want {_LEAST_TOKENS} tokens or more, not {group}")
    if form.num_heads not in (1, num_kv_heads):
        raise ValueError(f"values are of {form.num_heads} heads, keys of {num_kv_heads}")
    if rows.block_positions_RB is None:
        raise ValueError("latent keys are turned to their positions: give those of the blocks")


@triton.jit(do_not_specialize=ROW_NUMBERS, do_not_specialize_on_alignment=ROW_POINTERS)
def _latent_kernel(
    q_ptr: tl.tensor,
    up_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    channels_ptr: tl.tensor,
    frequencies_ptr: tl.tensor,
    k_planes: tl.tuple,
    v_planes: tl.tuple,
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
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    NUM_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    RANK: tl.constexpr,
    K_FORMS: tl.constexpr,
    V_FORM: tl.constexpr,
    V_FORMS: tl.constexpr,
    IS_GPU: tl.constexpr,
) -> None:
    let_next_start(OVERLAPS)
    ROW_TILES: tl.constexpr = triton.cdiv(NUM_ROWS, BLOCK_M)
    split, row_tile = tl.program_id(0) // ROW_TILES, tl.program_id(0) % ROW_TILES
    rows_M = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head, num_kv_heads, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    begin, stop, start, end = split_tiles(row, split, num_splits, starts_ptr, ends_ptr, BLOCK_SIZE)
    q_first_EM, q_second_EM, size_M = load_query_pairs(
        q_ptr, channels_ptr, row, head, num_kv_heads, rows_M, NUM_ROWS, GROUP, DIM, PAIRS
    )
    q_positions_M = load_query_positions(
        q_positions_ptr, row, rows_M, NUM_ROWS, GROUP, HAS_POSITIONS
    )
    offs_e = tl.arange(0, PAIRS)
    frequency_E = tl.load(frequencies_ptr + offs_e)
    offs_s = tl.arange(0, BLOCK_SIZE)
    cos_SE, sin_SE = cos_and_sin(offs_s.to(tl.float32)[:, None] * frequency_E[None, :], IS_GPU)
    cos_SE, sin_SE = cos_SE.to(tl.float16), sin_SE.to(tl.float16)
    up = load_up(up_ptr + head * (2 * RANK * PAIRS), K_FORMS, RANK, PAIRS)
    mean_ptr += head * (2 * PAIRS)
    mean_first_E = tl.load(mean_ptr + offs_e).to(tl.float16)
    mean_second_E = tl.load(mean_ptr + PAIRS + offs_e).to(tl.float16)
    blocks_ptr += row.to(tl.int64) * max_blocks
    block_positions_ptr += row.to(tl.int64) * max_blocks
    v_head = head if value_heads(V_FORM) > 1 else 0

    max_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_SM = tl.zeros([BLOCK_SIZE, BLOCK_M], tl.float32)
    acc = zero_values(V_FORM, V_FORMS, BLOCK_M)
    for tile in tl.range(begin, stop):
        block = tl.load(blocks_ptr + tile)
        position = tl.load(block_positions_ptr + tile)
        page, place = (block // PAGE_BLOCKS).to(tl.int64), block % PAGE_BLOCKS
        angle_E = position.to(tl.float32) * frequency_E
        q_first, q_second = turned_back(q_first_EM, q_second_EM, angle_E, IS_GPU)
        latents = block_planes(k_planes, k_strides, page, place, BLOCK_SIZE, K_FORMS)
        first_SE, second_SE = expand(latents, up, BLOCK_SIZE, K_FORMS, IS_GPU)
        first_SE, second_SE = rotated_keys(
            first_SE, second_SE, mean_first_E, mean_second_E, cos_SE, sin_SE, IS_GPU
        )
        products_SM = dot(first_SE, q_first, tl.zeros([BLOCK_SIZE, BLOCK_M], tl.float32), IS_GPU)
        products_SM = dot(second_SE, q_second, products_SM, IS_GPU)
        scores_SM = visible_columns(
            to_base_2(products_SM, (scale * size_M)[None, :], softcap, HAS_SOFTCAP),
            tile * BLOCK_SIZE, start, end, position, q_positions_M, window,
            HAS_POSITIONS, HAS_WINDOW,
        )  # fmt: skip
        v_place = place * value_heads(V_FORM) + v_head
        values = value_block(v_planes, v_strides, page, v_place, BLOCK_SIZE, V_FORM, V_FORMS)
        max_M, sum_SM, acc = weigh_values(
            values, scores_SM, max_M, sum_SM, acc, V_FORM, V_FORMS, IS_GPU
        )
    first_row = ((row * num_kv_heads + head) * num_splits + split) * NUM_ROWS
    store_values(out_ptr, lse_ptr, acc, max_M, sum_SM, first_row, rows_M, NUM_ROWS, V_FORM, V_FORMS)
