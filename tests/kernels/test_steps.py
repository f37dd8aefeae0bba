"""A step through kernels gives what the same step gives in torch, whatever is mixed in it."""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from kvcluster.attention.implementation import Implementation, PlainAttention
from kvcluster.attention.kernel_attention import KernelAttention
from kvcluster.attention.kernel_rows import KernelRows
from kvcluster.attention.kernel_selected import KernelSelected
from kvcluster.attention.part import SequencePart
from kvcluster.attention.partial import Partial
from kvcluster.cache.store import KVStore, Piece
from kvcluster.engine.plan import EncodingError
from kvcluster.model import decode_graphs
from kvcluster.model.attention_hook import LayerAttention
from kvcluster.types import LayerGeometry, Policy, Route
from tests import thread_ring
from tests.codec_models import CPU, calibrated_codecs
from tests.reference_group import ReferenceGroup
from tests.scripted_model import VOCAB_SIZE, ScriptedModel

MAX_TOKENS = 320
# Codes of 8 bits and more are exact in float16; queries and weights are rounded to it, by 2^-11 of
# numbers of which the largest scores are sums (see `decode_cases.Bounds`).
PACKED_ATOL = 4e-3
# A few hundred float32 roundings of numbers near 1, summed in another order.
EXACT_ATOL = 3e-5


@dataclass(frozen=True)
class Setting:
    """What is served, and where."""

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    dim: int = 32
    block_size: int = 32
    num_alike: int = 1
    """Layers without a window or a cap."""
    latent_dim: int | None = None
    """Of multi-head latent attention: the first of the `dim` numbers of a key are its value."""
    cuts_blocks: bool = False
    """Rows that are computed together lie in one block."""

    def geometry(self, *, window: int | None = None, softcap: float | None = None) -> LayerGeometry:
        return LayerGeometry(
            num_query_heads=4,
            num_kv_heads=2 if self.latent_dim is None else 1,
            key_dim=self.dim,
            value_dim=self.latent_dim or self.dim,
            values_in_keys=self.latent_dim is not None,
            scale=self.dim**-0.5,
            window=window,
            softcap=softcap,
        )


DEFAULT = Setting()


class RecordingModel(ScriptedModel):
    """Keeps what attention gave in each call, by the positions of the rank's rows and the layer."""

    def __init__(
        self, setting: Setting, max_tokens: int = MAX_TOKENS, *, window: int | None = 40
    ) -> None:
        layers = [setting.geometry(softcap=5.0)]
        if window is not None:
            layers.append(setting.geometry(window=window))
        layers += [setting.geometry()] * setting.num_alike
        super().__init__(*layers, max_tokens=max_tokens)
        self.spec = msgspec.structs.replace(
            self.spec,
            dtype=str(setting.dtype).removeprefix("torch."),
            bytes_per_element=setting.dtype.itemsize,
        )
        self.device = setting.device
        self.module = torch.nn.Linear(1, 1, device=setting.device, dtype=setting.dtype)
        self.script = [
            (q.to(self.module.weight), k.to(self.module.weight), v.to(self.module.weight))
            for q, k, v in self.script
        ]
        self.calls: dict[tuple[int, ...], Tensor] = {}
        self.num_steps = 0
        self._lock = threading.Lock()

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        logit_rows_R: Tensor,
        attention: LayerAttention,
    ) -> Tensor:
        for layer, qkv in enumerate(self.script):
            q_THD, k_TKD, v_TKD = (x[positions_T] for x in qkv)
            out_THD = attention.attend(layer, q_THD, k_TKD, v_TKD, None)
            with self._lock:
                self.calls[self.num_steps, layer, *positions_T.tolist()] = out_THD.clone()
        logits_RV = torch.zeros(len(logit_rows_R), VOCAB_SIZE, device=self.device)
        logits_RV[:, 5] = 1.0
        return logits_RV


_INTERPRETER = threading.RLock()
"""Triton's interpreter runs one kernel at a time; ranks are threads here."""


class InterpretedRows(KernelRows):
    """Waits for the interpreter."""

    def attend(self, layer: int, parts: Sequence[SequencePart], q_RHD: Tensor) -> Partial:
        with _INTERPRETER:
            return super().attend(layer, parts, q_RHD)

    def attend_full(self, *arguments: Any) -> Partial | None:
        with _INTERPRETER:
            return super().attend_full(*arguments)


class InterpretedSelected(KernelSelected):
    """Waits for the interpreter."""

    def scores(self, *arguments: Any) -> Tensor | None:
        with _INTERPRETER:
            return super().scores(*arguments)

    def attend(self, *arguments: Any) -> Partial | None:
        with _INTERPRETER:
            return super().attend(*arguments)


class InterpretedAttention(KernelAttention):
    """Waits for the interpreter."""

    def __init__(self, store: KVStore) -> None:
        super().__init__(store, dtypes=(torch.float32,))
        self.rows = InterpretedRows(store, self.merge)
        self.chosen = InterpretedSelected(store, self.rows, self.merge, (torch.float32,))

    def attend(self, *arguments: Any) -> Partial:
        with _INTERPRETER:
            return super().attend(*arguments)

    def attend_causal(self, *arguments: Any) -> Partial:
        with _INTERPRETER:
            return super().attend_causal(*arguments)

    def attend_earlier(self, *arguments: Any, gap: int) -> Partial:
        with _INTERPRETER:
            return super().attend_earlier(*arguments, gap=gap)

    def encode(self, *arguments: Any) -> bool:
        with _INTERPRETER:
            return super().encode(*arguments)

    def restored(self, *arguments: Any) -> Piece | None:
        with _INTERPRETER:
            return super().restored(*arguments)

    def attend_pages(self, *arguments: Any) -> Partial | None:
        with _INTERPRETER:
            return super().attend_pages(*arguments)

    def attend_switching(self, *arguments: Any) -> Partial | None:
        with _INTERPRETER:
            return super().attend_switching(*arguments)

    def merge(self, *partials: Partial) -> Partial:
        with _INTERPRETER:
            return super().merge(*partials)


def in_torch(_store: KVStore) -> PlainAttention:
    return PlainAttention()


def outputs(
    policies: Sequence[str],
    implementation: Callable[[KVStore], Implementation],
    setting: Setting = DEFAULT,
    *,
    num_ranks: int = 1,
    route: Route = Route.PASS_KV,
    owners: Sequence[int] = (0,),
    errors: list[EncodingError] | None = None,
) -> dict[tuple[int, ...], Tensor]:
    """Sequences of different lengths: their prompts one after another, the others' rows beside
    them, then rows of all. `errors` gets what encoding was measured to do."""
    model = RecordingModel(setting)
    group = ReferenceGroup(
        model.loaded,
        num_ranks=num_ranks,
        block_size=setting.block_size,
        exact_blocks=1,
        implementation=implementation,
        codecs=calibrated_codecs(model.spec, setting.device),
    )
    size = setting.block_size
    decoding: dict[int, int] = {}
    for sequence, codec in enumerate(policies):
        length = 4 * size + 7 - 21 * sequence
        group.start(sequence, [1] * length, Policy(codec=codec))
        # The last chunk finds a block encoded, and begins in the middle of one.
        cuts = {2 * size, 3 * size + 8}
        cuts |= set(range(size, length, size)) if setting.cuts_blocks else set()
        for start, end in pairwise([0, *sorted(cut for cut in cuts if cut < length), length]):
            model.num_steps += 1
            group.run({**decoding, sequence: end - start}, owners=owners, route=route)
        decoding[sequence] = 1
    model.num_steps += 1
    group.run(decoding, owners=owners, route=route)
    if errors is not None:
        errors += group.errors
    return model.calls


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("policies", "num_ranks", "route", "owners"),
    [
        (("exact", "exact"), 1, Route.PASS_KV, (0,)),
        (("int4", "exact", "int8"), 1, Route.PASS_KV, (0,)),
        (("fp8", "rotated4"), 1, Route.PASS_KV, (0,)),
        (("int4:values=rotated4", "exact"), 1, Route.PASS_KV, (0,)),
        (("int4", "exact"), 3, Route.PASS_KV, (0, 2)),
        (("exact", "int8"), 2, Route.PASS_Q, (1, 0)),
        (("int3", "int4:scale_bits=8"), 2, Route.GATHER, (0, 1)),
    ],
)
def test_a_step_through_kernels_is_the_step_in_torch(
    policies: tuple[str, ...],
    num_ranks: int,
    route: Route,
    owners: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    interpreted: torch.device,
) -> None:
    # Ranks wait for the interpreter and for each other, on a busy machine for minutes.
    monkeypatch.setattr(thread_ring, "TIMEOUT_S", 280.0)
    errors: tuple[list[EncodingError], list[EncodingError]] = ([], [])
    by_kernels, plain = (
        outputs(
            policies, implementation, num_ranks=num_ranks, route=route, owners=owners, errors=found
        )
        for implementation, found in zip((InterpretedAttention, in_torch), errors, strict=True)
    )

    assert by_kernels.keys() == plain.keys()
    atol = EXACT_ATOL if set(policies) == {"exact"} else PACKED_ATOL
    for call, out_THD in plain.items():
        torch.testing.assert_close(by_kernels[call], out_THD, rtol=0, atol=atol)
    assert bool(errors[0]) == (set(policies) != {"exact"})
    for measured, defined in zip(*errors, strict=True):
        assert measured.sequence == defined.sequence
        assert _size(measured) == pytest.approx(_size(defined), abs=PACKED_ATOL)


def _size(error: EncodingError) -> float:
    """Relative, as it is reported."""
    return math.sqrt(error.squared_error / error.squared_size)


@pytest.mark.timeout(300)
def test_rows_that_fill_up_a_step_change_nothing(
    monkeypatch: pytest.MonkeyPatch, interpreted: torch.device
) -> None:
    policies = ("int4", "exact")
    found = last_rows(outputs(policies, InterpretedAttention))

    monkeypatch.setattr(decode_graphs, "ROW_COUNTS", (4,))
    filled_up = outputs(policies, InterpretedAttention)

    assert len(max(filled_up)) == len(("step", "layer")) + 4
    assert last_rows(filled_up).keys() == found.keys()
    # With more rows each is split less, and packed kernels round weights to float16.
    for place, out_HD in last_rows(filled_up).items():
        torch.testing.assert_close(out_HD, found[place], rtol=0, atol=PACKED_ATOL)


def last_rows(calls: dict[tuple[int, ...], Tensor]) -> dict[tuple[int, int], Tensor]:
    """out_HD of the last step's rows, by layer and position."""
    last_step = max(step for step, *_ in calls)
    return {
        (layer, position): out_HD
        for (step, layer, *positions), out_THD in calls.items()
        if step == last_step
        for position, out_HD in zip(positions, out_THD, strict=True)
    }
