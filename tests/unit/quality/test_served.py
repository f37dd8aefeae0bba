"""Policies are measured as an engine serves them, and refused as it would refuse them."""

import pytest
import torch
from torch import Tensor

from kvcluster.errors import ConfigError, InvalidField
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.measure import EXACT, strict_policy
from kvcluster.quality.passes import final_states
from kvcluster.quality.retained import RetainedAttention
from kvcluster.quality.served import ServedPolicy, codecs_of, recent_exact, served_policies
from kvcluster.quality.strict import ExactTokens, LayerCodecs
from kvcluster.retention.full import FullRetention
from kvcluster.retention.key_diversity import KeyDiversity
from kvcluster.retention.window import WindowRetention
from kvcluster.selection.base import BlockSelection
from kvcluster.selection.estimated import Estimated
from kvcluster.selection.quest import Quest
from tests.architectures import VOCAB_SIZE
from tests.codec_models import calibration_of
from tests.unit.quality.toys import tiny_model

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("gemma3")


def served(model: LoadedModel, *texts: str, block_size: int = BLOCK_SIZE) -> list[ServedPolicy]:
    exact = recent_exact(block_size, exact_recent_tokens=20)
    return served_policies(texts, codecs_of(model, None), model.spec, exact)


def states(model: LoadedModel, policy: ServedPolicy) -> Tensor:
    ids_T = torch.randint(3, VOCAB_SIZE, (150,), generator=torch.Generator().manual_seed(0))
    return final_states(model, ids_T, policy.measured.attention(model.spec))


def test_the_lag_is_that_of_the_cache_settings() -> None:
    assert recent_exact(16, 0).lag == 0
    assert recent_exact(16, 20).lag == 2
    assert recent_exact(64, 256) == ExactTokens(block_size=64, lag=4)


@pytest.mark.parametrize(("block_size", "tokens"), [(0, 16), (16, -1)])
def test_settings_that_no_cache_has_are_refused(block_size: int, tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"got {block_size} and {tokens}"):
        recent_exact(block_size, tokens)


def test_policies_have_canonical_names_and_each_comes_once(model: LoadedModel) -> None:
    policies = served(model, "window:recent=32 + int4:key_group=64", "", "exact", "int4 + window")

    assert [policy.name for policy in policies] == [
        "int4 + window:recent=32",
        "exact",
        "int4 + window",
    ]
    assert not any(policy.needs_calibration for policy in policies)


def test_the_exact_policy_changes_nothing(model: LoadedModel) -> None:
    [exact] = served(model, "exact")

    ids_T = torch.randint(3, VOCAB_SIZE, (150,), generator=torch.Generator().manual_seed(0))
    expected_TE = final_states(model, ids_T, EXACT.attention(model.spec))
    assert torch.equal(states(model, exact), expected_TE)


def test_each_layer_has_the_codec_that_the_policy_gives_it(model: LoadedModel) -> None:
    text = "int2:values=rotated3,windowed=int8"
    [policy] = served(model, text)

    codecs = codecs_of(model, None).layers(text)
    alone = strict_policy(
        text,
        lambda layer: LayerCodecs(*codecs[layer]),
        ExactTokens(block_size=BLOCK_SIZE, lag=2),
    )
    expected_TE = states(model, ServedPolicy(measured=alone, needs_calibration=False))
    assert torch.equal(states(model, policy), expected_TE)


def test_a_window_drops_tokens_and_counts_their_bytes(model: LoadedModel) -> None:
    full, windowed = served(model, "int8", "int8 + window:recent=32")

    attention = windowed.measured.attention(model.spec)
    assert isinstance(attention, RetainedAttention)
    alone = RetainedAttention(
        model.spec,
        WindowRetention(recent=32, block_size=BLOCK_SIZE),
        lambda layer: LayerCodecs(*codecs_of(model, None).layers("int8")[layer]),
        exact=ExactTokens(block_size=BLOCK_SIZE, lag=2),
    )
    ids_T = torch.arange(3, 153)
    assert torch.equal(final_states(model, ids_T, attention), final_states(model, ids_T, alone))
    kept = full.measured.attention(model.spec)
    final_states(model, ids_T, kept)
    assert attention.stored().ratio > kept.stored().ratio


JOINED = "latent:r=0.5,bits=8,layers=2"


def served_joined(model: LoadedModel, *texts: str) -> list[ServedPolicy]:
    codecs = codecs_of(model, calibration_of(model.spec))
    return served_policies(texts, codecs, model.spec, recent_exact(BLOCK_SIZE, 20))


def test_latents_of_several_layers_are_measured_step_by_step() -> None:
    model = tiny_model("llama")
    [exact, alone, joined, windowed] = served_joined(
        model, "exact", "latent:r=0.5,bits=8", JOINED, f"{JOINED} + window:recent=32"
    )
    ids_T = torch.randint(3, VOCAB_SIZE, (150,), generator=torch.Generator().manual_seed(0))

    stored, found = [], []
    for policy in (exact, alone, joined, windowed):
        attention = policy.measured.attention(model.spec)
        run_tokens = policy.measured.run_tokens
        found.append(final_states(model, ids_T, attention, run_tokens=run_tokens))
        stored.append(attention.stored())

    assert joined.needs_calibration
    assert (alone.measured.run_tokens, joined.measured.run_tokens) == (None, 32)
    # Until the second step's first row, nothing that was encoded has been read.
    torch.testing.assert_close(found[2][:64], found[0][:64], rtol=0, atol=1e-4)
    assert not torch.allclose(found[2][64:], found[0][64:], atol=1e-3)
    # As many bytes for a token, and one more block that is exact: 145 lies in a step's second.
    assert stored[2].payload_bits_per_element == stored[1].payload_bits_per_element
    per_block = BLOCK_SIZE * sum(layer.kv_elements_per_token for layer in model.spec.layers)
    assert stored[2].exact_elements == stored[1].exact_elements + per_block
    assert stored[3].dropped_elements == 7 * per_block
    assert stored[3].encoded_bytes == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{JOINED} + snap:epoch=32,heads=shared", "other tokens in each layer"),
        (f"{JOINED} + quest:tokens=64", "not offered together with a selection"),
        ("latent:layers=2,windowed=int8", "puts no layers together"),
    ],
)
def test_latents_of_several_layers_that_no_engine_serves_are_not_measured(
    text: str, reason: str
) -> None:
    model = tiny_model("gemma3" if "windowed" in text else "llama")

    with pytest.raises(ConfigError, match=reason):
        served_joined(model, text)


@pytest.mark.parametrize(
    ("text", "selection", "num_prompt_tokens"),
    [
        ("quest:tokens=48", Quest(tokens=48, block_size=BLOCK_SIZE), 0),
        ("estimated:share=30%", Estimated(share=0.3, block_size=BLOCK_SIZE), None),
    ],
)
def test_a_selection_is_measured_as_it_is_served(
    model: LoadedModel, text: str, selection: BlockSelection, num_prompt_tokens: int | None
) -> None:
    """Texts are prompts, but to a selection that would leave them alone."""
    exact, selected = served(model, "exact", text)

    attention = selected.measured.attention(model.spec)
    alone = RetainedAttention(
        model.spec,
        FullRetention(),
        exact=ExactTokens(block_size=BLOCK_SIZE, lag=2),
        selection=selection,
        num_prompt_tokens=num_prompt_tokens,
    )
    ids_T = torch.arange(3, 153)
    found_TE = final_states(model, ids_T, attention)
    assert torch.equal(found_TE, final_states(model, ids_T, alone))
    full_TE = final_states(model, ids_T, exact.measured.attention(model.spec))
    assert not torch.equal(found_TE, full_TE)


def test_tokens_kept_by_score_are_measured_as_they_are_defined(model: LoadedModel) -> None:
    [policy] = served(model, "exact + key_diversity:budget=0.3,epoch=32")

    attention = policy.measured.attention(model.spec)
    alone = RetainedAttention(
        model.spec,
        KeyDiversity(budget=0.3, epoch_tokens=32, block_size=BLOCK_SIZE),
        exact=ExactTokens(block_size=BLOCK_SIZE, lag=2),
    )
    ids_T = torch.arange(3, 153)
    assert torch.equal(final_states(model, ids_T, attention), final_states(model, ids_T, alone))
    assert attention.stored().ratio > 1


def test_a_selection_of_survivors_is_measured_as_it_is_defined(model: LoadedModel) -> None:
    [policy] = served(model, "int4 + key_diversity:budget=0.5,epoch=32 + quest:tokens=48")

    attention = policy.measured.attention(model.spec)
    layers = codecs_of(model, None).layers("int4")
    alone = RetainedAttention(
        model.spec,
        KeyDiversity(budget=0.5, epoch_tokens=32, block_size=BLOCK_SIZE),
        lambda layer: LayerCodecs(*layers[layer]),
        exact=ExactTokens(block_size=BLOCK_SIZE, lag=2),
        selection=Quest(tokens=48, block_size=BLOCK_SIZE),
        num_prompt_tokens=0,
    )
    ids_T = torch.arange(3, 153)
    assert torch.equal(final_states(model, ids_T, attention), final_states(model, ids_T, alone))
    assert 0 < alone.read_share() < 1


def test_latents_are_measured_where_heads_share_their_tokens(model: LoadedModel) -> None:
    codecs, text = codecs_of(model, calibration_of(model.spec)), "latent:r=0.5 + snap:epoch=32"
    exact = ExactTokens(block_size=BLOCK_SIZE)

    with pytest.raises(ConfigError, match="ask for heads=shared"):
        served_policies([text], codecs, model.spec, exact)
    [policy] = served_policies([f"{text},heads=shared"], codecs, model.spec, exact)

    assert states(model, policy).isfinite().all()


def test_arrays_that_are_left_exact_count_as_those_of_the_exact_cache(model: LoadedModel) -> None:
    [policy] = served(model, "int8:values=exact,windowed=exact")
    attention = policy.measured.attention(model.spec)

    final_states(model, torch.arange(3, 153), attention)

    # Keys of one layer, a byte an element; values of all layers are two bytes, though the model
    # computes in four.
    assert attention.stored().payload_bits_per_element < 16
    assert attention.stored().ratio > 1


def test_latents_need_a_calibration_and_say_that_they_had_one(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="policy latent: latent codecs need a calibration file"):
        served(model, "latent")

    codecs = codecs_of(model, calibration_of(model.spec))
    [policy] = served_policies(["latent:r=0.5"], codecs, model.spec, ExactTokens(block_size=16))
    assert policy.needs_calibration
    assert states(model, policy).isfinite().all()


def test_pooled_heads_count_as_those_that_are_left(model: LoadedModel) -> None:
    """Of two heads one; as bfloat16, though the model computes in float32."""
    found = {}
    for policy in served(model, "pooled", "pooled + int8", "int8"):
        attention = policy.measured.attention(model.spec)
        final_states(model, torch.arange(3, 153), attention)
        found[policy.name] = attention.stored().payload_bits_per_element

    assert found["pooled + exact"] == 8
    assert found["pooled + int8"] == found["int8"] / 2


def test_learned_groups_need_a_calibration_and_say_that_they_had_one(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="by=learned needs a calibration file"):
        served(model, "pooled:by=learned")

    codecs = codecs_of(model, calibration_of(model.spec))
    exact = ExactTokens(block_size=16)
    averaged, learned = served_policies(["pooled", "pooled:by=learned"], codecs, model.spec, exact)
    assert not averaged.needs_calibration
    assert learned.needs_calibration
    assert not torch.equal(states(model, learned), states(model, averaged))


@pytest.mark.parametrize(
    ("text", "block_size", "reason"),
    [
        ("window:recent=40", 16, "give 16 or a multiple of it, not 40"),
        ("int4", 1, "policy int4: .* multiple of 2, not 1"),
        ("quest:tokens=40", 16, "give 48 or more, not 40"),
        ("snap:epoch=40", 16, "give 16 or a multiple of it, not 40"),
    ],
)
def test_what_the_model_or_the_blocks_cannot_have_is_refused(
    model: LoadedModel, text: str, block_size: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        served(model, "exact", text, block_size=block_size)


@pytest.mark.parametrize("text", ["int5", "int4 + int8", "auto: ppl<=1%", "heavy_hitter"])
def test_text_that_names_no_single_policy_is_refused(model: LoadedModel, text: str) -> None:
    with pytest.raises(InvalidField):
        served(model, text)
