"""A step over latents, by the kernel that expands them as it reads, is the step in torch."""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from kvcluster_kernels import packed_history

from kvcluster.attention import latent_cache
from kvcluster.attention.kernel_rows import KernelRows
from kvcluster.attention.latent_cache import LatentCache
from kvcluster.attention.partial import merge
from kvcluster.cache.store import KVStore
from kvcluster.types import ModelSpec, Policy
from tests import thread_ring
from tests.codec_models import calibrated_codecs
from tests.kernels.test_steps import (
    DEFAULT,
    PACKED_ATOL,
    InterpretedAttention,
    RecordingModel,
    Setting,
    in_torch,
    outputs,
)

WIDE = replace(DEFAULT, block_size=64)
"""Blocks that codes of 3 bits fill."""
JOINED = replace(DEFAULT, num_alike=2, cuts_blocks=True)

SERVED = {
    "latent:r=0.5,bits=4,values=rotated3,ranks=adaptive": WIDE,
    "latent:r=0.25,value_r=0.5,bits=8,scale_bits=8": DEFAULT,
    "latent:r=0.5,value_r=0.75,bits=4,value_bits=2,codes=rotated": DEFAULT,
    "latent:r=0.5,bits=4,values=int4,layers=2": JOINED,
    "latent:r=0.5": DEFAULT,
    "latent:r=0.5,bits=3,values=int4,windowed=int8": DEFAULT,
    "latent:r=0.5,bits=2,values=exact": DEFAULT,
    "latent:r=0.25,value_r=0.5,bits=4,ranks=filled,scale_bits=8,layers=2": JOINED,
}
"""The first of them are computed with."""
REFUSED = {
    "latent:r=0.5,keys=int4": DEFAULT,
    "latent:r=0.5,bits=4,values=fp8": DEFAULT,
    "latent:r=0.5,bits=4,values=rotated3": DEFAULT,
}
"""Keys that are none; values of a format without a kernel, or in blocks too short for theirs."""


def rows_of(setting: Setting) -> tuple[KernelRows, ModelSpec]:
    model = RecordingModel(setting)
    store = KVStore(
        model.spec,
        blocks_per_group=[64] * len(model.spec.windows),
        block_size=setting.block_size,
        like=torch.empty(0, device=setting.device, dtype=setting.dtype),
        codecs=calibrated_codecs(model.spec, setting.device),
    )
    return KernelRows(store, merge), model.spec


@pytest.mark.parametrize("codec", SERVED)
def test_every_layer_is_read_by_a_kernel(codec: str) -> None:
    rows, spec = rows_of(SERVED[codec])
    storage = Policy(codec=codec).storage
    layers = [layer for layer, own in enumerate(spec.layers) if own.window is None]

    assert all(isinstance(rows.packed(layer, storage), LatentCache) for layer in layers)
    assert all(rows.packed(layer, storage) for layer in range(len(spec.layers)))


@pytest.mark.parametrize("codec", REFUSED)
def test_what_no_kernel_reads_is_not_served_and_is_told_once(
    codec: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows, spec = rows_of(REFUSED[codec])
    storage = Policy(codec=codec).storage
    found = [rows.packed(layer, storage) for layer in range(len(spec.layers))]

    assert found[0] is None
    assert caplog.text.count("codec_without_kernel") == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("codec", list(SERVED)[:4])
def test_a_step_over_latents_is_the_step_in_torch(
    codec: str, monkeypatch: pytest.MonkeyPatch, interpreted: torch.device
) -> None:
    restored = counted(monkeypatch, packed_history, "restore_latents")
    read = counted(monkeypatch, latent_cache, "decode_latents")

    compare((codec, "exact"), SERVED[codec])

    assert len(restored) > 0
    assert len(read) > 0


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[None]:
    """One for each call of a function that the module has imported."""
    calls: list[None] = []
    function = getattr(module, name)

    def note(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, note)
    return calls


@pytest.mark.timeout(300)
def test_a_step_over_latents_on_several_ranks_is_the_step_in_torch(
    monkeypatch: pytest.MonkeyPatch, interpreted: torch.device
) -> None:
    # Ranks wait for the interpreter and for each other, on a busy machine for minutes.
    monkeypatch.setattr(thread_ring, "TIMEOUT_S", 280.0)

    compare(("latent:r=0.5,bits=4,values=int4", "int8"), DEFAULT, num_ranks=2, owners=(0, 1))


def compare(
    policies: Sequence[str], setting: Setting, *, num_ranks: int = 1, owners: Sequence[int] = (0,)
) -> None:
    by_kernels, plain = (
        outputs(policies, implementation, setting, num_ranks=num_ranks, owners=owners)
        for implementation in (InterpretedAttention, in_torch)
    )

    assert by_kernels.keys() == plain.keys()
    for call, out_THD in plain.items():
        torch.testing.assert_close(by_kernels[call], out_THD, rtol=0, atol=PACKED_ATOL)
