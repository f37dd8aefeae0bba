"""Rows that fill blocks one by one: what they give with recorded encoding, and with each block
encoded as it is defined."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvcluster.attention.implementation import Implementation
from kvcluster.cache.store import KVStore
from kvcluster.engine.plan import EncodingError
from kvcluster.model.encode_graphs import EncodeGraphs
from kvcluster.types import Policy
from tests.codec_models import calibrated_codecs
from tests.kernels.test_steps import RecordingModel, Setting
from tests.reference_group import ReferenceGroup

Outcome = tuple[list[EncodingError], dict[tuple[int, ...], Tensor]]


def outcome(
    policies: tuple[str, ...],
    implementation: Callable[[KVStore], Implementation],
    setting: Setting,
    num_steps: int,
) -> Outcome:
    """Prompts that end a few tokens before a block, each at another place, then single rows."""
    max_tokens = 4 * setting.block_size + num_steps
    # A window of a block and more: a block that fills is still seen.
    model = RecordingModel(setting, max_tokens, window=setting.block_size + 8)

    group = ReferenceGroup(
        model.loaded,
        num_ranks=1,
        block_size=setting.block_size,
        exact_blocks=1,
        implementation=implementation,
        codecs=calibrated_codecs(model.spec, setting.device),
    )
    for sequence, codec in enumerate(policies):
        group.start(sequence, [1] * (3 * setting.block_size - 2 - sequence), Policy(codec=codec))
        model.num_steps += 1
        group.run({sequence: 3 * setting.block_size - 2 - sequence}, owners=(0,))
    for _ in range(num_steps):
        model.num_steps += 1
        group.run(dict.fromkeys(range(len(policies)), 1), owners=(0,))
    return group.errors, model.calls


def check(
    policies: tuple[str, ...],
    implementation: Callable[[KVStore], Implementation],
    setting: Setting,
    num_steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> int:
    """How often a block was encoded by what is recorded."""
    runs = []
    run = EncodeGraphs.run

    def counted(graphs: EncodeGraphs, *arguments: object) -> object:
        runs.append(arguments)
        return run(graphs, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(EncodeGraphs, "run", counted)
        errors, calls = outcome(policies, implementation, setting, num_steps)
    with monkeypatch.context() as patch:
        patch.setattr(EncodeGraphs, "serves", lambda *_: False)
        defined_errors, defined_calls = outcome(policies, implementation, setting, num_steps)
    assert calls.keys() == defined_calls.keys()
    for call, out_THD in defined_calls.items():
        assert torch.equal(calls[call], out_THD), call
    assert [error.sequence for error in errors] == [error.sequence for error in defined_errors]
    for measured, defined in zip(errors, defined_errors, strict=True):
        assert measured.squared_error == pytest.approx(defined.squared_error, rel=1e-4)
        assert measured.squared_size == pytest.approx(defined.squared_size, rel=1e-4)
    return len(runs)
