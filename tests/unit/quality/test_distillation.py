"""Training lowers what latents cost in texts that were not trained on, and changes bases alone."""

import pytest
import torch
from torch import Tensor

from kvcluster.codec.basis import Basis
from kvcluster.codec.calibration import Calibration, fitted_bases
from kvcluster.codec.method import CodecModel
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.codec.refined import Array
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.calibrating import (
    CalibrationText,
    ModelMoments,
    add_text,
    checked_rotaries,
    fitted,
)
from kvcluster.quality.distillation import Distillation, DistillationSettings
from kvcluster.quality.passes import final_states
from kvcluster.quality.restored_attention import RestoredAttention
from kvcluster.quality.strict import ExactTokens, KeysValues, LayerCodecs, StrictAttention
from kvcluster.quality.student import Student
from tests.architectures import VOCAB_SIZE
from tests.unit.quality.toys import tiny_model

EXACT = ExactTokens(block_size=16, lag=1)
JOINED = "latent:r=0.25,value_r=0.25,bits=4,layers=3"
CODECS = (JOINED, "latent:r=0.25,bits=4,codes=rotated", "latent:r=0.25,bits=3,values=int4")
QUICK = DistillationSettings(num_steps=40, learning_rate=1e-3, num_held_out=2)
SHORT = DistillationSettings(num_steps=3, num_held_out=2)


def texts_of(num_texts: int, num_tokens: int = 160) -> list[CalibrationText]:
    generator = torch.Generator().manual_seed(0)
    # Few words, so that texts have something in common.
    shape = (num_texts, num_tokens)
    ids = torch.randint(3, VOCAB_SIZE // 3, shape, generator=generator).tolist()
    return [CalibrationText("words", tuple(each), answers=(num_tokens - 1,)) for each in ids]


TEXTS = texts_of(10)


def ignore(_done: int, _of: int) -> None: ...


class Taught:
    """A tiny model with bases of its layers, and of all its layers together."""

    def __init__(self, architecture: str = "llama") -> None:
        self.model: LoadedModel = tiny_model(architecture)
        self.rotaries = checked_rotaries(self.model)
        moments = ModelMoments(self.model.spec, [3])
        for text in TEXTS:
            add_text(self.model, self.rotaries, moments, text)
        self.calibration: Calibration = fitted(self.model, self.rotaries, moments)

    def codecs(self) -> ModelCodecs:
        return ModelCodecs(
            CodecModel(
                spec=self.model.spec,
                device=self.model.device,
                calibration=self.calibration,
                rotations=self.rotaries,
            )
        )

    def bases(self) -> dict[tuple[range, Array], Basis]:
        return fitted_bases(self.calibration.layers, self.calibration.groups)

    def student(self, codec: str, bases: dict[tuple[range, Array], Basis] | None = None) -> Student:
        layers = self.codecs().layers(codec)
        return Student(self.model.spec, self.rotaries, layers, EXACT, bases or self.bases())

    def teacher(self, settings: DistillationSettings) -> Distillation:
        return Distillation(self.model, TEXTS, EXACT, settings)


@pytest.fixture(scope="module")
def taught() -> Taught:
    return Taught()


@pytest.mark.parametrize("codec", CODECS)
def test_training_lowers_the_divergence_on_texts_that_it_did_not_see(
    taught: Taught, codec: str
) -> None:
    teacher = taught.teacher(QUICK)
    student = taught.student(codec, teacher.fisher_bases(taught.student(codec), taught.bases()))
    before = teacher.divergence(student)

    teacher.train(student, ignore)

    assert teacher.divergence(student) < 0.98 * before


def test_directions_in_the_order_of_their_cost_lose_less_for_the_same_rank(taught: Taught) -> None:
    teacher = taught.teacher(QUICK)
    student = taught.student(JOINED)

    ordered = teacher.fisher_bases(student, taught.bases())

    assert teacher.divergence(taught.student(JOINED, ordered)) < 0.7 * teacher.divergence(student)


def test_training_leaves_the_model_and_the_fitted_bases_as_they_were(taught: Taught) -> None:
    module = taught.model.module
    weights = {name: weight.clone() for name, weight in module.state_dict().items()}
    down_FC = taught.calibration.groups[0].keys.down_FC.clone()
    needs_gradient = [weight.requires_grad for weight in module.parameters()]

    taught.teacher(SHORT).train(taught.student(JOINED), ignore)

    assert all(torch.equal(x, weights[name]) for name, x in module.state_dict().items())
    assert [weight.requires_grad for weight in module.parameters()] == needs_gradient
    assert all(weight.grad is None for weight in module.parameters())
    assert torch.equal(taught.calibration.groups[0].keys.down_FC, down_FC)


def test_the_same_training_gives_the_same_bases(taught: Taught) -> None:
    def trained() -> list[Tensor]:
        student = taught.student(JOINED)
        taught.teacher(SHORT).train(student, ignore)
        return [each.basis.down_FC for each in student.refined("codec")]

    for one, other in zip(trained(), trained(), strict=True):
        assert torch.equal(one, other)


def test_every_part_of_every_basis_is_trained(taught: Taught) -> None:
    student = taught.student(JOINED)
    before = student.refined("codec")

    taught.teacher(SHORT).train(student, ignore)

    after = student.refined("codec")
    assert [each.unit for each in after] == [(range(3), "keys"), (range(3), "values")]
    for one, other in zip(before, after, strict=True):
        for name in ("mean_F", "down_FC", "up_CF"):
            assert not torch.equal(getattr(one.basis, name), getattr(other.basis, name))


def test_one_text_is_too_few_to_hold_one_out(taught: Taught) -> None:
    with pytest.raises(ValueError, match="at least two texts"):
        Distillation(taught.model, TEXTS[:1], EXACT, QUICK)


# Gemma: a window, queries of another scale; Gemma 2: a soft-cap; gpt-oss: sinks; Gemma 3n: layers
# that read the K and V of another.
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma2", "gpt_oss", "gemma3n"])
def test_blocks_restored_beforehand_are_read_as_strict_attention_reads_its_own(
    architecture: str,
) -> None:
    """Where keys and values of both passes are equal, which those of the first layer are."""
    taught = Taught(architecture)
    spec = taught.model.spec
    codecs = taught.codecs().layers("latent:r=0.5,bits=8")
    student = Student(spec, taught.rotaries, codecs, EXACT, taught.bases())
    ids_T = torch.tensor(TEXTS[0].token_ids)
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def observe(layer: int, *arrays: Tensor) -> None:
        q_THD, k_TKD, v_TKD = (x.clone() for x in arrays)
        seen[layer] = (q_THD, k_TKD, v_TKD)

    strict = StrictAttention(spec, lambda _layer: None, EXACT, observe)
    final_states(taught.model, ids_T, strict)
    written = {
        layer: KeysValues(seen[layer][1].transpose(0, 1), seen[layer][2].transpose(0, 1))
        for layer in spec.storing_layers
    }

    with torch.no_grad():
        attention = RestoredAttention(spec, student.restored(written), EXACT)
        for layer, arrays in seen.items():
            of_layer = LayerCodecs(*codecs[layer])
            definition = StrictAttention(spec, {layer: of_layer}.get, EXACT)
            got_THD = attention.attend(layer, *arrays, None)
            expected_THD = definition.attend(layer, *arrays, None)
            # Sums of float32 in another order; a latent between two codes may take the other one.
            assert (got_THD - expected_THD).norm() < 1e-3 * expected_THD.norm()
