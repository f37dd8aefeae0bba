"""Sharded over any number of ranks, tokens are kept by score as the plain definition says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcluster.attention.implementation import Implementation, implementation_for
from kvcluster.cache.store import KVStore
from kvcluster.codec.registry import STORAGE_MENU
from kvcluster.policy import parse_policy
from kvcluster.quality.retained import Reader, RetainedAttention
from kvcluster.quality.strict import ExactTokens, LayerCodecs
from kvcluster.retention.offered import SCORED
from kvcluster.retention.registry import scored_retention
from kvcluster.selection.registry import build_selection
from kvcluster.types import EXACT, Policy, Route
from tests.codec_models import (
    EVERY_STORAGE,
    LATENT,
    MIXES_HEADS,
    Served,
    calibrated_codecs,
    plain_codecs,
)
from tests.reference_group import ReferenceGroup
from tests.scripted_model import ScriptedModel, geometry, latent_geometry

MAX_TOKENS = 240
MODEL = ScriptedModel(
    geometry(),
    geometry(window=24),
    geometry(softcap=5.0),
    max_tokens=MAX_TOKENS,
)
LATENT_MODEL = ScriptedModel(latent_geometry(), latent_geometry(window=24), max_tokens=MAX_TOKENS)
SHARING_MODEL = ScriptedModel(
    geometry(),
    geometry(window=24),
    geometry(softcap=5.0, kv_layer=0),
    geometry(window=24, kv_layer=1),
    geometry(),
    geometry(kv_layer=0),
    max_tokens=MAX_TOKENS,
)
METHODS = (
    "heavy_hitters:budget=0.4,epoch=32",
    "snap:budget=0.5,recent=0.2,epoch=64,queries=20",
    "key_diversity:budget=0.3,epoch=32",
)
CODECS = (EXACT, "fp8", "int4", "int4:values=rotated3", "int3:value_group=16,windowed=exact")


ORDINARY = Served(MODEL, calibrated_codecs(MODEL.spec))
VALUES_IN_KEYS = Served(LATENT_MODEL, plain_codecs(LATENT_MODEL.spec))
SHARING = Served(SHARING_MODEL, calibrated_codecs(SHARING_MODEL.spec))


@dataclass(frozen=True)
class Serving:
    """How a sequence is cut and spread."""

    num_ranks: int
    num_prompt_tokens: int
    chunk: int
    num_decoded: int
    route: Route = Route.PASS_KV
    turn: int = 0
    """Which rank comes first."""
    exact_blocks: int = 0
    block_size: int = 16


def defined(policy: Policy, num_tokens: int, serving: Serving, subject: Served) -> list[Tensor]:
    """out_THD of each layer, in one pass over the whole sequence."""
    layers = () if policy.storage == EXACT else subject.codecs.layers(policy.storage)
    retention = scored_retention(policy.retention, serving.block_size)
    assert retention is not None
    attention = RetainedAttention(
        subject.model.spec,
        retention,
        lambda layer: LayerCodecs(*layers[layer]) if layers else None,
        exact=ExactTokens(block_size=serving.block_size, lag=serving.exact_blocks),
        selection=build_selection(policy.selection, serving.block_size),
        num_prompt_tokens=serving.num_prompt_tokens,
    )
    spec, script = subject.model.spec, subject.model.script
    found: dict[int, Tensor] = {}
    for layer in spec.storing_layers:
        _, k_TKD, v_TKD = (x[:num_tokens] for x in script[layer])
        readers = {reader: script[reader][0][:num_tokens] for reader in spec.readers_of(layer)}
        if spec.layers[layer].window is None:
            asked = {reader: Reader(q_THD) for reader, q_THD in readers.items()}
            found |= attention.attend_sharing(asked, k_TKD, v_TKD)
        else:
            for reader, q_THD in readers.items():
                found[reader] = attention.attend(reader, q_THD, k_TKD, v_TKD, None)
    return [found[layer] for layer in range(len(script))]


def chunks(epoch_tokens: int, serving: Serving) -> Sequence[int]:
    """Sizes of the prompt's chunks, none of which goes on into the next epoch."""
    sizes: list[int] = []
    while (start := sum(sizes)) < serving.num_prompt_tokens:
        ends = (start + serving.chunk, (start // epoch_tokens + 1) * epoch_tokens)
        sizes.append(min(*ends, serving.num_prompt_tokens) - start)
    return sizes


def served(
    policy: Policy,
    serving: Serving,
    subject: Served,
    implementation: Callable[[KVStore], Implementation] = implementation_for,
) -> list[Tensor]:
    model = subject.model
    model.recorded.clear()
    group = ReferenceGroup(
        model.loaded,
        num_ranks=serving.num_ranks,
        block_size=serving.block_size,
        codecs=subject.codecs,
        exact_blocks=serving.exact_blocks,
        implementation=implementation,
    )
    group.start(7, [3] * serving.num_prompt_tokens, policy)
    retention = scored_retention(policy.retention, serving.block_size)
    assert retention is not None
    ranks = [(serving.turn + rank) % serving.num_ranks for rank in range(serving.num_ranks)]
    for size in chunks(retention.epoch_tokens, serving):
        group.run({7: size}, owners=[*ranks, *reversed(ranks)], route=serving.route)
    for index in range(serving.num_decoded):
        group.run({7: 1}, owners=[ranks[index % serving.num_ranks]])
    num_tokens = serving.num_prompt_tokens + serving.num_decoded
    return [
        torch.stack([model.recorded[layer, position] for position in range(num_tokens)])
        for layer in range(len(model.script))
    ]


def check(policy: Policy, serving: Serving, subject: Served = ORDINARY) -> None:
    ours = served(policy, serving, subject)

    wanted = defined(policy, len(ours[0]), serving, subject)
    for ours_THD, defined_THD in zip(ours, wanted, strict=True):
        # Both sum float32 numbers near 1 over at most MAX_TOKENS keys, in another order.
        torch.testing.assert_close(ours_THD, defined_THD, rtol=0, atol=2e-5)


def test_every_method_is_tested() -> None:
    assert {text.split(":")[0] for text in METHODS} == {method.name for method in SCORED}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("retention", METHODS)
def test_every_method_is_served_as_it_is_defined(retention: str, codec: str) -> None:
    serving = Serving(3, num_prompt_tokens=150, chunk=48, num_decoded=30, exact_blocks=1)

    check(Policy(codec=codec, retention=retention), serving)


@pytest.mark.parametrize("codec", [EXACT, "int4", "rotated3"])
@pytest.mark.parametrize("retention", METHODS)
def test_tokens_whose_values_are_in_their_keys_are_kept_as_defined(
    retention: str, codec: str
) -> None:
    serving = Serving(3, num_prompt_tokens=150, chunk=48, num_decoded=12, exact_blocks=1)

    check(Policy(codec=codec, retention=retention), serving, VALUES_IN_KEYS)


@pytest.mark.parametrize("codec", [EXACT, "int4"])
@pytest.mark.parametrize("retention", METHODS)
def test_layers_that_share_keys_and_values_keep_tokens_by_what_all_of_them_look_at(
    retention: str, codec: str
) -> None:
    serving = Serving(3, num_prompt_tokens=150, chunk=48, num_decoded=12, exact_blocks=1)

    check(Policy(codec=codec, retention=retention), serving, SHARING)


def test_every_reader_of_shared_keys_has_a_say() -> None:
    """Without the queries of the last reader, other tokens survive."""
    serving = Serving(1, num_prompt_tokens=150, chunk=48, num_decoded=0)
    policy = Policy(retention=METHODS[0])
    deaf = ScriptedModel(*SHARING_MODEL.spec.layers, max_tokens=MAX_TOKENS)
    deaf.script[5] = (torch.zeros_like(deaf.script[5][0]), *deaf.script[5][1:])

    ours = defined(policy, 150, serving, SHARING)

    without = defined(policy, 150, serving, Served(deaf, SHARING.codecs))
    assert torch.equal(ours[0][:32], without[0][:32])
    assert not torch.allclose(ours[0][64:], without[0][64:])


@pytest.mark.parametrize("codec", LATENT[::2])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_latents_of_shared_layers_are_kept_by_what_all_of_them_look_at(
    num_ranks: int, codec: str
) -> None:
    serving = Serving(num_ranks, num_prompt_tokens=150, chunk=48, num_decoded=12)

    check(Policy(codec=codec, retention=f"{METHODS[1]},heads=shared"), serving, SHARING)


@pytest.mark.parametrize("codec", LATENT)
@pytest.mark.parametrize("retention", METHODS)
def test_latents_are_served_where_heads_share_their_tokens(retention: str, codec: str) -> None:
    serving = Serving(3, num_prompt_tokens=150, chunk=48, num_decoded=12, route=Route.GATHER)

    check(Policy(codec=codec, retention=f"{retention},heads=shared"), serving)


@pytest.mark.parametrize("retention", METHODS)
def test_one_rank_serves_as_it_is_defined(retention: str) -> None:
    serving = Serving(1, num_prompt_tokens=150, chunk=48, num_decoded=30, exact_blocks=1)
    codec = "int4"

    check(Policy(codec=codec, retention=retention), serving)


@pytest.mark.parametrize("codec", [EXACT, LATENT[2]])
@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_route_carries_survivors(num_ranks: int, route: Route, codec: str) -> None:
    serving = Serving(num_ranks, num_prompt_tokens=170, chunk=40, num_decoded=3, route=route)

    check(Policy(codec=codec, retention=f"{METHODS[0]},heads=shared"), serving)


@st.composite
def servings(draw: st.DrawFn) -> Serving:
    return Serving(
        num_ranks=draw(st.integers(1, 4)),
        num_prompt_tokens=draw(st.integers(1, 200)),
        chunk=draw(st.integers(1, 70)),
        num_decoded=draw(st.integers(0, 34)),
        route=draw(st.sampled_from(list(Route))),
        turn=draw(st.integers(0, 3)),
        exact_blocks=draw(st.sampled_from([0, 1, 3])),
        block_size=draw(st.sampled_from([8, 16, 32])),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    storage=st.sampled_from(EVERY_STORAGE),
    method=st.sampled_from([method.name for method in SCORED]),
    budget=st.sampled_from([0.05, 0.3, 0.6, 1.0]),
    recent=st.sampled_from([0.0, 0.5, 1.0]),
    heads=st.sampled_from(["own", "shared"]),
    epoch_blocks=st.integers(1, 4),
    subject=st.sampled_from([ORDINARY, SHARING]),
    serving=servings(),
)
def test_chunks_and_ranks_change_nothing(
    storage: str,
    method: str,
    budget: float,
    recent: float,
    heads: str,
    epoch_blocks: int,
    subject: Served,
    serving: Serving,
) -> None:
    epoch = epoch_blocks * serving.block_size
    heads = "shared" if storage in MIXES_HEADS else heads
    arguments = f"budget={budget},recent={recent},heads={heads},epoch={epoch}"
    if method == "snap":
        arguments += f",queries={epoch // 2}"
    kept = parse_policy(storage, STORAGE_MENU)
    check(msgspec.structs.replace(kept, retention=f"{method}:{arguments}"), serving, subject)
