"""Fits a model's latent bases: second moments of its queries, keys and values over texts.

Moments are kept apart for each kind of text, because a basis fitted to their plain sum forgets
what only a rare kind needs (the digits of retrieval documents among prose). They are added text by
text, so that a run can be broken off, kept as tensors and gone on with.

Shape letters: T tokens, H query heads, K KV heads, D head dimension, E hidden dimension, B 1.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcluster.codec.calibration import (
    MIN_TOKENS_PER_DIRECTION,
    Calibration,
    LayerCalibration,
    LayerPools,
    fit_keys,
    fit_values,
    output_weights,
)
from kvcluster.codec.moments import LayerMoments, MomentSums, upper_bound, weighted_sum
from kvcluster.codec.pooled import fit_pools
from kvcluster.errors import ConfigError
from kvcluster.model.loader import LoadedModel
from kvcluster.model.rotary import Rotary, check_rotary, read_rotary
from kvcluster.model.tokenizer import TextTokenizer
from kvcluster.quality.joined_moments import (
    ErrorWeights,
    JoinedSums,
    fit_group,
    groups_of,
    side_by_side,
)
from kvcluster.quality.needles import STYLES, needle_document
from kvcluster.quality.passes import final_states
from kvcluster.quality.strict import ExactTokens, StrictAttention
from kvcluster.quality.texts import Purpose, Text
from kvcluster.types import LayerGeometry, ModelSpec

_NUM_DISTANCES: Final = 64
SHORTEST_TEXT: Final = 256
"""Fewer tokens at the end of a text are left out: most would read little before them."""
_NEEDLES: Final = 8


class Mixing(StrEnum):
    """How the moments of several kinds of text become one."""

    SUM = "sum"
    """By their numbers of tokens, as if they were one text."""
    BOUND = "bound"
    """At least as large as each kind's in every direction: see `moments.upper_bound`."""


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Tokens of one pass."""

    kind: str
    """Moments of texts of one kind are kept together."""
    token_ids: tuple[int, ...]
    answers: tuple[int, ...] = ()
    """Positions of the tokens that answer a document's questions."""

    @property
    def digest(self) -> str:
        """Tells the tokens of two texts apart."""
        numbers = torch.tensor(self.token_ids, dtype=torch.int32).numpy().tobytes()
        return hashlib.blake2b(numbers, digest_size=8).hexdigest()


class ModelMoments:
    """Running sums of every layer that stores K and V, and of groups of them, over calibration
    texts, apart for each kind of text."""

    def __init__(self, spec: ModelSpec, joined: Collection[int] = ()) -> None:
        """`joined`: sizes of the groups of layers that shall be able to share a latent."""
        stored = [spec.layers[index] for index in spec.storing_layers]
        self.groups = groups_of(stored, joined)
        self._units = [*stored, *(side_by_side(stored, group) for group in self.groups)]
        """Layers, and groups seen as a layer with all their heads."""
        self._kinds: dict[str, list[MomentSums]] = {}
        self._text_digests: list[str] = []

    @property
    def text_digests(self) -> tuple[str, ...]:
        """Of the texts counted in so far, in order."""
        return tuple(self._text_digests)

    def count(self, text: CalibrationText) -> list[MomentSums]:
        """Note that this text is counted in, and hand out the sums of its kind to add to."""
        self._text_digests.append(text.digest)
        return self._sums(text.kind)

    def of_kinds(self) -> list[list[LayerMoments]]:
        """For each kind, the moments of each layer, then of each group.

        Raises: ConfigError when no text was added.
        """
        if not self._kinds:
            raise ConfigError("calibration: no text was added")
        return [[sums.moments() for sums in layers] for layers in self._kinds.values()]

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, to keep on disk; with `text_digests`, the whole state."""
        return {
            f"{kind}.{layer}.{name}": tensor
            for kind, layers in self._kinds.items()
            for layer, sums in enumerate(layers)
            for name, tensor in sums.tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor], text_digests: Sequence[str]) -> None:
        """Take over what `tensors` and `text_digests` gave.

        Raises: ValueError for sums of another model.
        """
        parts: dict[tuple[str, int], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, number, name = key.rsplit(".", 2)
            parts.setdefault((kind, int(number)), {})[name] = tensor
        for (kind, layer), named in parts.items():
            if layer >= len(self._units):
                raise ValueError(f"want sums of {len(self._units)} layers and groups of layers")
            self._sums(kind)[layer].load(named)
        if len(parts) != len(self._kinds) * len(self._units):
            raise ValueError(f"want sums of {len(self._units)} layers and groups of layers")
        self._text_digests = list(text_digests)

    def _sums(self, kind: str) -> list[MomentSums]:
        if kind not in self._kinds:
            self._kinds[kind] = [
                MomentSums(layer.num_kv_heads, layer.key_dim, layer.value_dim)
                for layer in self._units
            ]
        return self._kinds[kind]


def calibration_texts(
    tokenizer: TextTokenizer,
    texts: Sequence[Text],
    *,
    num_tokens: int,
    passes_per_text: int,
    documents_per_style: int,
) -> Iterator[CalibrationText]:
    """Passes over the texts for calibration, and over documents with needles hidden in them.

    Each pass has `num_tokens` tokens, but a text's last one, which may be shorter; later passes
    over a text go on where the one before it ended. Texts for evaluation are left out.
    """
    chosen = [text for text in texts if text.purpose is Purpose.CALIBRATION]
    for text in chosen:
        encoder = tokenizer.prompt_encoder()
        ids = [*encoder.push(text.content), *encoder.finish()][: num_tokens * passes_per_text]
        yield from _passes(text.name, ids, num_tokens)
    for style in (style for style in STYLES if style.purpose is Purpose.CALIBRATION):
        for seed in range(documents_per_style):
            document = needle_document(
                tokenizer,
                style,
                chosen[seed % len(chosen)],
                num_tokens=num_tokens,
                num_needles=min(_NEEDLES, len(style.keys)),
                seed=seed,
            )
            answers = (range(q.answer_from, q.answer_to) for q in document.questions)
            yield CalibrationText("needles", document.token_ids, tuple(chain(*answers)))


def passes_over(
    tokenizer: TextTokenizer, contents: Iterable[str], *, num_tokens: int
) -> Iterator[CalibrationText]:
    """Passes over all of the texts, which are of one kind."""
    for content in contents:
        encoder = tokenizer.prompt_encoder()
        yield from _passes("data", [*encoder.push(content), *encoder.finish()], num_tokens)


def tokens_needed(spec: ModelSpec, joined: Collection[int] = ()) -> int:
    """Tokens that bases of this model are fitted from at least, those of `joined` layers together
    among them."""
    stored = [spec.layers[index] for index in spec.storing_layers]
    groups = [side_by_side(stored, group) for group in groups_of(stored, joined)]
    return MIN_TOKENS_PER_DIRECTION * max(
        layer.num_kv_heads * max(layer.key_dim, layer.value_dim) for layer in (*stored, *groups)
    )


def checked_rotaries(model: LoadedModel) -> tuple[Rotary | None, ...]:
    """The rotation of each layer, compared with the model's own.

    Raises: ModelUnsupported for a model whose keys cannot be rotated back.
    """
    rotaries = read_rotary(model.module, model.spec.layers)
    check_rotary(model.module, rotaries)
    return rotaries


def add_text(
    model: LoadedModel,
    rotaries: Sequence[Rotary | None],
    moments: ModelMoments,
    text: CalibrationText,
) -> None:
    """Run the model over one text with the exact cache, and count its tokens into `moments`.

    A text that is cut off by an error may be counted in part: go on from tensors kept before it.
    """
    spec = model.spec
    sums = moments.count(text)
    layers = dict(zip(spec.storing_layers, sums, strict=False))
    joined = JoinedSums(spec, moments.groups, sums[len(layers) :])

    def observe(layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        rotary, source = rotaries[layer], spec.kv_layer_of(layer)
        queries = _unrotated(q_THD, rotary)
        if source == layer:
            keys = _unrotated(k_TKD, rotary)
            layers[layer].add(queries, keys, v_TKD)
            joined.add(layer, keys, v_TKD)
        else:
            scale = spec.layers[layer].scale / spec.layers[source].scale
            layers[source].add_queries(queries, scale=scale)

    attention = StrictAttention(spec, lambda _layer: None, ExactTokens(block_size=64), observe)
    final_states(model, torch.tensor(text.token_ids, dtype=torch.int64), attention)


def fitted(
    model: LoadedModel,
    rotaries: Sequence[Rotary | None],
    moments: ModelMoments,
    *,
    mixing: Mixing = Mixing.BOUND,
    largest_rank: int | None = None,
) -> Calibration:
    """Bases of every layer with K and V of its own, and of the groups of `moments`, up to full
    rank, or to `largest_rank` where that is lower.

    Raises: ConfigError when the texts were too short.
    """
    kinds = moments.of_kinds()
    outputs = output_projections(model.module, model.spec.layers)
    mix = upper_bound if mixing is Mixing.BOUND else weighted_sum
    stored = model.spec.storing_layers
    mixtures = [mix(kind, [float(m.num_tokens) for m in kind]) for kind in zip(*kinds, strict=True)]
    layers, weights = [], []
    for mixed, index in zip(mixtures, stored, strict=False):
        geometry = model.spec.layers[index]
        output_KDD = None
        if outputs is not None:
            output_KDD = torch.stack(
                [
                    output_weights(outputs[reader].float(), geometry.num_kv_heads)
                    for reader in model.spec.readers_of(index)
                ]
            ).sum(0)
        limit = largest_rank or max(len(mixed.keys.mean_F), len(mixed.values.mean_F))
        met = _met(mixed, rotaries[index], geometry, model.spec.max_context_tokens)
        weights.append(ErrorWeights(met.query_KDD, output_KDD))
        layers.append(
            LayerCalibration(
                keys=fit_keys(
                    met,
                    rank=min(limit, len(mixed.keys.mean_F)),
                    scale=geometry.scale,
                ),
                values=fit_values(
                    mixed, rank=min(limit, len(mixed.values.mean_F)), output_KDD=output_KDD
                ),
                pools=LayerPools(
                    fit_pools(mixed.keys, geometry.num_kv_heads),
                    fit_pools(mixed.values, geometry.num_kv_heads),
                ),
            )
        )
    return Calibration(
        weights_digest=model.spec.weights_digest,
        text_digests=moments.text_digests,
        num_tokens=sum(kind[0].num_tokens for kind in kinds),
        layers=tuple(layers),
        groups=tuple(
            fit_group(
                group,
                mixed,
                [weights[place] for place in group],
                scale=model.spec.layers[stored[group[0]]].scale,
                largest_rank=largest_rank,
            )
            for group, mixed in zip(moments.groups, mixtures[len(stored) :], strict=True)
        ),
    )


def output_projections(
    module: PreTrainedModel, layers: Sequence[LayerGeometry]
) -> list[Tensor] | None:
    """W_o of each layer as [E, H, D], or None where the model's modules do not show it: values are
    then fitted as if all directions mattered alike."""
    projections = (getattr(part, "o_proj", None) for part in module.modules())
    found = [part.weight.detach() for part in projections if isinstance(part, nn.Linear)]
    widths = [layer.num_query_heads * layer.value_dim for layer in layers]
    if [weight.shape[1] for weight in found] != widths:
        return None
    return [
        weight.reshape(-1, layer.num_query_heads, layer.value_dim)
        for weight, layer in zip(found, layers, strict=True)
    ]


def _met(
    moments: LayerMoments, rotary: Rotary | None, geometry: LayerGeometry, context_tokens: int
) -> LayerMoments:
    """The same with queries as keys at all distances meet them: see `Rotary.met_at`."""
    if rotary is None:
        return moments
    furthest = min(geometry.window or context_tokens, context_tokens) - 1
    distances_S = torch.logspace(0, math.log10(max(furthest, 1)), _NUM_DISTANCES).round().long()
    query_KDD = rotary.met_at(
        moments.query_KDD.to(rotary.inverse_frequencies_F.device), distances_S
    )
    return LayerMoments(
        num_tokens=moments.num_tokens,
        query_KDD=query_KDD.cpu(),
        keys=moments.keys,
        values=moments.values,
    )


def _passes(kind: str, ids: Sequence[int], num_tokens: int) -> Iterator[CalibrationText]:
    for first in range(0, len(ids), num_tokens):
        part = ids[first : first + num_tokens]
        if len(part) >= min(SHORTEST_TEXT, num_tokens):
            yield CalibrationText(kind, tuple(part))


def _unrotated(x_THD: Tensor, rotary: Rotary | None) -> Tensor:
    if rotary is None:
        return x_THD
    positions_BT = torch.arange(x_THD.shape[0], device=x_THD.device)[None]
    return rotary.undo(x_THD.transpose(0, 1)[None], positions_BT)[0].transpose(0, 1)
