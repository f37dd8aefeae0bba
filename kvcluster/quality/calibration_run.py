"""A calibration from beginning to end: fits bases, measures recipes with them, writes the file.

Three sets of texts are kept apart: bases see texts for calibration (or the user's), recipes are
measured on `held_out.CHOICE_TEXTS`, and what `kvcluster bench quality` reports is neither.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypedDict

import msgspec
from torch import Tensor

from kvcluster.codec.calibration import Calibration, bases_digest, write_calibration
from kvcluster.codec.latent_method import MAX_JOINED_LAYERS
from kvcluster.codec.registry import CODEC_METHODS
from kvcluster.config import CacheConfig
from kvcluster.errors import ConfigError
from kvcluster.model.loader import LoadedModel
from kvcluster.model.tokenizer import TextTokenizer
from kvcluster.policy import parse_choice, parse_policy
from kvcluster.policy_bounds import MeasuredRecipe, MeasuredTable
from kvcluster.quality.calibrating import (
    SHORTEST_TEXT,
    CalibrationText,
    ModelMoments,
    add_text,
    calibration_texts,
    checked_rotaries,
    fitted,
    passes_over,
    tokens_needed,
)
from kvcluster.quality.distillation import DistillationSettings
from kvcluster.quality.held_out import CHOICE_SEED, choice_texts, evaluation_documents
from kvcluster.quality.measure import FIRST_SCORED, text_tokens
from kvcluster.quality.needles import NeedleDocument
from kvcluster.quality.partial_moments import PartialMoments
from kvcluster.quality.partial_scores import PartialScores
from kvcluster.quality.recipe_table import DEFAULT_RECIPES, measured_recipe
from kvcluster.quality.refining import (
    TEXT_TOKENS,
    PartialRefinements,
    Refinement,
    Refiner,
    codecs_to_refine,
    distillation_texts,
)
from kvcluster.quality.served import (
    MENU,
    ServedPolicy,
    check_unlearned,
    codecs_of,
    recent_exact,
    served_policies,
)
from kvcluster.quality.strict import ExactTokens
from kvcluster.quality.sweep import read_once, sweep, sweep_subject
from kvcluster.quality.sweep_records import RecipeScore
from kvcluster.quality.texts import Text

MIN_TOKENS: Final = 512
"""Fewer in a pass are too few to score recipes with a standard error."""
_DEFAULT_TOKENS: Final = 4096
_PASSES_PER_TEXT: Final = 4
_NEEDLES: Final = 8

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and of how much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSettings:
    """What to fit and to measure."""

    out: Path
    """The calibration file; its folder exists."""
    policies: tuple[str, ...] = ()
    """To measure; empty: those of `DEFAULT_RECIPES` that the model can have."""
    refine: tuple[str, ...] = ()
    """Policies with latents whose bases are trained, each for itself. They are measured too."""
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    num_fisher: int = 0
    """Texts on which the directions of all bases are ordered by what losing them costs the
    predictions; 0: by what it costs each layer."""
    num_tokens: int | None = None
    """Of each pass; None: as many as the model can read, but at most 4096."""
    num_documents: int = 2
    """With needles, of each style, to fit to and again to measure on; 0: none."""
    joined: tuple[int, ...] = ()
    """Numbers of neighbouring layers that shall be able to share a latent, beside those that
    `policies` ask for."""
    block_size: int = CacheConfig().block_size
    exact_recent_tokens: int = CacheConfig().exact_recent_tokens


class CalibrationReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a calibration did."""

    model: str
    weights_digest: str
    num_calibration_tokens: int
    measured_on: tuple[str, ...]
    """Names of the texts."""
    num_tokens: int
    """Of each measured text and document: ratios and increases are of that length."""
    num_needles: int
    """Those that the exact cache finds: recall is a share of them."""
    refinements: tuple[Refinement, ...] = ()
    recipes: tuple[MeasuredRecipe, ...]


def calibrate(
    model: LoadedModel,
    tokenizer: TextTokenizer,
    texts: Sequence[Text],
    settings: CalibrationSettings,
    progress: Progress,
    *,
    contents: Sequence[str] = (),
) -> CalibrationReport:
    """Write the calibration file. Takes minutes to hours; blocks. A run that is broken off goes on
    from the texts and the recipes that it finished: see `PartialMoments` and `PartialScores`.

    `progress` hears first how many passes `recipes` will take: over texts as long as those of
    `texts`.

    `contents`: texts to fit to instead of those of `texts` for calibration and of documents with
    needles; recipes are measured on `texts` in any case.
    Raises: InvalidField, ConfigError, ModelUnsupported; OSError when a file cannot be written.
    """
    joined = _joined(settings)
    exact = recent_exact(settings.block_size, settings.exact_recent_tokens)
    check_unlearned((*settings.policies, *settings.refine), model, exact)
    num_tokens = _length(model, settings)
    try:
        held_out = _held_out(tokenizer, texts, num_tokens, settings.num_documents)
        passes = _passes(tokenizer, texts, contents, num_tokens, settings.num_documents)
        pieces = _pieces(tokenizer, texts, contents, settings, num_tokens)
    except ValueError as error:
        raise ConfigError(f"calibrate: {error}") from error
    progress("recipes", 0, held_out.num_passes(_num_recipes(settings, joined)))
    partial = PartialMoments(settings.out, model.spec.weights_digest)
    calibration = _fit(model, passes, partial, joined, progress)
    unfinished = PartialRefinements(settings.out)
    calibration, refinements = _refined(
        Refiner(
            model=model,
            texts=pieces,
            exact=exact,
            settings=settings.distillation,
            partial=unfinished,
        ),
        calibration,
        settings,
        progress,
    )
    policies = _policies(settings, model, calibration, exact)
    scores = PartialScores(settings.out, bases_digest(calibration))
    measured = _measured(model, held_out, policies, settings, scores, progress)
    recipes = tuple(filter(None, map(measured_recipe, measured)))
    table = MeasuredTable(
        block_size=settings.block_size,
        exact_recent_tokens=settings.exact_recent_tokens,
        recipes=recipes,
    )
    recipes_json = msgspec.json.encode(table).decode()
    write_calibration(settings.out, replace(calibration, recipes_json=recipes_json))
    partial.remove()
    unfinished.remove()
    scores.remove()
    return CalibrationReport(
        model=model.spec.name,
        weights_digest=model.spec.weights_digest,
        num_calibration_tokens=calibration.num_tokens,
        measured_on=tuple(text.name for text, _ in held_out.texts),
        num_tokens=num_tokens,
        num_needles=max((score.num_found_by_exact for score in measured), default=0),
        refinements=refinements,
        recipes=recipes,
    )


def _joined(settings: CalibrationSettings) -> frozenset[int]:
    """How many layers latents shall be able to be of, one left out. Raises: InvalidField, also for
    a policy that is none; ConfigError."""
    listed = (*settings.policies, *settings.refine)
    named = (parse_policy(policy, MENU) for policy in listed)
    arguments = (parse_choice(policy.codec, CODEC_METHODS).arguments for policy in named)
    asked = {int(given.get("layers", 1)) for given in arguments} | set(settings.joined)
    if not asked <= set(range(1, MAX_JOINED_LAYERS + 1)):
        raise ConfigError(
            f"calibrate: want 1 to {MAX_JOINED_LAYERS} layers together, got {sorted(asked)}"
        )
    return frozenset(asked - {1})


@dataclass(frozen=True, slots=True, eq=False)
class _HeldOut:
    """What recipes are measured on."""

    texts: Sequence[tuple[Text, Tensor]]
    documents: Sequence[NeedleDocument]

    def num_passes(self, num_recipes: int) -> int:
        """Over all, with the exact cache and with each recipe."""
        return (1 + num_recipes) * (len(self.texts) + len(self.documents))


def _length(model: LoadedModel, settings: CalibrationSettings) -> int:
    longest = model.spec.max_context_tokens
    length = settings.num_tokens or min(longest, _DEFAULT_TOKENS)
    if not MIN_TOKENS <= length <= longest:
        raise ConfigError(
            f"calibrate: want passes of {MIN_TOKENS} to {longest} tokens (what "
            f"{model.spec.name} can read), got {length}"
        )
    return length


def _held_out(
    tokenizer: TextTokenizer, texts: Sequence[Text], num_tokens: int, num_documents: int
) -> _HeldOut:
    chosen = choice_texts(texts)
    if not chosen:
        raise ValueError("there is no text to measure recipes on")
    return _HeldOut(
        [(text, text_tokens(tokenizer, text, num_tokens)) for text in chosen],
        evaluation_documents(
            tokenizer,
            chosen,
            lengths=[num_tokens],
            seeds=range(CHOICE_SEED, CHOICE_SEED + num_documents),
            num_needles=_NEEDLES,
        ),
    )


def _passes(
    tokenizer: TextTokenizer,
    texts: Sequence[Text],
    contents: Sequence[str],
    num_tokens: int,
    num_documents: int,
) -> list[CalibrationText]:
    if contents:
        return list(passes_over(tokenizer, contents, num_tokens=num_tokens))
    return list(
        calibration_texts(
            tokenizer,
            texts,
            num_tokens=num_tokens,
            passes_per_text=_PASSES_PER_TEXT,
            documents_per_style=num_documents,
        )
    )


def _pieces(
    tokenizer: TextTokenizer,
    texts: Sequence[Text],
    contents: Sequence[str],
    settings: CalibrationSettings,
    num_tokens: int,
) -> list[CalibrationText]:
    """What bases are ordered and refined on."""
    if not settings.num_fisher and not codecs_to_refine(settings.refine):
        return []
    return distillation_texts(
        tokenizer,
        texts,
        contents,
        num_tokens=min(TEXT_TOKENS, num_tokens),
        with_needles=settings.num_documents > 0,
    )


def _check_enough(
    model: LoadedModel, passes: Sequence[CalibrationText], joined: Collection[int]
) -> None:
    given = sum(len(text.token_ids) for text in passes)
    needed = tokens_needed(model.spec, joined)
    if given < needed:
        raise ConfigError(
            f"calibrate: {model.spec.name} needs at least {needed} tokens of text, got {given} (in "
            f"passes of at least {SHORTEST_TEXT})"
        )


def _fit(
    model: LoadedModel,
    passes: Sequence[CalibrationText],
    partial: PartialMoments,
    joined: Collection[int],
    progress: Progress,
) -> Calibration:
    _check_enough(model, passes, joined)
    rotaries = checked_rotaries(model)
    moments = ModelMoments(model.spec, joined)
    partial.load_into(moments, {text.digest for text in passes})
    finished = set(moments.text_digests)
    num_passes = len({text.digest for text in passes})
    progress("texts", len(finished), num_passes)
    for text in passes:
        if text.digest not in finished:
            add_text(model, rotaries, moments, text)
            partial.save(moments)
            finished.add(text.digest)
            progress("texts", len(finished), num_passes)
    return fitted(model, rotaries, moments)


def _refined(
    refiner: Refiner, calibration: Calibration, settings: CalibrationSettings, progress: Progress
) -> tuple[Calibration, tuple[Refinement, ...]]:
    if settings.num_fisher:
        ordering = replace(settings.distillation, num_fisher=settings.num_fisher)
        progress("directions", 0, 1)
        calibration = replace(refiner, settings=ordering).ordered(calibration, _joined(settings))
        progress("directions", 1, 1)
        refiner = replace(refiner, settings=replace(ordering, num_fisher=0))
    return refiner.refine(
        calibration,
        codecs_to_refine(settings.refine),
        lambda done, total: progress("refinement", done, total),
    )


def _policies(
    settings: CalibrationSettings, model: LoadedModel, calibration: Calibration, exact: ExactTokens
) -> list[ServedPolicy]:
    codecs = codecs_of(model, calibration)
    if settings.policies:
        listed = (*settings.policies, *settings.refine)
        return served_policies(listed, codecs, model.spec, exact)
    possible = served_policies(settings.refine, codecs, model.spec, exact)
    for text in DEFAULT_RECIPES:
        # Heads that a rotation or a group of channels does not fit have no such recipe.
        with suppress(ConfigError):
            possible += served_policies([text], codecs, model.spec, exact)
    return possible


def _num_recipes(settings: CalibrationSettings, joined: Collection[int]) -> int:
    """That will be measured, where the model can have them all."""
    if settings.policies:
        return len({*settings.policies, *settings.refine})
    asked = [
        parse_choice(parse_policy(text, MENU).codec, CODEC_METHODS) for text in DEFAULT_RECIPES
    ]
    layers = [int(codec.arguments.get("layers", 1)) for codec in asked]
    return len(settings.refine) + sum(number in {1, *joined} for number in layers)


class _AsServed(TypedDict):
    block_size: int
    exact_recent_tokens: int
    first_scored: int


def _measured(
    model: LoadedModel,
    held_out: _HeldOut,
    policies: Sequence[ServedPolicy],
    settings: CalibrationSettings,
    scores: PartialScores,
    progress: Progress,
) -> list[RecipeScore]:
    num_tokens = len(held_out.texts[0][1])
    as_served = _AsServed(
        block_size=settings.block_size,
        exact_recent_tokens=settings.exact_recent_tokens,
        first_scored=min(FIRST_SCORED, num_tokens // 4),
    )
    subject = sweep_subject(model.spec, held_out.texts, held_out.documents, **as_served)
    report = scores.load(subject)
    missing = [policy for policy in policies if not report.has(policy.name)]
    num_passes = held_out.num_passes(len(policies))
    num_done = num_passes - held_out.num_passes(len(missing))

    def after_pass() -> None:
        nonlocal num_done
        num_done += 1
        progress("recipes", num_done, num_passes)

    progress("recipes", num_done, num_passes)
    if missing:
        exact = read_once(
            model, held_out.texts, held_out.documents, after_pass=after_pass, **as_served
        )
        report = sweep(model, exact, missing, report, keep=scores.save, after_pass=after_pass)
    progress("recipes", num_passes, num_passes)
    found = {score.policy: score for score in report.scores}
    return [found[policy.name] for policy in policies]
