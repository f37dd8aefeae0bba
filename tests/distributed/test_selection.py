"""Sharded over any number of ranks, what a policy selects is what its plain definition selects."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvcluster.quality.retained import RetainedAttention
from kvcluster.quality.strict import ExactTokens, LayerCodecs
from kvcluster.retention.full import FullRetention
from kvcluster.retention.offered import recent_blocks
from kvcluster.retention.window import WindowRetention
from kvcluster.selection.registry import METHODS, build_selection
from kvcluster.types import EXACT, Policy, Route
from tests.codec_models import calibrated_codecs
from tests.reference_group import ReferenceGroup
from tests.scripted_model import ScriptedModel, geometry

MAX_TOKENS = 240
MODEL = ScriptedModel(
    geometry(),
    geometry(window=24),
    geometry(softcap=5.0),
    max_tokens=MAX_TOKENS,
)
MODEL_CODECS = calibrated_codecs(MODEL.spec)
SELECTIONS = (
    "block_sparse:local=2,stride=3",
    "block_sparse:local=1,sinks=0,random=2,seed=3",
    "estimated:share=40%,local=1",
    "estimated:share=0.3,sinks=0,local=1,by=bound",
    "quest:tokens=96,sinks=0,local=1",
    "quest:tokens=96",
)
EVERYTHING = ("block_sparse:local=100", "estimated:share=1", "quest:tokens=9600")


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


def defined(policy: Policy, serving: Serving) -> list[Tensor]:
    """out_THD of each layer, in one pass over the whole sequence."""
    layers = () if policy.codec == EXACT else MODEL_CODECS.layers(policy.codec)
    size = serving.block_size
    recent = recent_blocks(policy.retention, size)
    attention = RetainedAttention(
        MODEL.spec,
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
        for layer, qkv in enumerate(MODEL.script)
    ]


def recorded(num_tokens: int) -> list[Tensor]:
    return [
        torch.stack([MODEL.recorded[layer, position] for position in range(num_tokens)])
        for layer in range(len(MODEL.script))
    ]


def new_group(serving: Serving) -> ReferenceGroup:
    MODEL.recorded.clear()
    return ReferenceGroup(
        MODEL.loaded,
        num_ranks=serving.num_ranks,
        block_size=serving.block_size,
        codecs=MODEL_CODECS,
        exact_blocks=serving.exact_blocks,
    )


def served(policy: Policy, serving: Serving) -> list[Tensor]:
    group = new_group(serving)
    group.start(7, [3] * serving.num_prompt_tokens, policy)
    ranks = [(serving.turn + rank) % serving.num_ranks for rank in range(serving.num_ranks)]
    for size in serving.chunks:
        group.run({7: size}, owners=[*ranks, *reversed(ranks)], route=serving.route)
    for index in range(serving.num_decoded):
        group.run({7: 1}, owners=[ranks[index % serving.num_ranks]])
    return recorded(serving.num_tokens)


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
    serving = Serving(num_ranks, chunks=(64, 80, 22), num_decoded=40, exact_blocks=1)

    ours = served(policy, serving)

    check(ours, defined(policy, serving))
    # And it selects: most rows differ from those that read everything.
    full_THD = defined(Policy(codec=codec), serving)[0]
    assert float((ours[0][-20:] - full_THD[-20:]).abs().amax(dim=(1, 2)).min()) > 1e-3


def test_every_method_is_tested() -> None:
    assert {selection.split(":")[0] for selection in SELECTIONS} == METHODS.keys()
