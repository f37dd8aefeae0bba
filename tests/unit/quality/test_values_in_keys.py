"""Layers whose values are part of their keys are read, and counted, from the keys alone."""

import pytest
import torch
from msgspec import structs
from torch import Tensor

from kvcluster.codec.array import ArrayCodec
from kvcluster.quality.retained import RetainedAttention
from kvcluster.quality.strict import ExactTokens, LayerCodecs, StrictAttention
from kvcluster.retention.base import RetentionPolicy
from kvcluster.retention.heavy_hitters import HeavyHitters
from kvcluster.retention.key_diversity import KeyDiversity
from kvcluster.retention.snap import Snap
from kvcluster.retention.window import WindowRetention
from kvcluster.types import LayerGeometry
from tests.unit.quality.toys import Coarse, Undeclared, spec_of

# Some hundred float32 roundings of numbers near 1, summed in another order.
ATOL = 2e-5
SIZE = 4
WIDE = LayerGeometry(num_query_heads=4, num_kv_heads=1, key_dim=8, value_dim=8, scale=0.4)
"""Values are all of the keys, stored apart: its first outputs are those of `LATENT`."""
LATENT = structs.replace(WIDE, value_dim=5, values_in_keys=True)
NUM_TOKENS = 61
SIZES = {"block_size": SIZE, "epoch_tokens": 12}
RETENTIONS: list[RetentionPolicy] = [
    WindowRetention(recent=8, block_size=SIZE),
    HeavyHitters(budget=0.4, **SIZES),
    Snap(budget=0.4, queries=5, **SIZES),
    KeyDiversity(budget=0.4, recent=0.2, **SIZES),
]


def queries_and_keys() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        2 * torch.randn(NUM_TOKENS, 4, 8, generator=generator),
        2 * torch.randn(NUM_TOKENS, 1, 8, generator=generator),
    )


@pytest.mark.parametrize("codec", [None, Coarse()])
@pytest.mark.parametrize("window", [None, 10])
def test_values_are_the_first_numbers_of_the_stored_keys(
    window: int | None, codec: ArrayCodec | None
) -> None:
    q_THD, k_TKD = queries_and_keys()
    exact = ExactTokens(block_size=SIZE, lag=1)
    latent, wide = (structs.replace(layer, window=window) for layer in (LATENT, WIDE))
    # Were the codec of the values asked, it would fail: it writes other planes than it declares.
    codecs = LayerCodecs(codec, Undeclared())
    attention = StrictAttention(spec_of(latent), lambda _layer: codecs, exact)

    out_THD = attention.attend(0, q_THD, k_TKD, k_TKD[..., :5], None)

    whole = StrictAttention(spec_of(wide), lambda _layer: LayerCodecs(codec, codec), exact)
    whole_THD = whole.attend(0, q_THD, k_TKD, k_TKD, None)
    torch.testing.assert_close(out_THD, whole_THD[..., :5], rtol=0, atol=ATOL)


def test_values_take_no_bytes() -> None:
    q_THD, k_TKD = queries_and_keys()
    codecs = LayerCodecs(Coarse(), Coarse())
    exact = ExactTokens(block_size=SIZE)
    attention = StrictAttention(spec_of(LATENT), lambda _layer: codecs, exact)

    attention.attend(0, q_THD, k_TKD, k_TKD[..., :5], None)

    stored = attention.stored()
    # Sixteen blocks, of which the first and the open one are exact; a byte an element.
    assert stored.encoded_elements == stored.encoded_bytes == 14 * SIZE * 8
    assert stored.exact_elements == (NUM_TOKENS - 14 * SIZE) * 8


@pytest.mark.parametrize("retention", RETENTIONS, ids=lambda retention: retention.name)
def test_values_of_survivors_are_the_first_numbers_of_their_keys(
    retention: RetentionPolicy,
) -> None:
    q_THD, k_TKD = queries_and_keys()
    codec, exact = Coarse(), ExactTokens(block_size=SIZE)
    attention = RetainedAttention(
        spec_of(LATENT), retention, lambda _layer: LayerCodecs(codec, None), exact=exact
    )

    out_THD = attention.attend(0, q_THD, k_TKD, k_TKD[..., :5], None)

    whole = RetainedAttention(
        spec_of(WIDE), retention, lambda _layer: LayerCodecs(codec, codec), exact=exact
    )
    whole_THD = whole.attend(0, q_THD, k_TKD, k_TKD, None)
    torch.testing.assert_close(out_THD, whole_THD[..., :5], rtol=0, atol=ATOL)
    stored = attention.stored()
    elements = stored.exact_elements + stored.encoded_elements + stored.dropped_elements
    assert elements == NUM_TOKENS * 8
    assert stored.encoded_elements > 0
