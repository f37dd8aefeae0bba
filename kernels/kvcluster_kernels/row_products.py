"""One row through a model's weights: what decode of a single sequence does between calls of
attention, in as few kernels as there are dependencies.

Such products read each weight once and do nothing else, so that what counts is that memory never
waits. Norms, biases, gates and residuals cost no kernels of their own, and each kernel asks for its
first weights while the one before it still runs (programmatic dependent launch). Sums are float32
and rounded once, where PyTorch rounds after each operation. `row_products_plain` is the definition.

Shape letters: E numbers of the row, N numbers of a product.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcluster_kernels.paging import let_next_start, overlaps

_MAX_WEIGHTS: Final = 3


class Norm(NamedTuple):
    """A root mean square norm (Zhang and Sennrich 2019) of a row."""

    weight_E: Tensor
    epsilon: float


class ProductSettings(NamedTuple):
    """How a product is launched. Changes the speed alone.

    With these, the four calls of a layer of Llama 3.1 8B took 155 us in a CUDA graph (H100,
    bfloat16, 2.82 TB/s of weights), with 2 or 4 rows, 512 to 2,048 columns and 4 or 8 warps 154 to
    169 us; seven products of cuBLAS, without what is between them, 176 us (2026-11-23)."""

    rows: int = 4
    """Of a weight that a program multiplies, a power of two."""
    columns: int = 512
    """That it reads at a time, a power of two; as many more are under way."""
    num_warps: int = 4


def products(
    x_E: Tensor,
    weights_NE: Sequence[Tensor],
    *,
    norm: Norm | None = None,
    biases_N: Sequence[Tensor] | None = None,
    residual_N: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    settings: ProductSettings | None = None,
) -> Tensor:
    """The products of up to three weights with the row, one after another in one row. With `norm`
    of the normed row; plus a bias for each weight, plus a residual as long as all of them. In the
    row's dtype, or in `out_dtype`.

    Raises: ValueError for arrays that do not go together.
    """
    biases = [] if biases_N is None else list(biases_N)
    _check(x_E, weights_NE, norm, biases)
    num_rows = [len(weight) for weight in weights_NE]
    out_N = torch.empty(sum(num_rows), dtype=out_dtype or x_E.dtype, device=x_E.device)
    if residual_N is not None and (residual_N.shape != out_N.shape or biases):
        raise ValueError("a residual is as long as the products, and goes with no bias")
    if biases and [len(bias) for bias in biases] != num_rows:
        raise ValueError("want a bias for each weight")
    settings = settings or ProductSettings()
    programs = [triton.cdiv(number, settings.rows) for number in num_rows]
    lacking = _MAX_WEIGHTS - len(weights_NE)
    early = overlaps(x_E.device)
    _product_kernel[(sum(programs),)](
        x_E,
        x_E if norm is None else norm.weight_E,
        *weights_NE,
        *[weights_NE[0]] * lacking,
        *(biases or [x_E] * len(weights_NE)),
        *[x_E] * lacking,
        x_E if residual_N is None else residual_N,
        out_N,
        0.0 if norm is None else norm.epsilon,
        *num_rows,
        *[0] * lacking,
        DIM=len(x_E),
        ROWS=settings.rows,
        COLUMNS=settings.columns,
        HAS_NORM=norm is not None,
        HAS_BIAS=bool(biases),
        HAS_RESIDUAL=residual_N is not None,
        OVERLAPS=early,
        num_warps=settings.num_warps,
        launch_pdl=early,
    )
    return out_N


def gated_product(
    x_E: Tensor,
    gate_NE: Tensor,
    up_NE: Tensor,
    *,
    norm: Norm,
    settings: ProductSettings | None = None,
) -> Tensor:
    """silu(gate x) * (up x) of the normed row (SwiGLU; Shazeer 2020).

    Raises: ValueError for arrays that do not go together.
    """
    _check(x_E, (gate_NE, up_NE), norm, [])
    if gate_NE.shape != up_NE.shape:
        raise ValueError("a gate is as long as what it opens")
    out_N = x_E.new_empty(len(gate_NE))
    settings = settings or ProductSettings()
    early = overlaps(x_E.device)
    _gated_kernel[(triton.cdiv(len(out_N), settings.rows),)](
        x_E,
        norm.weight_E,
        gate_NE,
        up_NE,
        out_N,
        norm.epsilon,
        len(out_N),
        DIM=len(x_E),
        ROWS=settings.rows,
        COLUMNS=settings.columns,
        OVERLAPS=early,
        num_warps=settings.num_warps,
        launch_pdl=early,
    )
    return out_N


def _check(
    x_E: Tensor, weights_NE: Sequence[Tensor], norm: Norm | None, biases: Sequence[Tensor]
) -> None:
    if not 1 <= len(weights_NE) <= _MAX_WEIGHTS:
        raise ValueError(f"want 1 to {_MAX_WEIGHTS} weights, got {len(weights_NE)}")
    if any(weight.shape[1:] != x_E.shape for weight in weights_NE):
        shapes = [tuple(weight.shape) for weight in weights_NE]
        raise ValueError(f"a row of {tuple(x_E.shape)} does not go with weights of {shapes}")
    others = [*weights_NE, *biases, *([norm.weight_E] if norm is not None else [])]
    if not all(x.is_contiguous() for x in (x_E, *others)):
        raise ValueError("weights and rows must be contiguous")
    if norm is not None and norm.weight_E.shape != x_E.shape:
        raise ValueError(f"a norm of {len(norm.weight_E)} numbers for a row of {len(x_E)}")


@triton.jit
def _tile(
    weight_ptr: tl.tensor,
    rows_N: tl.tensor,
    first: tl.tensor,
    num_rows: tl.tensor,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Weights [rows, first + columns), zero where there are none."""
    offs_e = first + tl.arange(0, COLUMNS)
    mask_NE = (rows_N < num_rows)[:, None] & (offs_e < DIM)[None, :]
    places_NE = rows_N.to(tl.int64)[:, None] * DIM + offs_e[None, :]
    return tl.load(weight_ptr + places_NE, mask=mask_NE, other=0.0)


@triton.jit
def _part(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    first: tl.tensor,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Numbers [first, first + columns) of the row, times the norm's, and their squares' sum."""
    offs_e = first + tl.arange(0, COLUMNS)
    x_E = tl.load(x_ptr + offs_e, mask=offs_e < DIM, other=0.0).to(tl.float32)
    squares_E = x_E
    if HAS_NORM:
        squares_E = x_E * x_E
        x_E *= tl.load(norm_ptr + offs_e, mask=offs_e < DIM, other=0.0).to(tl.float32)
    return x_E, squares_E


@triton.jit(do_not_specialize=["epsilon"])
def _product_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    weight_0_ptr: tl.tensor,
    weight_1_ptr: tl.tensor,
    weight_2_ptr: tl.tensor,
    bias_0_ptr: tl.tensor,
    bias_1_ptr: tl.tensor,
    bias_2_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    epsilon: tl.tensor,
    rows_0: tl.tensor,
    rows_1: tl.tensor,
    rows_2: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    let_next_start(OVERLAPS)
    program = tl.program_id(0)
    weight_ptr, bias_ptr, num_rows, place = weight_0_ptr, bias_0_ptr, rows_0, program * 0
    if program >= tl.cdiv(rows_0, ROWS):
        program -= tl.cdiv(rows_0, ROWS)
        weight_ptr, bias_ptr, num_rows, place = weight_1_ptr, bias_1_ptr, rows_1, rows_0
        if program >= tl.cdiv(rows_1, ROWS):
            program -= tl.cdiv(rows_1, ROWS)
            weight_ptr, bias_ptr, num_rows = weight_2_ptr, bias_2_ptr, rows_2
            place = rows_0 + rows_1
    rows_N = program * ROWS + tl.arange(0, ROWS)
    weights_NE = _tile(weight_ptr, rows_N, 0, num_rows, DIM, COLUMNS)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    sum_NE = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares_E = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, DIM, COLUMNS):
        next_NE = _tile(weight_ptr, rows_N, first + COLUMNS, num_rows, DIM, COLUMNS)
        x_E, x_squares_E = _part(x_ptr, norm_ptr, first, DIM, COLUMNS, HAS_NORM)
        sum_NE += weights_NE.to(tl.float32) * x_E[None, :]
        squares_E += x_squares_E
        weights_NE = next_NE
    out_N = tl.sum(sum_NE, 1)
    if HAS_NORM:
        out_N *= tl.rsqrt(tl.sum(squares_E, 0) / DIM + epsilon)
    mask_N = rows_N < num_rows
    if HAS_BIAS:
        out_N += tl.load(bias_ptr + rows_N, mask=mask_N, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        out_N += tl.load(residual_ptr + place + rows_N, mask=mask_N, other=0.0).to(tl.float32)
    tl.store(out_ptr + place + rows_N, out_N.to(out_ptr.dtype.element_ty), mask=mask_N)


@triton.jit(do_not_specialize=["epsilon"])
def _gated_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    epsilon: tl.tensor,
    num_rows: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    let_next_start(OVERLAPS)
    rows_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gates_NE = _tile(gate_ptr, rows_N, 0, num_rows, DIM, COLUMNS)
    ups_NE = _tile(up_ptr, rows_N, 0, num_rows, DIM, COLUMNS)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    gate_NE = tl.zeros([ROWS, COLUMNS], tl.float32)
    up_NE = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares_E = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, DIM, COLUMNS):
        next_gates_NE = _tile(gate_ptr, rows_N, first + COLUMNS, num_rows, DIM, COLUMNS)
        next_ups_NE = _tile(up_ptr, rows_N, first + COLUMNS, num_rows, DIM, COLUMNS)
        x_E, x_squares_E = _part(x_ptr, norm_ptr, first, DIM, COLUMNS, HAS_NORM=True)
        gate_NE += gates_NE.to(tl.float32) * x_E[None, :]
        up_NE += ups_NE.to(tl.float32) * x_E[None, :]
        squares_E += x_squares_E
        gates_NE, ups_NE = next_gates_NE, next_ups_NE
    norm = tl.rsqrt(tl.sum(squares_E, 0) / DIM + epsilon)
    gate_N = tl.sum(gate_NE, 1) * norm
    up_N = tl.sum(up_NE, 1) * norm
    out_N = gate_N / (1.0 + tl.exp(-gate_N)) * up_N
    tl.store(out_ptr + rows_N, out_N.to(out_ptr.dtype.element_ty), mask=rows_N < num_rows)
