"""The proof that a cluster serves: tokens generated through the whole ring, under the policy of
requests that name none.

On GPUs there are several prompts, so that kernels are compiled before somebody waits for them: for
full chunks, alone and behind a history, for prompts of one chunk, for last chunks of fewer rows,
and for a block that single tokens fill.
"""

from array import array
from typing import NamedTuple

from kvcluster.config import ClusterConfig
from kvcluster.engine.api import (
    Backend,
    CacheMode,
    Finished,
    FinishReason,
    GenerationRequest,
    TokenChunk,
)
from kvcluster.errors import RankLost
from kvcluster.types import DEFAULT_TENANT, ModelSpec, SamplingParams

_OUTPUT_TOKENS = 2


class WarmUpPrompt(NamedTuple):
    """What is generated once."""

    num_tokens: int
    max_output_tokens: int


def warm_up_prompts(
    config: ClusterConfig, spec: ModelSpec, *, with_gpus: bool
) -> tuple[WarmUpPrompt, ...]:
    """The longest one comes first: it puts rows and blocks on every rank, and `with_gpus` fills two
    chunks and some of a third, as far as the limits allow."""
    chunk, block_size = config.engine.prefill_chunk_tokens, config.cache.block_size
    room = min(spec.max_context_tokens, config.ring.num_ranks * config.cache.capacity_tokens)
    on_every_rank = 2 * config.ring.num_ranks * block_size
    longest = max(on_every_rank, config.engine.shard_min_tokens)
    if not with_gpus:
        return (_within(room, longest, _OUTPUT_TOKENS),)
    # Rows of a full block, and one behind them, because of which it may become encoded.
    outputs = max(_OUTPUT_TOKENS, min(block_size + 1, room // 2))
    return (
        _within(room, max(longest, 2 * chunk + on_every_rank), outputs),
        _within(room, chunk // 2, _OUTPUT_TOKENS),
        _within(room, chunk + chunk // 4, _OUTPUT_TOKENS),
    )


def _within(room: int, num_tokens: int, max_output_tokens: int) -> WarmUpPrompt:
    return WarmUpPrompt(max(1, min(num_tokens, room - max_output_tokens)), max_output_tokens)


async def warm_up(
    backend: Backend, config: ClusterConfig, spec: ModelSpec, *, with_gpus: bool
) -> None:
    """Generate through the whole ring. `with_gpus`: whether all ranks have one.

    Raises: RankLost when no token comes out.
    """
    for prompt in warm_up_prompts(config, spec, with_gpus=with_gpus):
        await _generate(backend, spec, prompt)


async def _generate(backend: Backend, spec: ModelSpec, prompt: WarmUpPrompt) -> None:
    opened = await backend.open(
        GenerationRequest(
            model=spec.name,
            max_output_tokens=prompt.max_output_tokens,
            sampling=SamplingParams(ignore_eos=True),
            cache_mode=CacheMode.BYPASS,
        )
    )
    # Ids that every vocabulary has; what they mean does not matter.
    ids = array("I", (index % spec.vocab_size for index in range(prompt.num_tokens)))
    await backend.append_prompt(opened.generation, opened.upload, TokenChunk(0, ids.tobytes()))
    await backend.finish_prompt(opened.generation, opened.upload)
    async for events in backend.watch(DEFAULT_TENANT, opened.generation, 0):
        last = events[-1].event
        if isinstance(last, Finished) and last.reason is not FinishReason.LENGTH:
            raise RankLost(f"the ring gave no token: {last.error_message or last.reason}")
