"""Sharded over any number of ranks, a model gives the logits of its own eager attention."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcluster.model.attention_hook import LayerAttention
from kvcluster.model.loader import LoadedModel
from kvcluster.model.probe import probe
from kvcluster.types import ModelSpec, Route
from tests.architectures import VOCAB_SIZE, tiny_models
from tests.reference_group import ReferenceGroup

PROMPT_TOKENS = 83
"""Not a multiple of any block size, and several windows long."""

DECODED_TOKENS = 9
BLOCK_SIZE = 4


class RecordingModel(LoadedModel):
    """Keeps the logits of every row that any rank computes, by position."""

    def __init__(self, architecture: str, module: PreTrainedModel) -> None:
        spec = ModelSpec(
            name=architecture,
            layers=probe(module),
            vocab_size=VOCAB_SIZE,
            max_context_tokens=512,
            eos_token_ids=(),
            dtype="float32",
            bytes_per_element=4,
            weights_digest="test",
            tokenizer_digest="",
        )
        LoadedModel.__init__(self, spec=spec, module=module, device=torch.device("cpu"))
        object.__setattr__(self, "recorded", {})

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        logit_rows_R: Tensor,
        attention: LayerAttention,
    ) -> Tensor:
        every_row = torch.arange(len(token_ids_T))
        logits_TV = LoadedModel.forward(self, token_ids_T, positions_T, every_row, attention)
        for position, logits_V in zip(positions_T.tolist(), logits_TV, strict=True):
            self.recorded[position] = logits_V.clone()
        return logits_TV[logit_rows_R]


@dataclass(frozen=True)
class Expected:
    """A prompt, what the model itself goes on with greedily, and the logits of all of it."""

    model: RecordingModel
    ids: list[int]
    logits_TV: Tensor


@cache
def expected_of(architecture: str) -> Expected:
    module = tiny_models()[architecture]()
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB_SIZE, (1, PROMPT_TOKENS))
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        for _ in range(DECODED_TOKENS):
            ids = torch.cat([ids, module(ids).logits[:, -1:].argmax(-1)], dim=1)
        logits_TV = module(ids).logits[0]
    return Expected(RecordingModel(architecture, module), ids[0].tolist(), logits_TV)


def check_sharded(architecture: str, *, num_ranks: int, chunk_tokens: int, route: Route) -> None:
    """Prefill in chunks and decode on `num_ranks` ranks; compare every logit and every token."""
    expected = expected_of(architecture)
    expected.model.recorded.clear()
    group = ReferenceGroup(expected.model, num_ranks=num_ranks, block_size=BLOCK_SIZE)
    group.start(7, expected.ids[:PROMPT_TOKENS])
    owners = [*range(num_ranks), *reversed(range(num_ranks))]
    for done in range(0, PROMPT_TOKENS, chunk_tokens):
        size = min(chunk_tokens, PROMPT_TOKENS - done)
        group.run({7: size}, owners=owners, route=route)
    for index in range(DECODED_TOKENS):
        group.run({7: 1}, owners=[(index + 1) % num_ranks])

    ours_TV = torch.stack([expected.model.recorded[i] for i in range(len(expected.ids))])
    assert_same_logits(ours_TV, expected.logits_TV)
    assert group.output(7)[:DECODED_TOKENS] == expected.ids[PROMPT_TOKENS:]


def assert_same_logits(ours_TV: Tensor, expected_TV: Tensor) -> None:
    # Float32 sums in another order: a few hundred roundings of numbers near the logits' size.
    scale = expected_TV.abs().max().item()
    torch.testing.assert_close(ours_TV, expected_TV, rtol=0, atol=scale * 2e-5)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("architecture", sorted(tiny_models()))
def test_sharded_logits_are_those_of_eager_attention(architecture: str, num_ranks: int) -> None:
    check_sharded(architecture, num_ranks=num_ranks, chunk_tokens=32, route=Route.PASS_KV)


@pytest.mark.parametrize("chunk_tokens", [8, 40, 128])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize(
    "architecture", ["deepseek_v2", "deepseek_v3", "gemma2", "gpt_oss", "llama"]
)
def test_every_route_gives_the_same_logits(
    architecture: str, route: Route, num_ranks: int, chunk_tokens: int
) -> None:
    check_sharded(architecture, num_ranks=num_ranks, chunk_tokens=chunk_tokens, route=route)
