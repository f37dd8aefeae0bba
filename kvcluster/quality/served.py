"""Policies in the policy language, run over whole sequences as the engine would serve them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

import msgspec

from kvcluster.cache.exact_region import ExactRegion, check_in_steps
from kvcluster.codec.array import BlockShape
from kvcluster.codec.calibration import Calibration
from kvcluster.codec.exact_array import ExactArray
from kvcluster.codec.heads import check_kept_apart
from kvcluster.codec.latent_method import LATENT
from kvcluster.codec.method import CodecModel, LayerCodec
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.codec.pooled_method import LEARNED
from kvcluster.codec.registry import CODEC_METHODS, SHARING_METHODS
from kvcluster.errors import ConfigError
from kvcluster.model.loader import LoadedModel
from kvcluster.model.rotary import check_rotary, read_rotary
from kvcluster.policy import Menu, PlugPoint, parse_choice, parse_policy
from kvcluster.quality.measure import CountingAttention, MeasuredPolicy
from kvcluster.quality.retained import RetainedAttention
from kvcluster.quality.stepwise import StepwiseAttention
from kvcluster.quality.strict import ExactTokens, LayerCodecs, StrictAttention, stored_dims
from kvcluster.retention.base import Heads, RetentionPolicy
from kvcluster.retention.full import FullRetention
from kvcluster.retention.offered import RETENTION_METHODS, recent_blocks
from kvcluster.retention.registry import scored_retention
from kvcluster.retention.window import WindowRetention
from kvcluster.selection.offered import SELECTION_METHODS
from kvcluster.selection.registry import build_selection
from kvcluster.types import EXACT, LayerGeometry, ModelSpec, Policy

MENU: Final = Menu((*SHARING_METHODS, *CODEC_METHODS, *RETENTION_METHODS, *SELECTION_METHODS))
"""What can be measured: what a cluster serves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedPolicy:
    """A policy as it is measured."""

    measured: MeasuredPolicy
    """Named by the canonical text."""
    needs_calibration: bool

    @property
    def name(self) -> str:
        return self.measured.name


def codecs_of(model: LoadedModel, calibration: Calibration | None) -> ModelCodecs:
    """Codecs that encode on the model's device. What they store as floats they store as bfloat16,
    so that bytes are those of a bfloat16 cache.

    Raises: ModelUnsupported where there is a calibration and the model's keys cannot be had as
    they were before rotation.
    """
    rotations = None
    if calibration is not None:
        rotations = read_rotary(model.module, model.spec.layers)
        check_rotary(model.module, rotations)
    return ModelCodecs(
        CodecModel(
            spec=msgspec.structs.replace(model.spec, dtype="bfloat16"),
            device=model.device,
            calibration=calibration,
            rotations=rotations,
        )
    )


def recent_exact(block_size: int, exact_recent_tokens: int) -> ExactTokens:
    """What a query reads exact in an engine with these settings. Raises: ConfigError."""
    if block_size < 1 or exact_recent_tokens < 0:
        raise ConfigError(
            f"want blocks of at least 1 token and at least 0 exact recent tokens, got {block_size} "
            f"and {exact_recent_tokens}"
        )
    return ExactTokens(block_size=block_size, lag=-(-exact_recent_tokens // block_size))


def check_unlearned(texts: Iterable[str], model: LoadedModel, exact: ExactTokens) -> None:
    """Refuse, before there is a calibration, what none would make good: of policies with something
    learned, how they keep and select; of others, all. Raises: InvalidField, ConfigError."""
    codecs = codecs_of(model, None)
    for policy in (parse_policy(text, MENU) for text in texts):
        checked = policy
        if _wants_calibration(policy):
            checked = msgspec.structs.replace(policy, codec=EXACT, sharing=Policy().sharing)
        served_policies([str(checked)], codecs, model.spec, exact)


def _wants_calibration(policy: Policy) -> bool:
    """Whether something of the policy is learned."""
    sharing = parse_choice(policy.sharing, MENU.at(PlugPoint.SHARING))
    codec = parse_choice(policy.codec, CODEC_METHODS)
    return sharing.arguments.get("by") == LEARNED or codec.name == LATENT.method.name


def served_policies(
    texts: Iterable[str], codecs: ModelCodecs, spec: ModelSpec, exact: ExactTokens
) -> list[ServedPolicy]:
    """The policies that the texts name, each once.

    Raises: InvalidField for text that names none; ConfigError for a policy that the model cannot
    have, or not with these blocks.
    """
    policies = {str(policy): policy for policy in (parse_policy(text, MENU) for text in texts)}
    found = []
    for name, policy in policies.items():
        try:
            attention = _attention(policy, codecs, spec, exact)
            step = codecs.encoded_step(policy.storage, exact.lag)
        except ValueError as error:
            raise ConfigError(f"policy {name}: {error}") from error
        found.append(
            ServedPolicy(
                measured=MeasuredPolicy(
                    name=name,
                    attention=attention,
                    run_tokens=None if step is None else step * exact.block_size,
                ),
                needs_calibration=_wants_calibration(policy),
            )
        )
    return found


def _attention(
    policy: Policy, codecs: ModelCodecs, spec: ModelSpec, exact: ExactTokens
) -> Callable[[ModelSpec], CountingAttention]:
    layers = [LayerCodecs(None, None)] * len(spec.layers)
    if policy.storage != EXACT:
        layers = [_written(layer) for layer in codecs.layers(policy.storage)]
        for codec, geometry in zip(layers, spec.layers, strict=True):
            _check_blocks(codec, geometry, exact.block_size)
    step = codecs.encoded_step(policy.storage, exact.lag)
    if step is not None:
        check_in_steps(policy)
        return partial(
            StepwiseAttention,
            codecs=layers,
            exact=ExactRegion(exact.lag, step),
            block_size=exact.block_size,
            recent_blocks=recent_blocks(policy.retention, exact.block_size),
        )
    by_score = scored_retention(policy.retention, exact.block_size)
    if by_score is not None and any(
        len(spec.readers_of(layer)) > 1 and spec.layers[layer].window is None
        for layer in spec.storing_layers
    ):
        raise ValueError(
            "layers of this model share keys and values, and tokens are kept by what all of them "
            "look at, which one pass layer by layer cannot tell: measure it as it is served, with "
            "`kvcluster bench quality`"
        )
    if by_score is not None and by_score.heads is Heads.OWN:
        check_kept_apart(layers, spec.layers, exact.block_size)
    num_blocks = recent_blocks(policy.retention, exact.block_size)
    selection = build_selection(policy.selection, exact.block_size)
    retention: RetentionPolicy = FullRetention()
    if by_score is not None:
        retention = by_score
    elif num_blocks is not None:
        recent = num_blocks * exact.block_size
        retention = WindowRetention(recent=recent, block_size=exact.block_size)
    elif selection is None:
        return partial(StrictAttention, codecs_of_layer=layers.__getitem__, exact=exact)
    # A text has no output: a selection that leaves prompts alone is measured as if it were one.
    is_output = selection is not None and not selection.chooses_in_prompt
    return partial(
        RetainedAttention,
        retention=retention,
        codecs_of_layer=layers.__getitem__,
        exact=exact,
        selection=selection,
        num_prompt_tokens=0 if is_output else None,
    )


def _written(codec: LayerCodec) -> LayerCodecs:
    """Arrays that are stored as they are count two bytes an element, in whatever type a
    measurement computes."""
    return LayerCodecs(*(None if isinstance(array, ExactArray) else array for array in codec))


def _check_blocks(codecs: LayerCodecs, geometry: LayerGeometry, block_size: int) -> None:
    for codec, dim in stored_dims(codecs, geometry):
        if codec is not None:
            codec.planes(BlockShape(geometry.num_kv_heads, block_size, dim))
