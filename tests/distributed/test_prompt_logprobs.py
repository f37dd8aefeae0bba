"""Log probabilities of a prompt are those of the model's own forward pass, wherever it is cut."""

from functools import cache

import pytest
import torch

from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.engine.api import Event, GenerationRequest, Output, PromptScores
from kvcluster.engine.service import EngineService
from kvcluster.types import SamplingParams
from tests.architectures import VOCAB_SIZE, tiny_models
from tests.served_model import served_model
from tests.thread_executor import hear, running_engine

PROMPT = torch.randint(3, VOCAB_SIZE, (150,), generator=torch.Generator().manual_seed(7)).tolist()


@cache
def expected() -> torch.Tensor:
    """logprobs_RV of the tokens after each but the last."""
    module = tiny_models()["gemma2"]()
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: torch.Tensor = module(torch.tensor([PROMPT])).logits[0, :-1]
    return logits.float().log_softmax(dim=-1)


def config(num_ranks: int, chunk_tokens: int) -> ClusterConfig:
    return ClusterConfig(
        model="tiny",
        cache=CacheConfig(block_size=16, capacity_tokens=4096),
        engine=EngineConfig(prefill_chunk_tokens=chunk_tokens, shard_min_tokens=32),
        ring=RingConfig(num_ranks=num_ranks),
    )


async def score(service: EngineService, prompt: list[int], **params: int) -> list[Event]:
    opened = await service.open(
        GenerationRequest(model="tiny", max_output_tokens=2, sampling=SamplingParams(**params))
    )
    return await hear(service, opened, prompt)


def scores_of(events: list[Event]) -> list[PromptScores]:
    return [event for event in events if isinstance(event, PromptScores)]


@pytest.mark.parametrize(("num_ranks", "chunk_tokens"), [(1, 16), (1, 200), (2, 48), (3, 64)])
async def test_every_prompt_token_but_the_first_is_scored(
    num_ranks: int, chunk_tokens: int
) -> None:
    async with running_engine(served_model(), config(num_ranks, chunk_tokens)) as (service, _):
        scores = scores_of(await score(service, PROMPT, prompt_logprobs=2))

    assert [event.first for event in scores] == [
        1 + sum(len(earlier.logprobs) for earlier in scores[:index]) for index in range(len(scores))
    ]
    found_R = torch.tensor([logprob for event in scores for logprob in event.logprobs])
    expected_R = expected()[torch.arange(149), torch.tensor(PROMPT[1:])]
    torch.testing.assert_close(found_R, expected_R, rtol=1e-4, atol=1e-4)
    top = [token_id for event in scores for token_id in event.top_token_ids]
    assert top[::2] == expected().argmax(dim=-1).tolist()
    assert sum(len(event.top_logprobs) for event in scores) == 2 * 149


async def test_scores_come_before_the_output_and_change_nothing_of_it() -> None:
    async with running_engine(served_model(), config(2, 48)) as (service, _):
        scored = await score(service, PROMPT, prompt_logprobs=0)
        plain = await score(service, PROMPT)

    first_output = next(index for index, event in enumerate(scored) if isinstance(event, Output))
    assert not scores_of(scored[first_output:])
    assert all(not event.top_token_ids for event in scores_of(scored))
    assert [event for event in scored if isinstance(event, Output)] == [
        event for event in plain if isinstance(event, Output)
    ]
    assert not scores_of(plain)


async def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    async with running_engine(served_model(), config(1, 16)) as (service, _):
        events = await score(service, PROMPT[:1], prompt_logprobs=0)

    assert not scores_of(events)
