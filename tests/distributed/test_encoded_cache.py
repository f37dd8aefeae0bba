"""Sharded over any number of ranks, an encoded cache gives what its plain definition says."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcluster.cache.exact_region import ExactRegion
from kvcluster.codec.registry import STORAGE_MENU
from kvcluster.policy import PlugPoint, parse_policy
from kvcluster.quality.retained import RetainedAttention
from kvcluster.quality.stepwise import StepwiseAttention
from kvcluster.quality.strict import ExactTokens, LayerCodecs
from kvcluster.retention.full import FullRetention
from kvcluster.retention.offered import recent_blocks
from kvcluster.retention.window import WindowRetention
from kvcluster.types import EXACT, Policy, Route
from tests.codec_models import (
    EVERY_STORAGE,
    JOINED,
    PLAIN,
    Served,
    calibrated_codecs,
    plain_codecs,
)
from tests.reference_group import ReferenceGroup
from tests.scripted_model import ScriptedModel, geometry, latent_geometry

BLOCK_SIZE = 16
MAX_TOKENS = 240
MODEL = ScriptedModel(
    geometry(),
    geometry(window=24),
    geometry(softcap=5.0),
    geometry(window=100),
    geometry(softcap=3.0, kv_layer=0),
    geometry(window=24, kv_layer=1),
    max_tokens=MAX_TOKENS,
)
LATENT_MODEL = ScriptedModel(
    latent_geometry(), latent_geometry(window=24), geometry(), max_tokens=MAX_TOKENS
)
CODECS_OF_LATENTS = (EXACT, *PLAIN, "int4:key_group=16,scale_bits=8", "int3:windowed=exact")
"""Those that such a model can have."""


STACKED_MODEL = ScriptedModel(
    geometry(),
    geometry(),
    geometry(window=24),
    geometry(window=24),
    geometry(window=24),
    geometry(softcap=5.0),
    geometry(kv_layer=1),
    geometry(window=24, kv_layer=3),
    max_tokens=MAX_TOKENS,
)


ORDINARY = Served(MODEL, calibrated_codecs(MODEL.spec))
LATENT = Served(LATENT_MODEL, plain_codecs(LATENT_MODEL.spec))
"""Keys in which values are stored too."""

STACKED = Served(STACKED_MODEL, calibrated_codecs(STACKED_MODEL.spec))
"""Neighbouring layers of one shape: two in one KV group, three in another, and one by itself."""


@dataclass(frozen=True)
class Serving:
    """How a sequence is cut and spread."""

    num_ranks: int
    chunks: tuple[int, ...]
    num_decoded: int
    route: Route = Route.PASS_KV
    turn: int = 0
    """Which rank comes first."""
    exact_blocks: int = 0
    block_size: int = BLOCK_SIZE


def defined(policy: Policy, num_tokens: int, serving: Serving, subject: Served) -> list[Tensor]:
    """out_THD of each layer, in one pass over the whole sequence."""
    model = subject.model
    step = subject.codecs.encoded_step(policy.storage, serving.exact_blocks)
    if step is not None:
        return defined_in_steps(policy, num_tokens, serving, subject)
    layers = () if policy.storage == EXACT else subject.codecs.layers(policy.storage)
    block_size = serving.block_size
    recent = recent_blocks(policy.retention, block_size)
    attention = RetainedAttention(
        model.spec,
        FullRetention()
        if recent is None
        else WindowRetention(recent=recent * block_size, block_size=block_size),
        lambda layer: LayerCodecs(*layers[layer]) if layers else None,
        exact=ExactTokens(block_size=block_size, lag=serving.exact_blocks),
    )
    return [
        attention.attend(layer, *(x[:num_tokens] for x in qkv), None)
        for layer, qkv in enumerate(model.script)
    ]


def defined_in_steps(
    policy: Policy, num_tokens: int, serving: Serving, subject: Served
) -> list[Tensor]:
    """The same of layers that are written together, one step's rows after the other's."""
    model, size = subject.model, serving.block_size
    attention = StepwiseAttention(
        model.spec,
        [LayerCodecs(*layer) for layer in subject.codecs.layers(policy.storage)],
        ExactRegion(
            serving.exact_blocks,
            subject.codecs.encoded_step(policy.storage, serving.exact_blocks),
        ),
        block_size=size,
        recent_blocks=recent_blocks(policy.retention, size),
    )
    runs = [
        [
            attention.attend(layer, *(x[rows] for x in qkv), None)
            for layer, qkv in enumerate(model.script)
        ]
        for rows in torch.arange(num_tokens).split(attention.run_tokens)
    ]
    return [torch.cat(of_layer) for of_layer in zip(*runs, strict=True)]


def cut_at_steps(chunks: Sequence[int], step_tokens: int) -> list[int]:
    """The chunks, cut where a step ends."""
    ends = {sum(chunks[: place + 1]) for place in range(len(chunks))}
    ends |= set(range(step_tokens, sum(chunks), step_tokens))
    return [end - start for start, end in pairwise([0, *sorted(ends)])]


def served(policy: Policy, serving: Serving, subject: Served) -> list[Tensor]:
    model = subject.model
    model.recorded.clear()
    group = ReferenceGroup(
        model.loaded,
        num_ranks=serving.num_ranks,
        block_size=serving.block_size,
        codecs=subject.codecs,
        exact_blocks=serving.exact_blocks,
    )
    group.start(7, [3] * sum(serving.chunks), policy)
    ranks = [(serving.turn + rank) % serving.num_ranks for rank in range(serving.num_ranks)]
    step = subject.codecs.encoded_step(policy.storage, serving.exact_blocks)
    chunks: Sequence[int] = serving.chunks
    if step is not None:
        chunks = cut_at_steps(chunks, step * serving.block_size)
    for size in chunks:
        group.run({7: size}, owners=[*ranks, *reversed(ranks)], route=serving.route)
    for index in range(serving.num_decoded):
        group.run({7: 1}, owners=[ranks[index % serving.num_ranks]])
    num_tokens = sum(serving.chunks) + serving.num_decoded
    return [
        torch.stack([model.recorded[layer, position] for position in range(num_tokens)])
        for layer in range(len(model.script))
    ]


def check(policy: Policy, serving: Serving, subject: Served = ORDINARY) -> None:
    ours = served(policy, serving, subject)

    expected = defined(policy, len(ours[0]), serving, subject)
    for ours_THD, defined_THD in zip(ours, expected, strict=True):
        # Both sum float32 numbers near 1 over at most MAX_TOKENS keys, in another order.
        torch.testing.assert_close(ours_THD, defined_THD, rtol=0, atol=2e-5)


def test_every_codec_and_every_way_to_share_is_tested() -> None:
    storages = [parse_policy(storage, STORAGE_MENU) for storage in EVERY_STORAGE]

    for plug_point, of_storage in (
        (PlugPoint.CODEC, [storage.codec for storage in storages]),
        (PlugPoint.SHARING, [storage.sharing for storage in storages]),
    ):
        offered = {method.name for method in STORAGE_MENU.at(plug_point)}
        assert {text.split(":")[0] for text in of_storage} == offered


@pytest.mark.parametrize("storage", EVERY_STORAGE)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_codec_is_served_as_it_is_defined(storage: str, num_ranks: int) -> None:
    serving = Serving(num_ranks=num_ranks, chunks=(64, 70, 16), num_decoded=20, exact_blocks=1)

    check(parse_policy(storage, STORAGE_MENU), serving)


@pytest.mark.parametrize("codec", CODECS_OF_LATENTS)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_codec_of_latents_is_served_as_it_is_defined(codec: str, num_ranks: int) -> None:
    serving = Serving(num_ranks=num_ranks, chunks=(64, 70, 16), num_decoded=20, exact_blocks=1)

    check(Policy(codec=codec), serving, LATENT)


@pytest.mark.parametrize("codec", JOINED)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_latent_of_several_layers_is_served_as_it_is_defined(
    codec: str, num_ranks: int
) -> None:
    serving = Serving(num_ranks=num_ranks, chunks=(64, 70, 16), num_decoded=20, exact_blocks=2)

    check(Policy(codec=codec), serving, STACKED)


@pytest.mark.parametrize("recent_tokens", [16, 48])
@pytest.mark.parametrize("codec", [EXACT, "int4", "latent:r=0.5,bits=4"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_window_is_served_as_it_is_defined(
    num_ranks: int, codec: str, recent_tokens: int
) -> None:
    policy = Policy(codec=codec, retention=f"window:recent={recent_tokens}")

    check(policy, Serving(num_ranks=num_ranks, chunks=(64, 80, 22), num_decoded=20))


@pytest.mark.parametrize("policy", [Policy(codec="int4"), Policy(retention="window:recent=32")])
@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_route_carries_what_is_kept(route: Route, num_ranks: int, policy: Policy) -> None:
    serving = Serving(num_ranks, chunks=(48, 32, 80), num_decoded=3, route=route, exact_blocks=1)

    check(policy, serving)


@st.composite
def servings(draw: st.DrawFn) -> Serving:
    """Chunks end anywhere."""
    num_tokens = draw(st.integers(1, 200))
    chunks: list[int] = []
    while sum(chunks) < num_tokens:
        chunks.append(draw(st.integers(1, num_tokens - sum(chunks))))
    return Serving(
        num_ranks=draw(st.integers(1, 4)),
        chunks=tuple(chunks),
        num_decoded=draw(st.integers(0, 18)),
        route=draw(st.sampled_from(list(Route))),
        turn=draw(st.integers(0, 3)),
        exact_blocks=draw(st.sampled_from([0, 1, 1, 3])),
        block_size=draw(st.sampled_from([8, 16, 32])),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    storage=st.sampled_from(EVERY_STORAGE),
    retention=st.sampled_from(["full", "full", "window:recent=32", "window:recent=64"]),
    serving=servings(),
)
def test_chunks_and_ranks_change_nothing(storage: str, retention: str, serving: Serving) -> None:
    kept = parse_policy(storage, STORAGE_MENU)
    check(msgspec.structs.replace(kept, retention=retention), serving)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    codec=st.sampled_from(CODECS_OF_LATENTS),
    retention=st.sampled_from(["full", "full", "window:recent=32", "window:recent=64"]),
    serving=servings(),
)
def test_chunks_and_ranks_change_nothing_in_latents(
    codec: str, retention: str, serving: Serving
) -> None:
    check(Policy(codec=codec, retention=retention), serving, LATENT)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    codec=st.sampled_from(JOINED),
    retention=st.sampled_from(["full", "full", "window:recent=32", "window:recent=64"]),
    serving=servings(),
)
def test_chunks_and_ranks_change_nothing_in_latents_of_several_layers(
    codec: str, retention: str, serving: Serving
) -> None:
    """Chunks are cut where a step of the codec ends, as the engine cuts them."""
    check(Policy(codec=codec, retention=retention), serving, STACKED)
