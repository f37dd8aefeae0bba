"""Step by step a sequence is read as one pass reads it, where one pass can say how."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcluster.cache.exact_region import ExactRegion
from kvcluster.codec.method import LayerCodec
from kvcluster.quality.retained import RetainedAttention
from kvcluster.quality.stepwise import StepwiseAttention
from kvcluster.quality.stored import StoredBytes
from kvcluster.quality.strict import ExactTokens, LayerCodecs
from kvcluster.retention.base import RetentionPolicy
from kvcluster.retention.full import FullRetention
from kvcluster.retention.window import WindowRetention
from tests.codec_models import calibrated_codecs, plain_codecs
from tests.scripted_model import ScriptedModel, geometry, latent_geometry

SIZE, MAX_TOKENS = 16, 200
MODEL = ScriptedModel(
    geometry(),
    geometry(window=40),
    geometry(kv_layer=0),
    geometry(softcap=3.0),
    max_tokens=MAX_TOKENS,
)
LATENT_MODEL = ScriptedModel(latent_geometry(), max_tokens=MAX_TOKENS)
STACKED_MODEL = ScriptedModel(geometry(), geometry(), max_tokens=MAX_TOKENS)
SINKS_H = torch.tensor([0.5, -1.0, 2.0, 0.0])


def run(
    attention: StepwiseAttention | RetainedAttention, model: ScriptedModel, ends: Sequence[int]
) -> list[Tensor]:
    """out_THD of each layer, the positions computed in runs that end there."""
    runs = [
        [
            attention.attend(layer, *(x[start:end] for x in qkv), SINKS_H)
            for layer, qkv in enumerate(model.script)
        ]
        for start, end in pairwise([0, *ends])
    ]
    return [torch.cat(of_layer) for of_layer in zip(*runs, strict=True)]


def stepwise(
    model: ScriptedModel,
    layers: Sequence[LayerCodec | LayerCodecs],
    exact: ExactRegion,
    recent_blocks: int | None = None,
) -> StepwiseAttention:
    return StepwiseAttention(
        model.spec,
        [LayerCodecs(*layer) for layer in layers],
        exact,
        block_size=SIZE,
        recent_blocks=recent_blocks,
    )


def in_one_pass(
    model: ScriptedModel, layers: Sequence[LayerCodec], lag: int, recent_blocks: int | None
) -> RetainedAttention:
    retention: RetentionPolicy = FullRetention()
    if recent_blocks is not None:
        retention = WindowRetention(recent=recent_blocks * SIZE, block_size=SIZE)
    return RetainedAttention(
        model.spec,
        retention,
        lambda layer: LayerCodecs(*layers[layer]),
        exact=ExactTokens(block_size=SIZE, lag=lag),
    )


@settings(max_examples=25, deadline=None)
@given(
    case=st.sampled_from([(MODEL, "int4"), (MODEL, "latent:r=0.5,bits=8"), (LATENT_MODEL, "int8")]),
    num_tokens=st.integers(1, MAX_TOKENS),
    lag=st.integers(0, 3),
    recent_blocks=st.sampled_from([None, None, 1, 3]),
)
def test_blocks_that_are_encoded_one_by_one_are_read_and_counted_as_in_one_pass(
    case: tuple[ScriptedModel, str], num_tokens: int, lag: int, recent_blocks: int | None
) -> None:
    model, codec = case
    codecs = plain_codecs if model is LATENT_MODEL else calibrated_codecs
    layers = codecs(model.spec).layers(codec)
    ours = stepwise(model, layers, ExactRegion(lag), recent_blocks)
    theirs = in_one_pass(model, layers, lag, recent_blocks)

    found = run(ours, model, [*range(SIZE, num_tokens, SIZE), num_tokens])

    for found_THD, expected_THD in zip(found, run(theirs, model, [num_tokens]), strict=True):
        # Sums of float32 numbers near 1 over at most 200 keys, in another order.
        torch.testing.assert_close(found_THD, expected_THD, rtol=0, atol=2e-5)
    assert ours.stored() == theirs.stored()


@pytest.mark.parametrize("ends", [(70, 96, 150), (32, 40, 64, 65, 96, 128, 150)])
def test_a_step_may_be_cut_anywhere(ends: Sequence[int]) -> None:
    layers = calibrated_codecs(STACKED_MODEL.spec).layers("latent:r=0.25,bits=8,layers=2")
    exact = ExactRegion(1, 6)
    steps = stepwise(STACKED_MODEL, layers, exact)
    cut = stepwise(STACKED_MODEL, layers, exact)

    whole = run(steps, STACKED_MODEL, (96, 150))

    for found_THD, expected_THD in zip(run(cut, STACKED_MODEL, ends), whole, strict=True):
        # As above.
        torch.testing.assert_close(found_THD, expected_THD, rtol=0, atol=2e-5)
    assert cut.stored() == steps.stored()


def test_a_latent_of_two_layers_counts_once() -> None:
    """150 tokens: the last is in block 9, so blocks 1 to 4 are encoded, and 86 tokens are not."""
    codecs = calibrated_codecs(STACKED_MODEL.spec)
    attention = stepwise(STACKED_MODEL, codecs.layers("latent:r=0.25,layers=2"), ExactRegion(1, 6))

    run(attention, STACKED_MODEL, (96, 150))

    assert attention.stored() == StoredBytes(
        num_tokens=150,
        exact_elements=86 * 128,
        encoded_elements=64 * 128,
        # 16 directions of keys and 16 of values, as float16.
        encoded_bytes=64 * 32 * 2,
    )


def test_layers_that_are_stored_exact_are_read_so() -> None:
    exact = stepwise(STACKED_MODEL, [LayerCodecs(None, None)] * 2, ExactRegion())
    theirs = RetainedAttention(
        STACKED_MODEL.spec, FullRetention(), exact=ExactTokens(block_size=SIZE)
    )

    found = run(exact, STACKED_MODEL, [*range(SIZE, 150, SIZE), 150])

    for found_THD, expected_THD in zip(found, run(theirs, STACKED_MODEL, [150]), strict=True):
        # As above.
        torch.testing.assert_close(found_THD, expected_THD, rtol=0, atol=2e-5)
    assert exact.stored().encoded_elements == 0


def test_rows_of_two_steps_are_refused() -> None:
    layers = calibrated_codecs(STACKED_MODEL.spec).layers("latent:layers=2")
    attention = stepwise(STACKED_MODEL, layers, ExactRegion(2, 2))

    with pytest.raises(ValueError, match="rows 0 to 32 are not of one step"):
        run(attention, STACKED_MODEL, [33])
