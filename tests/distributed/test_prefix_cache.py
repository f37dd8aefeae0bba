"""A prompt that begins with kept blocks gives the tokens that it gives when all is computed."""

import pytest
import torch

from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.engine.api import CacheMode, Finished, GenerationRequest, Output, Usage
from kvcluster.engine.service import EngineService
from kvcluster.types import SamplingParams
from tests.architectures import VOCAB_SIZE
from tests.served_model import served_model
from tests.thread_executor import hear, running_engine

BLOCK_SIZE = 16
PROMPT = torch.randint(3, VOCAB_SIZE, (134,), generator=torch.Generator().manual_seed(1)).tolist()
TURN = torch.randint(3, VOCAB_SIZE, (21,), generator=torch.Generator().manual_seed(2)).tolist()


def config(num_ranks: int) -> ClusterConfig:
    return ClusterConfig(
        model="tiny",
        cache=CacheConfig(block_size=BLOCK_SIZE, capacity_tokens=4096, exact_recent_tokens=20),
        engine=EngineConfig(prefill_chunk_tokens=64, shard_min_tokens=32),
        ring=RingConfig(num_ranks=num_ranks),
    )


async def generate(
    service: EngineService,
    prompt: list[int],
    policy: str,
    mode: CacheMode = CacheMode.READ_WRITE,
    sampling: SamplingParams | None = None,
) -> tuple[list[int], Usage]:
    request = GenerationRequest(
        model="tiny",
        max_output_tokens=12,
        policy=policy,
        cache_mode=mode,
        sampling=sampling or SamplingParams(),
    )
    heard = await hear(service, await service.open(request), prompt)
    output = [id_ for event in heard if isinstance(event, Output) for id_ in event.token_ids]
    finished = heard[-1]
    assert isinstance(finished, Finished)
    return output, finished.usage


@pytest.mark.parametrize(
    ("architecture", "policy", "num_ranks"),
    [
        *(("llama", policy, ranks) for policy in ("exact", "int4") for ranks in (1, 2, 3, 4)),
        ("llama", "int4 + window:recent=64", 2),
        ("gemma2", "exact", 3),
        ("gemma2", "int4", 3),
    ],
)
async def test_a_conversation_goes_on_from_kept_blocks_as_if_it_were_computed(
    architecture: str, policy: str, num_ranks: int
) -> None:
    model = served_model(architecture)
    async with running_engine(model, config(num_ranks)) as (service, _):
        answer, first = await generate(service, PROMPT, policy)
        again, second = await generate(service, PROMPT, policy)
        turn = [*PROMPT, *answer, *TURN]
        found, third = await generate(service, turn, policy)
        expected, computed = await generate(service, turn, policy, CacheMode.BYPASS)

    assert (first.cached_input_tokens, second.cached_input_tokens) == (0, 128)
    assert again == answer
    # 145 tokens were fed to the model.
    assert (third.cached_input_tokens, computed.cached_input_tokens) == (144, 0)
    assert found == expected


async def test_penalties_count_the_tokens_of_kept_blocks() -> None:
    sampling = SamplingParams(repetition_penalty=1.6, frequency_penalty=0.5)
    async with running_engine(served_model("llama"), config(2)) as (service, _):
        await generate(service, PROMPT, "exact")
        found, usage = await generate(service, PROMPT, "exact", sampling=sampling)
        expected, _ = await generate(service, PROMPT, "exact", CacheMode.BYPASS, sampling)
        without, _ = await generate(service, PROMPT, "exact")

    assert usage.cached_input_tokens == 128
    assert found == expected != without
