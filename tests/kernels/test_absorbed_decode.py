"""Decode over latents as they are, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels import decode_plain, latent_plain
from kvcluster_kernels.absorbed_decode import decode_absorbed, decode_unrotated
from kvcluster_kernels.decode import ExactPages
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows
from torch import Tensor

from kvcluster.codec.latent import LatentKeys, LatentValues
from tests.kernels.decode_cases import (
    RAGGED,
    Batch,
    assert_close_to_definition,
    assert_within,
    draw_exact,
    draw_queries,
    draw_rows,
)
from tests.kernels.latent_cases import BLOCKS, bounds, draw_basis, expansion_of, latent_pages

ATTENTION = Attention(scale=0.2)
LATENTS = replace(RAGGED, num_heads=8, num_kv_heads=1, dim_k=96, dim_v=96)
"""Latents of 64 numbers and rotary keys of 32."""


def values_in_keys(pages: ExactPages, dim: int) -> ExactPages:
    return pages._replace(v_PKND=pages.k_PKND[..., :dim])


def drawn(batch: Batch, device: torch.device, dim: int) -> tuple[Tensor, ExactPages, PagedRows]:
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(batch, generator, device)
    q_RTHD = draw_queries(batch, generator, device)
    return q_RTHD, values_in_keys(draw_exact(batch, rows, generator, device), dim), rows


def check(
    batch: Batch,
    device: torch.device,
    *,
    dim: int = 64,
    attention: Attention = ATTENTION,
    settings: DecodeSettings | None = None,
) -> None:
    q_RTHD, pages, rows = drawn(batch, device, dim)

    found = decode_absorbed(q_RTHD, pages, rows, attention, settings)

    assert_close_to_definition(found, q_RTHD, pages, rows, attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_the_first_numbers_of_keys(
    dtype: torch.dtype, interpreted: torch.device
) -> None:
    check(replace(LATENTS, dtype=dtype), interpreted)


def test_latents_of_which_all_is_value(interpreted: torch.device) -> None:
    check(LATENTS, interpreted, dim=96)


def test_latents_wider_than_any_head(interpreted: torch.device) -> None:
    check(replace(LATENTS, dim_k=300, dim_v=300, lengths=(37, 0)), interpreted, dim=272)


@pytest.mark.parametrize("num_heads", [3, 32, 70])
def test_any_number_of_heads(num_heads: int, interpreted: torch.device) -> None:
    check(replace(LATENTS, num_heads=num_heads, lengths=(37, 0)), interpreted)


def test_several_query_tokens_with_a_window_and_splits(interpreted: torch.device) -> None:
    batch = replace(LATENTS, num_tokens=4, has_positions=True)

    check(
        batch,
        interpreted,
        attention=Attention(scale=0.2, softcap=3.0, window=20),
        settings=DecodeSettings(tile=16, num_splits=3),
    )


def test_absorbed_queries_give_what_expanded_keys_do(interpreted: torch.device) -> None:
    """The identity that the kernel stands on, in float64: keys of each head are expanded from the
    latent and have the rotary key beside them, values are expanded."""
    batch = replace(LATENTS, lengths=(40,), skipped=0)
    generator = torch.Generator().manual_seed(1)
    q_RTHD, pages, rows = drawn(batch, interpreted, 64)
    up_k_HNC = torch.randn(8, 24, 64, generator=generator).double() / 8
    up_v_HVC = torch.randn(8, 24, 64, generator=generator).double() / 8
    q_1THN = torch.randn(1, 1, 8, 24, generator=generator).double()
    q_1THR = q_RTHD[..., 64:].double()
    absorbed = torch.cat([torch.einsum("rthn,hnc->rthc", q_1THN, up_k_HNC), q_1THR], dim=-1)

    found = decode_absorbed(absorbed.float(), pages, rows, ATTENTION)

    x_1KSD = decode_plain.decode(absorbed, pages, rows, ATTENTION)
    blocks = pages.k_PKND.unflatten(2, (-1, pages.block_size))[:, 0].flatten(0, 1)
    token_SD = blocks[rows.blocks_RB[0].long()].flatten(0, 1)[:40].double()
    k_1HSD = torch.cat(
        [
            torch.einsum("hnc,sc->hsn", up_k_HNC, token_SD[:, :64]),
            token_SD[None, :, 64:].expand(8, -1, -1),
        ],
        dim=-1,
    )[None]
    v_1HSD = torch.einsum("hvc,sc->hsv", up_v_HVC, token_SD[:, :64])[None]
    want = decode_plain.attend_tokens(
        torch.cat([q_1THN, q_1THR], dim=-1), k_1HSD, v_1HSD,
        PagedRows(torch.zeros(1, 1, dtype=torch.int32), rows.starts_R, rows.ends_R), ATTENTION,
    )  # fmt: skip
    out_1THV = torch.einsum("rthc,hvc->rthv", found.out_RTHD.double(), up_v_HVC)
    # The kernel computes in float32, of sums of 100 products.
    torch.testing.assert_close(out_1THV, want.out_RTHD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.lse_RTH.double(), x_1KSD.lse_RTH, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.lse_RTH.double(), want.lse_RTH, rtol=1e-4, atol=1e-4)


def test_keys_that_are_not_turned_are_never_expanded(interpreted: torch.device) -> None:
    batch, rank = replace(BLOCKS, num_heads=6, num_kv_heads=2), 48
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(batch, generator, interpreted)
    q_RTHD = draw_queries(batch, generator, interpreted)
    basis = draw_basis(2, batch.dim_k, rank, generator)
    expansion = expansion_of(basis, 2, None, interpreted)
    keys = latent_pages(LatentKeys(basis, num_heads=2, rank=rank, rotation=None), batch, rows, 1)
    values = latent_pages(LatentValues(basis, num_heads=2, rank=rank), batch, rows, 2)

    found = decode_unrotated(q_RTHD, keys, (basis.up_CF, basis.mean_F), values, rows, ATTENTION)

    want = latent_plain.decode_latents(q_RTHD.double(), keys, expansion, values, rows, ATTENTION)
    k_RKSD = latent_plain.restore_keys(keys, expansion, rows, torch.float64)
    v_RKSD = latent_plain.restore_values(values, rows.blocks_RB, 64, torch.float64)
    magnitude_RKSD = v_RKSD.abs().expand(-1, 2, -1, -1)
    magnitude = decode_plain.attend_tokens(q_RTHD.double(), k_RKSD, magnitude_RKSD, rows, ATTENTION)
    assert_within(found, want, magnitude.out_RTHD, bounds(q_RTHD, k_RKSD, ATTENTION))


def test_values_apart_from_the_keys_are_refused() -> None:
    q_RTHD, pages, rows = drawn(LATENTS, torch.device("cpu"), 64)

    with pytest.raises(ValueError, match="first numbers of the keys"):
        decode_absorbed(q_RTHD, pages._replace(v_PKND=pages.v_PKND.clone()), rows, ATTENTION)


def test_keys_of_several_heads_are_refused() -> None:
    q_RTHD, pages, rows = drawn(replace(LATENTS, num_kv_heads=2), torch.device("cpu"), 64)

    with pytest.raises(ValueError, match="keys of one head"):
        decode_absorbed(q_RTHD, pages, rows, ATTENTION)
