"""The definition that everything is compared with agrees with torch where torch can say it."""

import math

import pytest
import torch
from torch import Tensor

from kvcluster.model.reference_attention import ReferenceAttention, attend_plainly
from kvcluster.types import LayerGeometry

# One float32 softmax of 9 keys in another order of summation.
ROUNDING = {"atol": 1e-6, "rtol": 1e-5}


def geometry(
    *, window: int | None = None, softcap: float | None = None, has_sinks: bool = False
) -> LayerGeometry:
    return LayerGeometry(
        num_query_heads=4,
        num_kv_heads=2,
        key_dim=8,
        value_dim=6,
        scale=0.3,
        window=window,
        softcap=softcap,
        has_sinks=has_sinks,
    )


def random_qkv(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(num_tokens, 4, 8, generator=generator),
        torch.randn(num_tokens, 2, 8, generator=generator),
        torch.randn(num_tokens, 2, 6, generator=generator),
    )


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_it_is_scaled_dot_product_attention_with_a_causal_window(window: int | None) -> None:
    q_THD, k_TKD, v_TKD = random_qkv(9)
    attention = ReferenceAttention([geometry(window=window)])
    attention.begin(torch.arange(9))
    distance = torch.arange(9)[:, None] - torch.arange(9)[None]
    mask = (distance >= 0) & (distance < (window or 9))

    out_THD = attention.attend(0, q_THD, k_TKD, v_TKD, None)

    expected = torch.nn.functional.scaled_dot_product_attention(
        q_THD.transpose(0, 1),
        k_TKD.transpose(0, 1),
        v_TKD.transpose(0, 1),
        attn_mask=mask,
        scale=0.3,
        enable_gqa=True,
    ).transpose(0, 1)
    torch.testing.assert_close(out_THD, expected, **ROUNDING)


def test_a_sink_takes_its_share_of_the_softmax() -> None:
    q_THD, k_TKD, v_TKD = torch.zeros(1, 4, 8), torch.zeros(1, 2, 8), torch.ones(1, 2, 6)
    sinks_H = torch.log(torch.tensor([1.0, 3.0, 7.0, 0.0]))

    out_THD = attend_plainly(
        geometry(has_sinks=True), q_THD, k_TKD, v_TKD, torch.ones(1, 1, dtype=torch.bool), sinks_H
    )

    expected_H = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1.0])
    torch.testing.assert_close(out_THD[0, :, 0], expected_H, **ROUNDING)


def test_a_soft_cap_bounds_the_logits() -> None:
    q_THD, v_SKD = torch.ones(1, 4, 8), torch.tensor([0.0, 1.0])[:, None, None].expand(2, 2, 6)
    k_SKD = torch.tensor([0.0, 1e6])[:, None, None].expand(2, 2, 8)

    out_THD = attend_plainly(
        geometry(softcap=2.0), q_THD, k_SKD, v_SKD, torch.ones(1, 2, dtype=torch.bool), None
    )

    expected = math.exp(2) / (1 + math.exp(2))
    torch.testing.assert_close(out_THD, torch.full((1, 4, 6), expected), **ROUNDING)
