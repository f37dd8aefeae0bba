"""Products of one row, and what is done to it between them, against definitions in float64."""

import math

import pytest
import torch
from kvcluster_kernels import row_products_plain as plain
from kvcluster_kernels.combine_pools import combine_pools, combine_pools_plain
from kvcluster_kernels.paging import SplitPartials
from kvcluster_kernels.rotated_rows import Slots, rotate_and_write
from kvcluster_kernels.row_products import Norm, ProductSettings, gated_product, products
from torch import Tensor

UNIT = torch.finfo(torch.float32).eps
SETTINGS = ProductSettings(rows=4, columns=64)


def row_and_weights(dim: int, *num_rows: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(dim)
    weights = [torch.randn(n, dim, generator=generator) / math.sqrt(dim) for n in num_rows]
    return torch.randn(dim, generator=generator), weights


def norm_of(dim: int) -> Norm:
    return Norm(torch.linspace(0.5, 1.5, dim), 1e-5)


def wide(norm: Norm) -> Norm:
    return Norm(norm.weight_E.double(), norm.epsilon)


def assert_close(found: Tensor, right: Tensor, dim: int) -> None:
    """A sum of `dim` numbers near one is rounded about as often."""
    torch.testing.assert_close(found.double(), right, rtol=0, atol=4 * dim * UNIT)


@pytest.mark.parametrize("dim", [64, 200])
@pytest.mark.parametrize("num_rows", [(12,), (9, 5), (16, 4, 3)])
def test_weights_are_multiplied_one_after_another(
    num_rows: tuple[int, ...], dim: int, interpreted: torch.device
) -> None:
    x_E, weights = row_and_weights(dim, *num_rows)
    wide_weights = [weight.double() for weight in weights]

    found = products(x_E, weights, settings=SETTINGS)
    normed = products(x_E, weights, norm=norm_of(dim), settings=SETTINGS)

    assert_close(found, plain.products(x_E.double(), wide_weights), dim)
    right = plain.products(x_E.double(), wide_weights, norm=wide(norm_of(dim)))
    assert_close(normed, right, dim)


def test_biases_and_residuals_are_added(interpreted: torch.device) -> None:
    x_E, weights = row_and_weights(96, 8, 7, 6)
    biases = [torch.randn(len(weight)) for weight in weights]
    residual_N = torch.randn(8)

    biased = products(x_E, weights, biases_N=biases, settings=SETTINGS)
    added = products(x_E, weights[:1], residual_N=residual_N, settings=SETTINGS)

    wide_weights = [weight.double() for weight in weights]
    right = plain.products(x_E.double(), wide_weights, biases_N=[bias.double() for bias in biases])
    assert_close(biased, right, 96)
    right = plain.products(x_E.double(), wide_weights[:1], residual_N=residual_N.double())
    assert_close(added, right, 96)


def test_a_gate_opens_what_is_beside_it(interpreted: torch.device) -> None:
    x_E, (gate_NE, up_NE) = row_and_weights(200, 21, 21)

    found = gated_product(x_E, gate_NE, up_NE, norm=norm_of(200), settings=SETTINGS)

    right = plain.gated_product(
        x_E.double(), gate_NE.double(), up_NE.double(), norm=wide(norm_of(200))
    )
    assert_close(found, right, 200)


def test_what_does_not_go_together_is_refused() -> None:
    x_E, weights = row_and_weights(64, 8, 4)

    with pytest.raises(ValueError, match="does not go with"):
        products(x_E[:32].clone(), weights)
    with pytest.raises(ValueError, match="a norm of"):
        products(x_E, weights, norm=norm_of(32))
    with pytest.raises(ValueError, match="as long as"):
        products(x_E, weights, residual_N=x_E)
    with pytest.raises(ValueError, match="contiguous"):
        products(x_E, [weights[0][:, :].T.contiguous().T])
    with pytest.raises(ValueError, match="as long as what it opens"):
        gated_product(x_E, *weights, norm=norm_of(64))


def test_rows_are_turned_and_written_to_their_slots(interpreted: torch.device) -> None:
    torch.manual_seed(0)
    num_rows, num_query_heads, num_kv_heads, dim = 3, 4, 2, 24
    qkv_RXD = torch.randn(num_rows, num_query_heads + 2 * num_kv_heads, dim)
    angles_RD = torch.randn(num_rows, dim // 2).repeat(1, 2)
    cos_RD, sin_RD = angles_RD.cos(), angles_RD.sin()
    # Pages of a pool that other layers share.
    pool = torch.full((4, 2, num_kv_heads, 8, dim), math.nan)
    slots = Slots(pool[:, 0], pool[:, 1], torch.tensor([3, 0, 3]), torch.tensor([1, 7, 2]))

    q_RHD = rotate_and_write(qkv_RXD, cos_RD, sin_RD, slots)

    written = 0
    for row in range(num_rows):
        turned_XD = plain.rotated(
            qkv_RXD[row].double(),
            cos_RD[row].double(),
            sin_RD[row].double(),
            num_query_heads + num_kv_heads,
        )
        q_HD, k_KD, v_KD = turned_XD.split([num_query_heads, num_kv_heads, num_kv_heads])
        page, offset = slots.pages_R[row], slots.offsets_R[row]
        # Two products of numbers below eight, and their sum.
        for found, right in (
            (q_RHD[row], q_HD),
            (slots.k_PKSD[page, :, offset], k_KD),
            (slots.v_PKSD[page, :, offset], v_KD),
        ):
            torch.testing.assert_close(found.double(), right, rtol=0, atol=24 * UNIT)
            written += found.numel()
    num_kept = num_rows * num_kv_heads * dim * 2
    assert written == q_RHD.numel() + num_kept
    assert int(pool.isfinite().sum()) == num_kept


def test_rows_that_do_not_fit_their_pages_are_refused() -> None:
    qkv_RXD, turns_RD = torch.zeros(1, 6, 16), torch.zeros(1, 16)
    pages = torch.zeros(1, 2, 8, 16)
    ids_R = torch.zeros(1, dtype=torch.int64)

    with pytest.raises(ValueError, match="do not go together"):
        rotate_and_write(qkv_RXD, turns_RD[:, :8], turns_RD, Slots(pages, pages, ids_R, ids_R))
    heads_last = torch.zeros(1, 8, 2, 16).transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        rotate_and_write(qkv_RXD, turns_RD, turns_RD, Slots(heads_last, pages, ids_R, ids_R))


@pytest.mark.parametrize("nums_splits", [(1,), (3, 70), (2, 5, 300)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_pools_are_combined_in_one_go(
    nums_splits: tuple[int, ...], has_sinks: bool, interpreted: torch.device
) -> None:
    torch.manual_seed(1)
    num_rows, num_kv_heads, num_query_rows, dim, num_tokens = 2, 2, 6, 40, 2
    pools = []
    for number, num_splits in enumerate(nums_splits):
        out = torch.randn(num_rows, num_kv_heads, num_splits, num_query_rows, dim)
        lse = torch.randn(num_rows, num_kv_heads, num_splits, num_query_rows) * 5
        lse[number % 2, 0, :, 3] = -math.inf
        lse[1, 1] = -math.inf
        out = torch.where(lse[..., None] == -math.inf, math.nan, out)
        pools.append(SplitPartials(out, lse))
    num_heads = num_kv_heads * num_query_rows // num_tokens
    sinks_H = torch.randn(num_heads) if has_sinks else None

    found = combine_pools(pools, num_tokens=num_tokens, out_dtype=torch.float32, sinks_H=sinks_H)

    right = combine_pools_plain(
        [SplitPartials(out.double(), lse.double()) for out, lse in pools],
        num_tokens=num_tokens,
        out_dtype=torch.float64,
        sinks_H=None if sinks_H is None else sinks_H.double(),
    )
    assert found.isfinite().all()
    # Weights of exponents up to 20, rounded by 20 units, of numbers below 8 that are averaged.
    torch.testing.assert_close(found.double(), right.double(), rtol=0, atol=200 * UNIT)
