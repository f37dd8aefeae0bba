"""Rotary position embedding of each attention layer, read from a model, checked against it, undone.

The hook sees keys after rotation. Which rotation that was is not taken from the config: each
layer's keys are compared with those of the same tokens at position 0, where rotation does nothing,
and the frequencies that the model holds are accepted for a layer only if they explain its keys.
Used in the process of a rank and in calibration.

Shape letters: T tokens, B blocks, S tokens of a block, K KV heads, D head dimension, F rotated
pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcluster.codec.latent import RotatedPairs
from kvcluster.errors import ModelUnsupported
from kvcluster.model.attention_hook import forward
from kvcluster.model.loader import max_context_tokens
from kvcluster.types import LayerGeometry

_LENGTH_DEPENDENT: Final = frozenset({"dynamic", "longrope"})
_FURTHEST_POSITION: Final = 131_071
_RELATIVE_ERROR: Final = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest norm of the difference of two arrays of keys over the norm of the keys. Rounding is
2e-8 in float32; in half precision the model rounds cosines, products and sums (bfloat16: 3e-3
together). A wrong frequency turns far keys by any angle: 0.1 to 2."""


class Pairing(Enum):
    """Which two dimensions rotate together."""

    HALF_SPLIT = "half_split"
    """Dimension i of the rotated ones with i + F."""
    INTERLEAVED = "interleaved"
    """Dimension 2i of the rotated ones with 2i + 1."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rotary:
    """How one layer turns its keys and queries by their position. Dimensions outside
    [first_dim, first_dim + 2 F) are left alone."""

    inverse_frequencies_F: Tensor
    """Radians per position, float32."""
    scaling: float
    """Factor on the rotated dimensions (YaRN's attention factor)."""
    first_dim: int
    pairing: Pairing

    @property
    def num_rotated_dims(self) -> int:
        return 2 * len(self.inverse_frequencies_F)

    @property
    def pairs(self) -> RotatedPairs:
        """The same for kernels."""
        return RotatedPairs(
            self.inverse_frequencies_F,
            self.scaling,
            self.first_dim,
            self.pairing is Pairing.INTERLEAVED,
        )

    def apply(self, x_BKSD: Tensor, positions_BS: Tensor) -> Tensor:
        """Rotate to the positions, as the model does. float32, new memory."""
        cos_BKSF, sin_BKSF = self._cos_and_sin(x_BKSD, positions_BS)
        return self._turn(x_BKSD, cos_BKSF * self.scaling, sin_BKSF * self.scaling)

    def undo(self, x_BKSD: Tensor, positions_BS: Tensor) -> Tensor:
        """The keys that `apply` would turn into `x_BKSD`. float32, new memory."""
        cos_BKSF, sin_BKSF = self._cos_and_sin(x_BKSD, positions_BS)
        return self._turn(x_BKSD, cos_BKSF / self.scaling, -sin_BKSF / self.scaling)

    def met_at(self, second_moment_KDD: Tensor, distances_S: Tensor) -> Tensor:
        """Mean second moment, float64, of queries as keys `distances_S` positions earlier meet it.

        Query and key are each turned by their own position, so a query at distance d weighs an
        error of an unrotated key as R(d) q. Unturned queries weigh it as if every key lay at their
        own position, which favours directions that do not outlast a few tokens. Distances spaced
        evenly in the logarithm, up to the layer's window or context, count near and far alike.
        """
        met_KDD = torch.zeros_like(second_moment_KDD, dtype=torch.float64)
        rows_BKSD = second_moment_KDD[None]
        for distance in distances_S.tolist():
            positions_BS = torch.full((1, second_moment_KDD.shape[-1]), distance)
            half_turned_BKSD = self.apply(rows_BKSD, positions_BS).transpose(-1, -2)
            met_KDD += self.apply(half_turned_BKSD, positions_BS)[0].transpose(-1, -2)
        return met_KDD / len(distances_S)

    def _cos_and_sin(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        # Angles must be the model's own float32 products, whose rounding at far positions turns
        # keys by up to 0.004 radians. The functions of them are taken in float64, because in
        # float32 their last bit depends on where a value lies in its vector register.
        inverse_F = self.inverse_frequencies_F.to(x_BKSD.device)
        angles_BSF = positions_BS.to(x_BKSD.device)[..., None].float() * inverse_F
        angles_BKSF = angles_BSF[:, None].double()
        return angles_BKSF.cos().float(), angles_BKSF.sin().float()

    def _turn(self, x_BKSD: Tensor, cos_BKSF: Tensor, sin_BKSF: Tensor) -> Tensor:
        out_BKSD = x_BKSD.to(torch.float32, copy=True)
        last_dim = self.first_dim + self.num_rotated_dims
        rotated = out_BKSD[..., self.first_dim : last_dim]
        if self.pairing is Pairing.HALF_SPLIT:
            # Slices and not `chunk`, whose parts autograd lets nobody write to.
            middle = self.num_rotated_dims // 2
            first, second = rotated[..., :middle], rotated[..., middle:]
        else:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        turned_first = first * cos_BKSF - second * sin_BKSF
        turned_second = second * cos_BKSF + first * sin_BKSF
        first.copy_(turned_first)
        second.copy_(turned_second)
        return out_BKSD


def read_rotary(
    module: PreTrainedModel, layers: Sequence[LayerGeometry]
) -> tuple[Rotary | None, ...]:
    """The rotary embedding of each layer, None for one whose keys do not depend on position.

    `module` must be set to `attention_hook.IMPLEMENTATION`, as `probe` leaves it; `layers` are its
    layers in call order. Runs two short passes.
    Raises: ModelUnsupported when a layer's keys depend on position otherwise than by a rotation
    that is the same for prompts of any length.
    """
    _refuse_length_dependent(module)
    seen = _observe(module, seed=0)
    if len(seen.unrotated) != len(layers):
        raise _unsupported(
            module, f"{len(seen.unrotated)} layers gave keys, {len(layers)} were expected"
        )
    frequencies = list(_frequencies(module))
    return tuple(_read_layer(module, seen, index, frequencies) for index in range(len(layers)))


def check_rotary(module: PreTrainedModel, rotaries: Sequence[Rotary | None]) -> None:
    """Compare every layer's keys, rotated back, with those of the same tokens at position 0.

    `module` as for `read_rotary`; other tokens and positions than there are used.
    Raises: ModelUnsupported, naming the first layer whose keys differ.
    """
    seen = _observe(module, seed=1)
    if len(seen.unrotated) != len(rotaries):
        raise _unsupported(
            module, f"it has {len(seen.unrotated)} layers, {len(rotaries)} rotations were given"
        )
    for index, rotary in enumerate(rotaries):
        error = max(seen.error(index, rotary), seen.error_undone(index, rotary))
        if not error <= _RELATIVE_ERROR[module.dtype]:
            raise _unsupported(
                module,
                f"keys of layer {index}, rotated back, are not those of position 0 "
                f"(relative error {error:.1e})",
            )


@dataclass(frozen=True, slots=True)
class _Observation:
    """Keys of the same tokens at position 0 and at `positions_T`, layer by layer, [1, K, T, D]."""

    positions_T: Tensor
    unrotated: list[Tensor]
    rotated: list[Tensor]

    def error(self, layer: int, rotary: Rotary | None) -> float:
        """Relative error of the rotated keys that `rotary` predicts."""
        base = self.unrotated[layer]
        if rotary is not None:
            # Position 0 is not unrotated altogether: the scaling applies there too.
            base = rotary.undo(base, torch.zeros_like(self.positions_T)[None])
            base = rotary.apply(base, self.positions_T[None])
        return _relative_error(base, self.rotated[layer])

    def error_undone(self, layer: int, rotary: Rotary | None) -> float:
        """Relative error of the keys of position 0 that `rotary` gives back."""
        if rotary is None:
            return self.error(layer, None)
        undone = rotary.undo(self.rotated[layer], self.positions_T[None])
        origin_BS = torch.zeros_like(self.positions_T)[None]
        return _relative_error(undone, rotary.undo(self.unrotated[layer], origin_BS))


def _relative_error(ours: Tensor, own: Tensor) -> float:
    return float((ours.float() - own.float()).norm() / own.float().norm().clamp_min(1e-12))


@dataclass(slots=True)
class _KeyRecorder:
    """Notes the keys of a pass, and lets each token attend to itself alone: so what enters any
    layer does not depend on positions, unless the model looks at them outside of its attention."""

    layers: list[Tensor]

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        del layer, sinks_H
        self.layers.append(k_TKD.transpose(0, 1)[None].clone())
        return v_TKD.repeat_interleave(q_THD.shape[1] // v_TKD.shape[1], dim=1)


def _observe(module: PreTrainedModel, *, seed: int) -> _Observation:
    config = module.config.get_text_config()
    furthest = min(max_context_tokens(config) - 1, _FURTHEST_POSITION)
    near = torch.arange(1, 9)
    far = torch.logspace(1, 0, 8, base=furthest, dtype=torch.float64).long() - seed
    positions_T = torch.cat([near + seed, far]).clamp(0, furthest).to(module.device)
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(config.vocab_size, positions_T.shape, generator=generator)
    ids_T = ids_T.to(module.device)

    no_rows = torch.empty(0, dtype=torch.int64, device=module.device)
    unrotated, rotated = _KeyRecorder([]), _KeyRecorder([])
    forward(module, ids_T, torch.zeros_like(positions_T), no_rows, unrotated)
    forward(module, ids_T, positions_T, no_rows, rotated)
    return _Observation(positions_T, unrotated.layers, rotated.layers)


def _refuse_length_dependent(module: PreTrainedModel) -> None:
    for part in module.modules():
        rope_type = getattr(part, "rope_type", None)
        kinds = rope_type.values() if isinstance(rope_type, dict) else (rope_type,)
        for kind in kinds:
            if kind in _LENGTH_DEPENDENT:
                raise _unsupported(
                    module, f"its rotary frequencies ({kind}) depend on the length of the prompt"
                )


def _frequencies(module: PreTrainedModel) -> Iterator[tuple[Tensor, float]]:
    """Inverse frequencies and scaling of every rotary embedding in the model."""
    suffix = "inv_freq"
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name.endswith(suffix) and not name.endswith(f"original_{suffix}"):
                prefix = name.removesuffix(suffix)
                scaling = getattr(part, f"{prefix}attention_scaling", 1.0)
                yield buffer.detach().float().clone(), float(scaling)


def _read_layer(
    module: PreTrainedModel,
    seen: _Observation,
    layer: int,
    frequencies: Sequence[tuple[Tensor, float]],
) -> Rotary | None:
    """The simplest candidate that explains the keys of the layer."""
    key_dim = seen.unrotated[layer].shape[-1]
    candidates: list[Rotary | None] = [None]
    for inverse_F, scaling in frequencies:
        num_free_dims = key_dim - 2 * len(inverse_F)
        candidates += [
            Rotary(
                inverse_frequencies_F=inverse_F,
                scaling=scaling,
                first_dim=first_dim,
                pairing=pairing,
            )
            for first_dim in sorted({0, num_free_dims})
            for pairing in Pairing
            if num_free_dims >= 0
        ]
    best = min(candidates, key=lambda candidate: seen.error(layer, candidate))
    error = seen.error(layer, best)
    if not error <= _RELATIVE_ERROR[module.dtype]:
        raise _unsupported(
            module,
            f"keys of layer {layer} depend on their position in a way that is not known "
            f"(relative error {error:.1e})",
        )
    return best


def _unsupported(module: PreTrainedModel, reason: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"{type(module).__name__} cannot keep its keys as they are before rotation, because "
        f"{reason}"
    )
