"""The proof that a cluster serves: a token generated through the whole ring.

On GPUs the prompt also has kernels compiled for full chunks, alone and behind a history, so that
the first long prompt does not wait some seconds for that.
"""

from array import array

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


def warm_up_tokens(config: ClusterConfig, spec: ModelSpec, *, with_gpus: bool) -> int:
    """Prompt tokens that put rows and blocks on every rank, and `with_gpus` fill two chunks and
    some of a third, as far as the limits allow."""
    on_every_rank = 2 * config.ring.num_ranks * config.cache.block_size
    wanted = max(on_every_rank, config.engine.shard_min_tokens)
    if with_gpus:
        wanted = max(wanted, 2 * config.engine.prefill_chunk_tokens + on_every_rank)
    held = config.ring.num_ranks * config.cache.capacity_tokens
    return max(1, min(wanted, spec.max_context_tokens - _OUTPUT_TOKENS, held - _OUTPUT_TOKENS))


async def warm_up(
    backend: Backend, config: ClusterConfig, spec: ModelSpec, *, with_gpus: bool
) -> None:
    """Generate through the whole ring. `with_gpus`: whether all ranks have one.

    Raises: RankLost when no token comes out.
    """
    opened = await backend.open(
        GenerationRequest(
            model=spec.name,
            max_output_tokens=_OUTPUT_TOKENS,
            sampling=SamplingParams(ignore_eos=True),
            cache_mode=CacheMode.BYPASS,
        )
    )
    # Ids that every vocabulary has; what they mean does not matter.
    num_tokens = warm_up_tokens(config, spec, with_gpus=with_gpus)
    ids = array("I", (index % spec.vocab_size for index in range(num_tokens)))
    await backend.append_prompt(opened.generation, opened.upload, TokenChunk(0, ids.tobytes()))
    await backend.finish_prompt(opened.generation, opened.upload)
    async for events in backend.watch(DEFAULT_TENANT, opened.generation, 0):
        last = events[-1].event
        if isinstance(last, Finished) and last.reason is not FinishReason.LENGTH:
            raise RankLost(f"the ring gave no token: {last.error_message or last.reason}")
