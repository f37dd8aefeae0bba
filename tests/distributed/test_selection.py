"""Sharded over any number of ranks, what a policy selects is what its plain definition selects."""

from dataclasses import dataclass

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcluster.codec.registry import STORAGE_MENU
from kvcluster.policy import parse_policy
from kvcluster.quality.retained import RetainedAttention
from kvcluster.quality.strict import ExactTokens, LayerCodecs
from kvcluster.retention.full import FullRetention
from kvcluster.retention.offered import recent_blocks
from kvcluster.retention.window import WindowRetention
from kvcluster.selection.registry import METHODS, build_selection
from kvcluster.types import EXACT, Policy, Route
from tests.codec_models import EVERY_STORAGE, Served, calibrated_codecs, plain_codecs
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
SHARING_MODEL = ScriptedModel(geometry(), geometry(kv_layer=0), max_tokens=MAX_TOKENS)
SELECTIONS = (
    "block_sparse:local=2,stride=3",
    "block_sparse:local=1,sinks=0,random=2,seed=3",
    "estimated:share=40%,local=1",
    "estimated:share=0.3,sinks=0,local=1,by=bound",
    "quest:tokens=96,sinks=0,local=1",
    "quest:tokens=96",
)
EVERYTHING = ("block_sparse:local=1,stride=1", "estimated:share=99.9%")
"""Neither says beforehand that it reads all blocks."""
COVERING = ("block_sparse:local=12", "estimated:share=1", "quest:tokens=192")


@dataclass(frozen=True)
class Serving:
    """How a sequence is cut and spread."""

    num_ranks: int
    chunks: tuple[int, ...]
    """Of the prompt: all but the last one are whole blocks, as the engine's are."""
    num_decoded: int
    route: Route = Route.PASS_KV
    turn: int = 0
    """Which rank comes first."""
    exact_blocks: int = 0
    block_size: int = 16

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.chunks)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_decoded


ORDINARY = Served(MODEL, calibrated_codecs(MODEL.spec))
OTHERS = {
    "values in keys": Served(LATENT_MODEL, plain_codecs(LATENT_MODEL.spec)),
    "a layer that reads another's": Served(SHARING_MODEL, plain_codecs(SHARING_MODEL.spec)),
}


def defined(policy: Policy, serving: Serving, subject: Served = ORDINARY) -> list[Tensor]:
    """out_THD of each layer, in one pass over the whole sequence."""
    layers = () if policy.storage == EXACT else subject.codecs.layers(policy.storage)
    size = serving.block_size
    recent = recent_blocks(policy.retention, size)
    attention = RetainedAttention(
        subject.model.spec,
        FullRetention()
        if recent is None
        else WindowRetention(recent=recent * size, block_size=size),
        lambda layer: LayerCodecs(*layers[layer]) if layers else None,
        exact=ExactTokens(block_size=size, lag=serving.exact_blocks),
        selection=build_selection(policy.selection, size),
        num_prompt_tokens=serving.num_prompt_tokens,
    )
    return [
        attention.attend(layer, *(x[: serving.num_tokens] for x in qkv), None)
        for layer, qkv in enumerate(subject.model.script)
    ]


def recorded(num_tokens: int, model: ScriptedModel = MODEL) -> list[Tensor]:
    return [
        torch.stack([model.recorded[layer, position] for position in range(num_tokens)])
        for layer in range(len(model.script))
    ]


def new_group(serving: Serving, subject: Served = ORDINARY) -> ReferenceGroup:
    subject.model.recorded.clear()
    return ReferenceGroup(
        subject.model.loaded,
        num_ranks=serving.num_ranks,
        block_size=serving.block_size,
        codecs=subject.codecs,
        exact_blocks=serving.exact_blocks,
    )


def served(policy: Policy, serving: Serving, subject: Served = ORDINARY) -> list[Tensor]:
    group = new_group(serving, subject)
    group.start(7, [3] * serving.num_prompt_tokens, policy)
    ranks = [(serving.turn + rank) % serving.num_ranks for rank in range(serving.num_ranks)]
    for size in serving.chunks:
        group.run({7: size}, owners=[*ranks, *reversed(ranks)], route=serving.route)
    for index in range(serving.num_decoded):
        group.run({7: 1}, owners=[ranks[index % serving.num_ranks]])
    return recorded(serving.num_tokens, subject.model)


def check(ours: list[Tensor], wanted: list[Tensor]) -> None:
    for ours_THD, wanted_THD in zip(ours, wanted, strict=True):
        # Both sum float32 numbers near 1 over at most MAX_TOKENS keys, in another order.
        torch.testing.assert_close(ours_THD, wanted_THD, rtol=0, atol=2e-5)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("codec", [EXACT, "int4"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_selection_is_served_as_it_is_defined(
    num_ranks: int, codec: str, selection: str
) -> None:
    policy = Policy(codec=codec, selection=selection)
    serving = Serving(num_ranks, chunks=(64, 80, 22), num_decoded=20, exact_blocks=1)

    ours = served(policy, serving)

    check(ours, defined(policy, serving))
    # And it selects: most rows differ from those that read everything.
    full_THD = defined(Policy(codec=codec), serving)[0]
    assert float((ours[0][-16:] - full_THD[-16:]).abs().amax(dim=(1, 2)).min()) > 1e-3


@pytest.mark.parametrize("subject", OTHERS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("codec", [EXACT, "int4"])
def test_other_ways_to_hold_keys_and_values_are_served_as_defined(
    codec: str, selection: str, subject: str
) -> None:
    policy = Policy(codec=codec, selection=selection)
    serving = Serving(3, chunks=(64, 80, 22), num_decoded=20, exact_blocks=1)

    ours = served(policy, serving, OTHERS[subject])

    check(ours, defined(policy, serving, OTHERS[subject]))


def test_every_method_is_tested() -> None:
    assert {selection.split(":")[0] for selection in SELECTIONS} == METHODS.keys()


@pytest.mark.parametrize("selection", EVERYTHING)
@pytest.mark.parametrize("codec", [EXACT, "int4"])
def test_a_selection_of_everything_changes_nothing(codec: str, selection: str) -> None:
    serving = Serving(3, chunks=(64, 80, 22), num_decoded=4, exact_blocks=1)

    ours = served(Policy(codec=codec, selection=selection), serving)

    check(ours, served(Policy(codec=codec), serving))


@pytest.mark.parametrize("selection", COVERING)
def test_a_sequence_that_is_read_whole_is_served_like_any_other(selection: str) -> None:
    serving = Serving(3, chunks=(64, 80, 22), num_decoded=4)

    ours = served(Policy(selection=selection), serving)

    assert all(map(torch.equal, ours, served(Policy(), serving)))


@pytest.mark.parametrize("selection", SELECTIONS[1::2])
@pytest.mark.parametrize("recent_tokens", [16, 64])
def test_a_selection_is_of_what_a_window_kept(recent_tokens: int, selection: str) -> None:
    policy = Policy(codec="int4", retention=f"window:recent={recent_tokens}", selection=selection)
    serving = Serving(3, chunks=(64, 80, 22), num_decoded=12)

    check(served(policy, serving), defined(policy, serving))


@pytest.mark.parametrize("selection", SELECTIONS[::2])
@pytest.mark.parametrize("route", list(Route))
def test_the_route_changes_nothing(route: Route, selection: str) -> None:
    policy = Policy(codec="int4", selection=selection)
    serving = Serving(2, chunks=(48, 32, 80), num_decoded=3, route=route, exact_blocks=1)

    check(served(policy, serving), defined(policy, serving))


@pytest.mark.parametrize("selection", SELECTIONS[1::2])
def test_output_that_is_computed_again_reads_what_it_read(selection: str) -> None:
    """As after a preemption: what was decoded row by row is now part of a prefill."""
    policy = Policy(codec="int4", selection=selection)
    serving = Serving(2, chunks=(64, 26), num_decoded=80)
    group = new_group(serving)
    group.start(7, [3] * serving.num_prompt_tokens, policy, output=[5] * 75)
    for size in (80, 64, 21):
        group.run({7: size}, owners=[1, 0])
    for _ in range(5):
        group.run({7: 1}, owners=[0])

    check(recorded(serving.num_tokens), defined(policy, serving))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_decoded_row_reads_no_other_blocks(num_ranks: int) -> None:
    """Row 176, in block 11, reads that and those 3, 6 and 9 before it, and the first one."""
    policy = Policy(selection="block_sparse:local=1,stride=3")
    serving = Serving(num_ranks, chunks=(176,), num_decoded=1)
    wanted = [out_THD[176:] for out_THD in defined(policy, serving)]
    group = new_group(serving)
    group.start(7, [3] * 176, policy)
    group.run({7: 176}, owners=range(num_ranks))

    group.poison(7, [1, 3, 4, 6, 7])
    group.run({7: 1}, owners=[0])

    # Layer 1 has a window of its own, which begins in block 9.
    check([MODEL.recorded[layer, 176][None] for layer in range(3)], wanted)


@st.composite
def servings(draw: st.DrawFn) -> Serving:
    """Chunks end with blocks, the last one anywhere."""
    size = draw(st.sampled_from([8, 16, 32]))
    num_tokens = draw(st.integers(1, 200))
    chunks: list[int] = []
    while num_tokens - sum(chunks) > size and draw(st.booleans()):
        blocks = draw(st.integers(1, (num_tokens - sum(chunks) - 1) // size))
        chunks.append(blocks * size)
    return Serving(
        num_ranks=draw(st.integers(1, 4)),
        chunks=(*chunks, num_tokens - sum(chunks)),
        num_decoded=draw(st.integers(0, 18)),
        route=draw(st.sampled_from(list(Route))),
        turn=draw(st.integers(0, 3)),
        exact_blocks=draw(st.sampled_from([0, 1, 1, 3])),
        block_size=size,
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    storage=st.sampled_from(EVERY_STORAGE),
    retention=st.sampled_from(["full", "full", "window:recent=32", "window:recent=64"]),
    selection=st.sampled_from(SELECTIONS),
    serving=servings(),
)
def test_chunks_and_ranks_change_nothing(
    storage: str, retention: str, selection: str, serving: Serving
) -> None:
    policy = msgspec.structs.replace(
        parse_policy(storage, STORAGE_MENU), retention=retention, selection=selection
    )

    check(served(policy, serving), defined(policy, serving))
