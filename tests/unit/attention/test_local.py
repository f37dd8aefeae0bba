"""The fused kernels compute what the plain definition says, for every mask and shape."""

import math

import pytest
import torch

from kvcluster.attention.local import (
    attend,
    attend_causal,
    attend_pieces,
    attend_plain,
    visible,
)
from kvcluster.cache.store import Piece
from kvcluster.types import LayerGeometry

# A few hundred float32 roundings of numbers near 1, summed in another order.
ATOL = 2e-5


def geometry(
    *, group: int = 2, dim: int = 16, window: int | None = None, softcap: float | None = None
) -> LayerGeometry:
    return LayerGeometry(
        num_query_heads=2 * group,
        num_kv_heads=2,
        key_dim=dim,
        value_dim=dim,
        scale=dim**-0.5,
        window=window,
        softcap=softcap,
    )


def random_qkv(
    layer: LayerGeometry, num_tokens: int, num_keys: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens * 1000 + num_keys)
    return (
        torch.randn(num_tokens, layer.num_query_heads, layer.key_dim, generator=generator),
        torch.randn(2, num_keys, layer.key_dim, generator=generator),
        torch.randn(2, num_keys, layer.value_dim, generator=generator),
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("num_keys", [1, 15, 64, 257])
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
@pytest.mark.parametrize("group", [1, 3])
def test_attention_over_all_keys_is_the_definition(
    num_tokens: int, num_keys: int, group: int, softcap: float | None
) -> None:
    layer = geometry(group=group, softcap=softcap)
    q_THD, k_KSD, v_KSD = random_qkv(layer, num_tokens, num_keys)

    partial = attend(q_THD, k_KSD, v_KSD, layer)

    expected = attend_plain(q_THD, k_KSD, v_KSD, layer)
    torch.testing.assert_close(partial.out_THD, expected.out_THD, rtol=0, atol=ATOL)
    torch.testing.assert_close(partial.lse_TH, expected.lse_TH, rtol=0, atol=ATOL)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("page_counts", [(), (1,), (4,), (1, 3, 1)])
def test_attention_over_pieces_is_attention_over_their_keys(
    page_counts: tuple[int, ...], group: int, num_tokens: int, softcap: float | None
) -> None:
    layer = geometry(group=group, softcap=softcap)
    q_THD, k_KSD, v_KSD = random_qkv(layer, num_tokens, 16 * sum(page_counts))
    pages = Piece(*(x_KSD.unflatten(1, (-1, 16)).transpose(0, 1) for x_KSD in (k_KSD, v_KSD)))
    cuts = [slice(sum(page_counts[:n]), sum(page_counts[: n + 1])) for n in range(len(page_counts))]

    partial = attend_pieces(
        q_THD, [Piece(pages.k_PKSD[cut], pages.v_PKSD[cut]) for cut in cuts], layer
    )

    expected = attend(q_THD, k_KSD, v_KSD, layer)
    torch.testing.assert_close(partial.out_THD, expected.out_THD, rtol=0, atol=ATOL)
    torch.testing.assert_close(partial.lse_TH, expected.lse_TH, rtol=0, atol=ATOL)


def test_the_definition_is_softmax_attention_in_float64() -> None:
    layer = geometry(softcap=3.0)
    q_THD, k_KSD, v_KSD = random_qkv(layer, 5, 9)
    mask_TS = visible(torch.arange(4, 9), torch.arange(9), None)

    partial = attend_plain(q_THD, k_KSD, v_KSD, layer, mask_TS)

    k_HSD = k_KSD.double().repeat_interleave(2, dim=0)
    logits_HTS = q_THD.double().transpose(0, 1) @ k_HSD.mT * layer.scale
    logits_HTS = (3.0 * (logits_HTS / 3.0).tanh()).masked_fill(~mask_TS, -math.inf)
    out_HTD = logits_HTS.softmax(-1) @ v_KSD.double().repeat_interleave(2, dim=0)
    torch.testing.assert_close(partial.out_THD.double(), out_HTD.transpose(0, 1), rtol=0, atol=2e-6)
    torch.testing.assert_close(
        partial.lse_TH.double(), logits_HTS.logsumexp(-1).T, rtol=0, atol=2e-6
    )


def test_a_row_that_sees_no_key_gives_the_empty_partial() -> None:
    layer = geometry()
    q_THD, k_KSD, v_KSD = random_qkv(layer, 3, 8)
    mask_TS = torch.ones(3, 8, dtype=torch.bool)
    mask_TS[1] = False

    partial = attend(q_THD, k_KSD, v_KSD, layer, mask_TS)

    assert torch.equal(partial.out_THD[1], torch.zeros(4, 16))
    assert torch.equal(partial.lse_TH[1], torch.full((4,), -math.inf))
    assert partial.lse_TH[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("num_tokens", "num_keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys_give_the_empty_partial(num_tokens: int, num_keys: int) -> None:
    layer = geometry()
    q_THD, k_KSD, v_KSD = random_qkv(layer, num_tokens, num_keys)

    partial = attend(q_THD, k_KSD, v_KSD, layer)

    assert partial.out_THD.shape == (num_tokens, 4, 16)
    assert torch.equal(partial.lse_TH, torch.full((num_tokens, 4), -math.inf))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 7, 130, 1000])
@pytest.mark.parametrize(("first", "num_tokens"), [(0, 1), (0, 9), (13, 9), (5, 1), (40, 301)])
def test_attention_inside_a_chunk_is_causal_and_windowed(
    first: int, num_tokens: int, window: int | None, softcap: float | None
) -> None:
    layer = geometry(window=window, softcap=softcap)
    num_keys = first + num_tokens + 3
    q_THD, k_KSD, v_KSD = random_qkv(layer, num_tokens, num_keys)

    partial = attend_causal(q_THD, k_KSD, v_KSD, layer, first)

    mask_TS = visible(torch.arange(first, first + num_tokens), torch.arange(num_keys), window)
    expected = attend_plain(q_THD, k_KSD, v_KSD, layer, mask_TS)
    torch.testing.assert_close(partial.out_THD, expected.out_THD, rtol=0, atol=ATOL)
    torch.testing.assert_close(partial.lse_TH, expected.lse_TH, rtol=0, atol=ATOL)


def test_keys_may_be_strided_views_of_a_pool() -> None:
    layer = geometry()
    q_THD, k_KSD, v_KSD = random_qkv(layer, 3, 40)

    partial = attend(q_THD, k_KSD[:, 8:24], v_KSD[:, 8:24], layer)

    expected = attend_plain(q_THD, k_KSD[:, 8:24].contiguous(), v_KSD[:, 8:24].contiguous(), layer)
    torch.testing.assert_close(partial.out_THD, expected.out_THD, rtol=0, atol=ATOL)


def test_bfloat16_inputs_give_float32_partials() -> None:
    layer = geometry()
    q_THD, k_KSD, v_KSD = (x.bfloat16() for x in random_qkv(layer, 3, 40))

    partial = attend(q_THD, k_KSD, v_KSD, layer)

    assert partial.out_THD.dtype == partial.lse_TH.dtype == torch.float32


def test_value_heads_may_be_narrower_than_key_heads() -> None:
    layer = LayerGeometry(num_query_heads=4, num_kv_heads=2, key_dim=16, value_dim=8, scale=0.25)
    q_THD, k_KSD, _ = random_qkv(layer, 3, 10)

    partial = attend_causal(q_THD, k_KSD, torch.ones(2, 10, 8), layer, first=2)

    torch.testing.assert_close(partial.out_THD, torch.ones(3, 4, 8))


def latent_layer(num_query_heads: int = 6) -> LayerGeometry:
    return LayerGeometry(
        num_query_heads=num_query_heads,
        num_kv_heads=1,
        key_dim=24,
        value_dim=16,
        scale=0.2,
        values_in_keys=True,
    )


@pytest.mark.parametrize("num_query_heads", [6, 40])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_values_that_are_part_of_keys_give_what_the_definition_gives(
    num_tokens: int, num_query_heads: int
) -> None:
    layer = latent_layer(num_query_heads)
    q_THD, k_KSD, _ = random_qkv(layer, num_tokens, 50)
    k_KSD = k_KSD[:1]
    v_KSD = k_KSD[..., : layer.value_dim]

    fused = attend(q_THD, k_KSD, v_KSD, layer)

    expected = attend_plain(q_THD, k_KSD, v_KSD, layer)
    torch.testing.assert_close(fused.out_THD, expected.out_THD, rtol=0, atol=ATOL)
    torch.testing.assert_close(fused.lse_TH, expected.lse_TH, rtol=0, atol=ATOL)


def test_values_that_are_part_of_keys_are_read_page_by_page() -> None:
    layer = latent_layer()
    q_THD, k_KSD, _ = random_qkv(layer, 1, 48)
    k_PKSD = k_KSD[:1].reshape(1, 3, 16, 24).transpose(0, 1)

    paged = attend_pieces(q_THD, [Piece(k_PKSD, k_PKSD[..., :16])], layer)

    expected = attend_plain(q_THD, k_KSD[:1], k_KSD[:1, :, :16], layer)
    torch.testing.assert_close(paged.out_THD, expected.out_THD, rtol=0, atol=ATOL)
    torch.testing.assert_close(paged.lse_TH, expected.lse_TH, rtol=0, atol=ATOL)


@pytest.mark.parametrize("first", [0, 7])
def test_a_chunk_of_latents_is_causal(first: int) -> None:
    layer = latent_layer()
    q_THD, k_KSD, _ = random_qkv(layer, 9, first + 9)
    k_KSD = k_KSD[:1]
    mask_TS = visible(torch.arange(first, first + 9), torch.arange(first + 9), None)

    partial = attend_causal(q_THD, k_KSD, k_KSD[..., :16], layer, first)

    expected = attend_plain(q_THD, k_KSD, k_KSD[..., :16], layer, mask_TS)
    torch.testing.assert_close(partial.out_THD, expected.out_THD, rtol=0, atol=ATOL)
    torch.testing.assert_close(partial.lse_TH, expected.lse_TH, rtol=0, atol=ATOL)
