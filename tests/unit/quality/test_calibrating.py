"""Bases come from keys before rotation, over all texts, however the run was broken off."""

import pytest
import torch
from torch import Tensor

from kvcluster.codec.calibration import Calibration
from kvcluster.errors import ConfigError
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.calibrating import (
    CalibrationText,
    Mixing,
    ModelMoments,
    add_text,
    calibration_texts,
    checked_rotaries,
    fitted,
    output_projections,
)
from kvcluster.quality.measure import EXACT
from kvcluster.quality.passes import final_states
from kvcluster.quality.strict import ExactTokens, StrictAttention
from kvcluster.quality.texts import Purpose, Text
from tests.architectures import VOCAB_SIZE
from tests.unit.quality.toys import character_tokenizer, tiny_model

WIDTH = 32  # of the tiny models' keys and values: 2 heads of 16
PROSE = Text(
    name="prose", purpose=Purpose.CALIBRATION, content="some words, one after another. " * 200
)
OTHER = Text(name="other", purpose=Purpose.EVALUATION, content="not to be read. " * 90)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


def noise(seed: int, num_tokens: int = 100) -> CalibrationText:
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=generator)
    return CalibrationText(f"kind{seed % 2}", tuple(ids_T.tolist()))


def moments_of(
    model: LoadedModel, *texts: CalibrationText, joined: tuple[int, ...] = ()
) -> ModelMoments:
    moments = ModelMoments(model.spec, joined)
    rotaries = checked_rotaries(model)
    for text in texts:
        add_text(model, rotaries, moments, text)
    return moments


def calibrated(
    model: LoadedModel, moments: ModelMoments, mixing: Mixing = Mixing.BOUND
) -> Calibration:
    return fitted(model, checked_rotaries(model), moments, mixing=mixing)


def seen(model: LoadedModel, text: CalibrationText) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer."""
    found: list[tuple[Tensor, Tensor]] = []
    attention = StrictAttention(
        model.spec,
        lambda _layer: None,
        ExactTokens(block_size=8),
        lambda _layer, _q, k_TKD, v_TKD: found.append((k_TKD.clone(), v_TKD.clone())),
    )
    final_states(model, torch.tensor(text.token_ids), attention)
    return found


def assert_same_sums(one: ModelMoments, other: ModelMoments) -> None:
    assert one.text_digests == other.text_digests
    assert one.tensors().keys() == other.tensors().keys()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_basis_of_full_rank_loses_nothing_of_keys_and_values(name: str) -> None:
    model = tiny_model(name)
    rotaries = checked_rotaries(model)
    text = noise(0, 300)

    calibration = calibrated(model, moments_of(model, text))

    for (k_TKD, v_TKD), bases, rotary in zip(
        seen(model, text), calibration.layers, rotaries, strict=True
    ):
        assert rotary is not None
        positions_BS = torch.arange(len(k_TKD))[None]
        base_TKD = rotary.undo(k_TKD.transpose(0, 1)[None], positions_BS)[0].transpose(0, 1)
        for x_TKD, basis in ((base_TKD, bases.keys), (v_TKD, bases.values)):
            x_TF = x_TKD.flatten(1)
            restored_TF = (x_TF - basis.mean_F) @ basis.down_FC @ basis.up_CF + basis.mean_F
            # Weights of directions span four orders of magnitude (the ridge), in float32.
            torch.testing.assert_close(restored_TF, x_TF, rtol=0, atol=1e-2)


def test_a_basis_of_several_layers_loses_less_than_theirs_of_as_many_numbers(
    model: LoadedModel,
) -> None:
    """Each layer's best directions are among those that the group may take."""
    text, rank = noise(0, 400), 8
    calibration = calibrated(model, moments_of(model, text, joined=(2,)))

    [group, *_] = calibration.groups
    assert group.layers == range(2)
    assert len(group.keys.mean_F) == 2 * WIDTH
    for array in ("keys", "values"):
        together = getattr(group, array).spectrum_F
        alone = [getattr(calibration.layers[layer], array).spectrum_F for layer in group.layers]
        # The same error in all, and less of it left after as many directions.
        torch.testing.assert_close(together.sum(), sum(spectrum.sum() for spectrum in alone))
        assert together[2 * rank :].sum() < sum(spectrum[rank:].sum() for spectrum in alone)


def test_a_basis_of_several_layers_gives_their_keys_and_values_back(model: LoadedModel) -> None:
    text = noise(0, 400)
    rotaries = checked_rotaries(model)
    arrays = seen(model, text)

    [group, *_] = calibrated(model, moments_of(model, text, joined=(2,))).groups

    keys, values = [], []
    for (k_TKD, v_TKD), rotary in zip(arrays[:2], rotaries[:2], strict=True):
        assert rotary is not None
        undone_BKSD = rotary.undo(k_TKD.transpose(0, 1)[None], torch.arange(400)[None])
        keys.append(undone_BKSD[0].transpose(0, 1).flatten(1))
        values.append(v_TKD.flatten(1))
    for parts, basis in ((keys, group.keys), (values, group.values)):
        x_TF = torch.cat(parts, dim=1)
        restored_TF = (x_TF - basis.mean_F) @ basis.down_FC @ basis.up_CF + basis.mean_F
        # As for one layer.
        torch.testing.assert_close(restored_TF, x_TF, rtol=0, atol=1e-2)


def test_sums_without_those_of_the_groups_that_are_wanted_are_refused(model: LoadedModel) -> None:
    begun = moments_of(model, noise(0))

    with pytest.raises(ValueError, match="want sums of"):
        ModelMoments(model.spec, (2,)).load(begun.tensors(), begun.text_digests)


def test_the_mean_of_keys_is_that_before_rotation(model: LoadedModel) -> None:
    text = noise(0, 300)
    [rotary, *_] = checked_rotaries(model)
    assert rotary is not None
    k_TKD, _ = seen(model, text)[0]

    calibration = calibrated(model, moments_of(model, text))

    undone_BKSD = rotary.undo(k_TKD.transpose(0, 1)[None], torch.arange(300)[None])
    expected_F = undone_BKSD[0].mean(dim=1).flatten()
    torch.testing.assert_close(calibration.layers[0].keys.mean_F, expected_F, rtol=0, atol=1e-4)
    assert not torch.allclose(expected_F, k_TKD.mean(dim=0).flatten(), atol=1e-2)


def test_a_run_that_was_broken_off_goes_on_from_its_tensors(model: LoadedModel) -> None:
    texts = [noise(seed) for seed in range(4)]
    begun = moments_of(model, *texts[:2])
    resumed = ModelMoments(model.spec)
    resumed.load({name: x.clone() for name, x in begun.tensors().items()}, begun.text_digests)

    for text in texts[2:]:
        add_text(model, checked_rotaries(model), resumed, text)

    assert_same_sums(resumed, moments_of(model, *texts))


def test_sums_of_a_model_with_other_layers_are_refused(model: LoadedModel) -> None:
    moments = ModelMoments(model.spec)
    tensors = moments_of(model, noise(0)).tensors()

    with pytest.raises(ValueError, match="layers"):
        moments.load({"kind0.99.key": tensors["kind0.0.key"]}, ())
    with pytest.raises(ValueError, match="want key "):
        moments.load(tensors | {"kind0.0.key": torch.zeros(3)}, ())


def test_a_calibration_says_what_it_was_made_from(model: LoadedModel) -> None:
    texts = [noise(0), noise(1)]

    calibration = calibrated(model, moments_of(model, *texts))

    assert calibration.weights_digest == model.spec.weights_digest
    assert calibration.text_digests == tuple(text.digest for text in texts)
    assert calibration.num_tokens == 200
    assert len(calibration.layers) == len(model.spec.layers)


def test_ranks_can_be_limited(model: LoadedModel) -> None:
    moments = moments_of(model, noise(0, 200))

    calibration = fitted(model, checked_rotaries(model), moments, largest_rank=12)

    assert [(layer.keys.rank, layer.values.rank) for layer in calibration.layers] == [(12, 12)] * 3


def test_a_bound_keeps_what_only_a_rare_kind_of_text_needs(model: LoadedModel) -> None:
    moments = moments_of(model, noise(0, 400), noise(1, 20))

    summed = calibrated(model, moments, mixing=Mixing.SUM)
    bound = calibrated(model, moments, mixing=Mixing.BOUND)

    for one, other in zip(bound.layers, summed.layers, strict=True):
        assert one.values.spectrum_F.sum() > other.values.spectrum_F.sum()


def test_no_text_and_too_short_texts_are_refused(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="no text"):
        calibrated(model, ModelMoments(model.spec))
    with pytest.raises(ConfigError, match="at least 128 tokens"):
        calibrated(model, moments_of(model, noise(0, 40)))


def test_passes_over_texts_do_not_overlap_and_leave_evaluation_out() -> None:
    tokenizer = character_tokenizer()
    found = list(
        calibration_texts(
            tokenizer, [PROSE, OTHER], num_tokens=3000, passes_per_text=2, documents_per_style=1
        )
    )

    prose = [text.token_ids for text in found if text.kind == "prose"]
    whole = tuple(tokenizer.prompt_encoder().push(PROSE.content))
    assert prose == [whole[:3000], whole[3000:6000]]
    assert {text.kind for text in found} == {"prose", "needles"}
    assert all(len(text.token_ids) == 3000 for text in found)


def test_output_projections_are_those_that_a_layer_applies(model: LoadedModel) -> None:
    found = output_projections(model.module, model.spec.layers)

    assert found is not None
    weights = [layer.self_attn.o_proj.weight for layer in model.module.base_model.layers]
    for own_EHD, weight in zip(found, weights, strict=True):
        assert own_EHD.shape == (64, 4, 16)
        assert torch.equal(own_EHD.flatten(1), weight)


def test_output_projections_of_other_widths_than_the_heads_are_not_taken(
    model: LoadedModel,
) -> None:
    assert output_projections(model.module, model.spec.layers[:2]) is None


def test_calibrating_leaves_the_model_as_it_was(model: LoadedModel) -> None:
    ids_T = torch.tensor(noise(3).token_ids)
    before_TE = final_states(model, ids_T, EXACT.attention(model.spec))

    moments_of(model, noise(0))

    assert torch.equal(final_states(model, ids_T, EXACT.attention(model.spec)), before_TE)
