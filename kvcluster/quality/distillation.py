"""Trains a policy's latent bases so that the model predicts with them what it predicts without.

A fitted basis (`codec/calibration.py`) is the best of its rank for an error that is known before
any error is made: of logits and of what a layer adds, each layer by itself. What an error does to
the predictions, after all the layers and after rounding, is learned: the exact model is the
teacher, the same model reading restored keys and values the student, and the loss the divergence
of their next-token distributions (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, at temperature
1). The model's weights stay as they are; the mean and the two matrices of each basis move. No
format changes, and the way back stays linear.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from transformers import PreTrainedModel

from kvcluster.codec.basis import Basis
from kvcluster.codec.refined import Array
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.calibrating import CalibrationText
from kvcluster.quality.fisher import FisherSums
from kvcluster.quality.lesson import Lesson
from kvcluster.quality.strict import ExactTokens
from kvcluster.quality.student import Student

_MAX_GRADIENT_NORM: Final = 1.0
_MOMENT_DECAYS: Final = (0.9, 0.99)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationSettings:
    """How long and how fast. One step reads one text."""

    num_steps: int = 300
    learning_rate: float = 1e-4
    """At the most, in units of `TrainableLatent`. It rises from 0 and falls to 0 again, as a
    cosine."""
    warm_up_share: float = 0.1
    """Of the steps, in which the rate rises."""
    answer_weight: float = 4.0
    """Of a token of a needle's answer; other tokens count 1."""
    num_fisher: int = 64
    """Texts that directions are ordered on before training; 0: they are in order."""
    num_held_out: int = 8
    """Texts that are not trained on: what is learned is kept if they are predicted better."""
    seed: int = 0


class Distillation:
    """A teacher with its texts. Some texts, spread evenly over all, are held out.

    Deterministic as far as the device is. The model is not changed.
    """

    def __init__(
        self,
        model: LoadedModel,
        texts: Sequence[CalibrationText],
        exact: ExactTokens,
        settings: DistillationSettings,
    ) -> None:
        """Texts in which nothing is read encoded are left out. Raises: ValueError for fewer than
        two others."""
        self._model = model
        self._exact = exact
        self._settings = settings
        self.held_out, self._trained = _split(
            [text for text in texts if exact.encoded_blocks(len(text.token_ids))],
            settings.num_held_out,
        )

    def divergence(self, student: Student, texts: Sequence[CalibrationText] | None = None) -> float:
        """Mean over texts, by default those that are held out, of the mean divergence of the
        student's predictions from the exact ones, in nats a token."""
        lesson = self._lesson(student)
        with _frozen(self._model.module), _fast_products(self._model.device):
            return lesson.divergence(texts or self.held_out)

    def fisher_bases(
        self, student: Student, fitted: Mapping[tuple[range, Array], Basis]
    ) -> dict[tuple[range, Array], Basis]:
        """The bases of the student's units with their directions in the order of what losing them
        costs on texts that are not held out: see `fisher.py`. `fitted` are the student's own."""
        most = min(len(self._trained), self._settings.num_fisher)
        chosen = random.Random(self._settings.seed).sample(self._trained, most)
        lesson, sums = self._lesson(student), FisherSums(student, fitted)
        with _frozen(self._model.module), _fast_products(self._model.device):
            for text in chosen:
                sums.add(lesson.gradients(text))
        return sums.bases()

    def train(self, student: Student, progress: Callable[[int, int], None]) -> None:
        """Move the parameters of the student's units, by the texts that are not held out. Blocks
        for minutes. `progress`: called with steps done, and of how many."""
        settings, lesson = self._settings, self._lesson(student)
        moved = [p for unit in student.units for p in unit.latent.parameters()]
        optimizer = torch.optim.Adam(moved, lr=settings.learning_rate, betas=_MOMENT_DECAYS)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _rate(step, settings.num_steps, settings.warm_up_share)
        )
        texts = _shuffled(self._trained, settings.seed)
        with _frozen(self._model.module), _fast_products(self._model.device):
            for step, text in zip(range(settings.num_steps), texts, strict=False):
                progress(step, settings.num_steps)
                gradients = torch.autograd.grad(lesson.loss(text), moved)
                for parameter, gradient in zip(moved, gradients, strict=True):
                    parameter.grad = gradient
                torch.nn.utils.clip_grad_norm_(moved, _MAX_GRADIENT_NORM)
                optimizer.step()
                schedule.step()
        progress(settings.num_steps, settings.num_steps)

    def _lesson(self, student: Student) -> Lesson:
        return Lesson(
            self._model,
            student,
            self._exact,
            answer_weight=self._settings.answer_weight,
            seed=self._settings.seed,
        )


def _split(
    texts: Sequence[CalibrationText], num_held_out: int
) -> tuple[list[CalibrationText], list[CalibrationText]]:
    """Held out, spread evenly over all; and the others."""
    if len(texts) < 2:
        raise ValueError(
            "want at least two texts, to train on and to hold out, of which something is read "
            f"encoded, got {len(texts)}"
        )
    num_held_out = min(max(1, num_held_out), len(texts) // 2)
    held = {(2 * place + 1) * len(texts) // (2 * num_held_out) for place in range(num_held_out)}
    return (
        [text for place, text in enumerate(texts) if place in held],
        [text for place, text in enumerate(texts) if place not in held],
    )


def _shuffled(texts: Sequence[CalibrationText], seed: int) -> Iterator[CalibrationText]:
    """Without end: all of them in one order, then in another."""
    choice = random.Random(seed)
    while True:
        yield from choice.sample(texts, len(texts))


def _rate(step: int, num_steps: int, warm_up_share: float) -> float:
    """Factor on the learning rate."""
    warm_up = max(1.0, warm_up_share * num_steps)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1.0, num_steps - warm_up)))


@contextmanager
def _frozen(module: PreTrainedModel) -> Iterator[None]:
    """Weights without a gradient: what it would take of them is not kept either."""
    moving = [weight for weight in module.parameters() if weight.requires_grad]
    for weight in moving:
        weight.requires_grad = False
    try:
        yield
    finally:
        for weight in moving:
            weight.requires_grad = True


@contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """Products of float32 with 10 bits of mantissa, which is enough to train with."""
    before = torch.get_float32_matmul_precision()
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
