"""The stage of a calibration in which bases are trained for the codecs that were asked for.

Each codec starts from the fitted bases and is trained by itself (`distillation.py`). What does not
predict held-out texts better than the fitted bases do is thrown away. A run that is broken off goes
on after the last codec that it finished.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from kvcluster.codec.basis import Basis
from kvcluster.codec.calibration import Calibration, bases_digest, fitted_bases
from kvcluster.codec.latent_method import LATENT, trained_as
from kvcluster.codec.refined import Array, RefinedBasis, refined_bases, refined_tensors
from kvcluster.codec.registry import CODEC_METHODS
from kvcluster.codec.sealed_file import FileKind
from kvcluster.errors import CalibrationMismatch, ConfigError
from kvcluster.model.loader import LoadedModel
from kvcluster.model.tokenizer import TextTokenizer
from kvcluster.policy import Choice, parse_choice, parse_policy
from kvcluster.quality.calibrating import (
    CalibrationText,
    calibration_texts,
    checked_rotaries,
    passes_over,
)
from kvcluster.quality.distillation import Distillation, DistillationSettings
from kvcluster.quality.served import MENU, codecs_of
from kvcluster.quality.strict import ExactTokens
from kvcluster.quality.student import Student
from kvcluster.quality.texts import Text

TEXT_TOKENS: Final = 2048
"""Of a text that is trained on; longer ones are cut."""
_NEEDLE_SHARE: Final = 0.25
"""Of the texts: documents with needles."""


class Refinement(msgspec.Struct, frozen=True, kw_only=True):
    """What training did for one codec."""

    codec: str
    """Policies that write latents so are served with the refined bases."""
    divergence_before: float
    """Of the fitted bases: mean divergence from the exact predictions on texts that were held out,
    in nats a token."""
    divergence_after: float
    is_kept: bool
    """Whether it became less. If not, the codec has the fitted bases."""


def codecs_to_refine(policies: Sequence[str]) -> dict[str, Choice]:
    """The codecs of the policies, by their `trained_as`, each once.

    Raises: InvalidField for text that names none; ConfigError for a policy without latents.
    """
    found: dict[str, Choice] = {}
    for text in policies:
        codec = parse_choice(parse_policy(text, MENU).codec, CODEC_METHODS)
        arrays = {codec.arguments.get("keys"), codec.arguments.get("values")}
        if codec.name != LATENT.method.name or LATENT.method.name not in arrays:
            raise ConfigError(
                f"calibrate: policy {text} has no bases to refine: want latents of keys or values"
            )
        found[trained_as(codec.arguments)] = codec
    return found


def distillation_texts(
    tokenizer: TextTokenizer,
    texts: Sequence[Text],
    contents: Sequence[str],
    *,
    num_tokens: int,
    with_needles: bool,
) -> list[CalibrationText]:
    """All of the texts for calibration, or of `contents`, in pieces, and documents with needles.

    Raises: ValueError where needles do not fit into the pieces.
    """
    if contents:
        return list(passes_over(tokenizer, contents, num_tokens=num_tokens))

    def pieces(documents_per_style: int) -> list[CalibrationText]:
        longest = max(len(text.content) for text in texts)
        return list(
            calibration_texts(
                tokenizer,
                texts,
                num_tokens=num_tokens,
                passes_per_text=longest // num_tokens + 1,
                documents_per_style=documents_per_style,
            )
        )

    if not with_needles:
        return pieces(0)
    one_each = pieces(1)
    num_styles = sum(bool(piece.answers) for piece in one_each)
    num_documents = _NEEDLE_SHARE / (1 - _NEEDLE_SHARE) * (len(one_each) - num_styles)
    return pieces(max(1, round(num_documents / max(1, num_styles))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Refiner:
    """Orders and trains bases on one model."""

    model: LoadedModel
    texts: Sequence[CalibrationText]
    exact: ExactTokens
    settings: DistillationSettings
    partial: "PartialRefinements"

    def ordered(self, calibration: Calibration, joined: Collection[int]) -> Calibration:
        """The calibration with the directions of all its bases, which have full rank, in the order
        of what losing them costs the predictions: see `fisher.py`. `joined`: of how many layers its
        groups are. Blocks; as long as some `DistillationSettings.num_fisher` steps of training.

        Raises: ConfigError for a model that cannot have latents, or with too few texts.
        """
        fitted = fitted_bases(calibration.layers, calibration.groups)
        codecs, rotaries = codecs_of(self.model, calibration), checked_rotaries(self.model)
        found: dict[tuple[range, Array], Basis] = {}
        try:
            teacher = Distillation(self.model, self.texts, self.exact, self.settings)
            for size in (1, *sorted(joined if calibration.groups else ())):
                layers = codecs.layers(f"{LATENT.method.name}:layers={size}")
                student = Student(self.model.spec, rotaries, layers, self.exact, fitted)
                found |= teacher.fisher_bases(student, fitted)
        except ValueError as error:
            raise ConfigError(f"calibrate: {error}") from error
        return replace(
            calibration,
            layers=tuple(
                replace(layer, keys=found[alone, "keys"], values=found[alone, "values"])
                for layer, alone in zip(
                    calibration.layers, _each_alone(len(calibration.layers)), strict=True
                )
            ),
            groups=tuple(
                replace(
                    group,
                    keys=found[group.layers, "keys"],
                    values=found[group.layers, "values"],
                )
                for group in calibration.groups
            ),
        )

    def refine(
        self,
        calibration: Calibration,
        codecs: dict[str, Choice],
        progress: Callable[[int, int], None],
    ) -> tuple[Calibration, tuple[Refinement, ...]]:
        """The calibration with refined bases, and what came of each codec. Blocks for minutes.
        `progress`: called with steps done, and of how many.

        Raises: ConfigError for a codec that the model cannot have; CalibrationMismatch as
        `PartialRefinements`; OSError.
        """
        started_from = _Start(
            bases_digest=bases_digest(calibration),
            text_digests=tuple(text.digest for text in self.texts),
            settings=repr((self.settings, self.exact)),
        )
        done = self.partial.load(started_from, calibration)
        for name, codec in codecs.items():
            if name in {refinement.codec for refinement in done.refinements}:
                continue
            steps = _Steps(progress, len(done.refinements), len(codecs))
            refinement, bases = self._refined(calibration, name, codec, steps)
            done = _Done((*done.refinements, refinement), (*done.bases, *bases))
            self.partial.save(started_from, done)
        asked = tuple(each for each in done.refinements if each.codec in codecs)
        kept = tuple(basis for basis in done.bases if basis.codec in codecs)
        return replace(calibration, refined=kept), asked

    def _refined(
        self,
        calibration: Calibration,
        name: str,
        codec: Choice,
        progress: Callable[[int, int], None],
    ) -> tuple[Refinement, tuple[RefinedBasis, ...]]:
        fitted = fitted_bases(calibration.layers, calibration.groups)
        rotaries = checked_rotaries(self.model)
        try:
            layers = codecs_of(self.model, calibration).layers(codec.text)
            student = Student(self.model.spec, rotaries, layers, self.exact, fitted)
            teacher = Distillation(self.model, self.texts, self.exact, self.settings)
            before = teacher.divergence(student)
            if self.settings.num_fisher:
                ordered = teacher.fisher_bases(student, fitted)
                student = Student(self.model.spec, rotaries, layers, self.exact, ordered)
            teacher.train(student, progress)
            after = teacher.divergence(student)
        except ValueError as error:
            raise ConfigError(f"calibrate: {codec.text}: {error}") from error
        refinement = Refinement(
            codec=name,
            divergence_before=before,
            divergence_after=after,
            is_kept=after < before,
        )
        return refinement, tuple(student.refined(name)) if refinement.is_kept else ()


def _each_alone(num_layers: int) -> list[range]:
    return [range(place, place + 1) for place in range(num_layers)]


@dataclass(frozen=True, slots=True)
class _Steps:
    """Steps of one codec among those of all."""

    progress: Callable[[int, int], None]
    place: int
    num_codecs: int

    def __call__(self, done: int, num_steps: int) -> None:
        self.progress(self.place * num_steps + done, self.num_codecs * num_steps)


class _Start(msgspec.Struct, frozen=True, kw_only=True):
    """What training starts from: with another start, other bases come of it."""

    bases_digest: str
    text_digests: tuple[str, ...]
    settings: str


@dataclass(frozen=True, slots=True)
class _Done:
    refinements: tuple[Refinement, ...] = ()
    bases: tuple[RefinedBasis, ...] = ()


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int
    started_from: _Start
    refinements: tuple[Refinement, ...]
    digest: str = ""


_FILE: Final = FileKind(
    name="unfinished calibration",
    metadata_key="kvcluster.partial_refinements",
    format_version=1,
    header=_Header,
    error=CalibrationMismatch,
)


class PartialRefinements:
    """Refined bases of a calibration that is not finished: `FILE.refined.safetensors`."""

    def __init__(self, calibration: Path) -> None:
        self.path = calibration.with_name(f"{calibration.name}.refined.safetensors")

    def load(self, started_from: _Start, calibration: Calibration) -> _Done:
        """What is there; without a file, nothing. Raises: CalibrationMismatch for a file that is
        damaged, or of another start."""
        if not self.path.exists():
            return _Done()
        header, tensors = _FILE.read(self.path)
        if header.started_from != started_from:
            raise CalibrationMismatch(
                f"{self.path}, which an earlier run left, was trained from other bases, on other "
                "texts or otherwise: remove it, or give another --out"
            )
        fitted = fitted_bases(calibration.layers, calibration.groups)
        return _Done(header.refinements, refined_bases(tensors, fitted))

    def save(self, started_from: _Start, done: _Done) -> None:
        """Replace the file once the new one is whole. Raises: OSError."""
        header = _Header(
            format_version=_FILE.format_version,
            started_from=started_from,
            refinements=done.refinements,
        )
        _FILE.write(self.path, header, refined_tensors(done.bases))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
