"""Inner forms give the dot products and the weighted sums of what they stand for."""

import pytest
import torch
from torch import Tensor

from kvcluster.codec.array import BlockShape
from kvcluster.codec.inner import InnerKeys, InnerValues, inner_keys, inner_values
from tests.unit.codec.test_array_codecs import ARRAY_CODECS
from tests.unit.codec.test_latent import CODECS as LATENTS
from tests.unit.codec.test_latent import low_rank_blocks, positions_of, rotated

ALL = {name: codec for name, (codec, _) in ARRAY_CODECS.items()} | LATENTS
SHAPE = BlockShape(num_heads=3, num_tokens=32, dim=16)
NUM_QUERY_HEADS = 6


def stored(name: str) -> tuple[tuple[Tensor, ...], Tensor]:
    # As the calibration of latents has seen them: others have latents of a thousand deviations,
    # and what is left of their rounding differs.
    x_BKSD = low_rank_blocks(4)
    if name.startswith("keys") and name != "keys-unrotated":
        x_BKSD = rotated(x_BKSD)
    positions_BS = positions_of(x_BKSD)
    return ALL[name].encode(x_BKSD, positions_BS), positions_BS


def of_query_heads(x_BJSC: Tensor) -> Tensor:
    """x_HSC: the blocks one after another, each head for the query heads that share it."""
    x_JSC = x_BJSC.transpose(0, 1).flatten(1, 2)
    return x_JSC.repeat_interleave(NUM_QUERY_HEADS // len(x_JSC), dim=0)


@pytest.mark.parametrize("name", ALL)
def test_folded_queries_meet_inner_keys_as_queries_meet_keys(name: str) -> None:
    planes, positions_BS = stored(name)
    q_THD = torch.randn(5, NUM_QUERY_HEADS, SHAPE.dim, generator=torch.Generator().manual_seed(1))
    reader = inner_keys(ALL[name])

    k_HSD = of_query_heads(ALL[name].decode(planes, positions_BS))
    z_HSC = of_query_heads(reader.inner(planes, positions_BS))

    defined = torch.einsum("thd,hsd->ths", q_THD, k_HSD)
    ours = torch.einsum("thc,hsc->ths", reader.fold(q_THD), z_HSC)
    # Sums of 16 products of numbers up to 30 and 4, in float32.
    torch.testing.assert_close(ours, defined, rtol=0, atol=5e-4)


@pytest.mark.parametrize("name", ALL)
def test_expanded_sums_of_inner_values_are_sums_of_values(name: str) -> None:
    planes, positions_BS = stored(name)
    num_tokens = len(positions_BS) * SHAPE.num_tokens
    generator = torch.Generator().manual_seed(1)
    logits_THS = torch.randn(5, NUM_QUERY_HEADS, num_tokens, generator=generator)
    weights_THS = logits_THS.softmax(-1)
    reader = inner_values(ALL[name])

    v_HSD = of_query_heads(ALL[name].decode(planes, positions_BS))
    z_HSC = of_query_heads(reader.inner(planes, positions_BS))

    defined = torch.einsum("ths,hsd->thd", weights_THS, v_HSD)
    ours = reader.expand(torch.einsum("ths,hsc->thc", weights_THS, z_HSC))
    # Sums of values up to 30 with weights that add up to 1, in float32.
    torch.testing.assert_close(ours, defined, rtol=0, atol=5e-5)


def test_codecs_with_an_inner_form_offer_it_themselves() -> None:
    assert isinstance(LATENTS["values"], InnerValues)
    assert not isinstance(LATENTS["values"], InnerKeys)
    assert isinstance(LATENTS["keys"], InnerKeys)
    assert isinstance(ALL["rotated-3-centred"], InnerKeys)
    assert isinstance(ALL["rotated-3-transposed"], InnerValues)
    assert not isinstance(ALL["float8"], InnerKeys)
