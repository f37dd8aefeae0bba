"""What fails in one sequence's cache, on any rank, ends that sequence: neighbours in the same steps
get the tokens that they get alone, and nothing of the failed one is left."""

import asyncio
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kvcluster.attention.encoding import BlockEncoding
from kvcluster.attention.selected import SelectedAttention
from kvcluster.attention.survivor_choice import SurvivorChoice
from kvcluster.cache.store import KVStore
from kvcluster.cluster import runner, spilling
from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.engine.api import (
    CacheMode,
    Finished,
    FinishReason,
    GenerationRequest,
    Output,
    TokenChunk,
)
from kvcluster.engine.context_api import ContextRequest
from kvcluster.engine.plan import StepPlan
from kvcluster.engine.service import EngineService
from kvcluster.errors import ComputationFailed, ContextNotReady
from kvcluster.types import DEFAULT_TENANT, EXACT, SamplingParams
from tests.architectures import VOCAB_SIZE
from tests.distributed.stored_contexts import stored, stored_config
from tests.served_model import served_model
from tests.thread_executor import hear, running_engine

BLOCK_SIZE = 16
PROMPT_TOKENS = 100
OUTPUT_TOKENS = 20
NEIGHBOURS = ("int8", "heavy_hitters:budget=0.3,epoch=32", "quest:tokens=48")
SECRET = "what the cache holds"


class Heard(list[int]):
    """The tokens of a generation, and how it ended."""

    finished: Finished


def config(num_ranks: int, *, prefix_cache: bool = False) -> ClusterConfig:
    return ClusterConfig(
        model="tiny",
        cache=CacheConfig(
            block_size=BLOCK_SIZE,
            capacity_tokens=4096,
            exact_recent_tokens=20,
            prefix_cache=prefix_cache,
        ),
        engine=EngineConfig(prefill_chunk_tokens=64, shard_min_tokens=32),
        ring=RingConfig(num_ranks=num_ranks),
    )


async def generate(
    service: EngineService,
    policy: str,
    seed: int,
    *,
    sampling: SamplingParams | None = None,
    mode: CacheMode = CacheMode.READ_WRITE,
) -> Heard:
    opened = await service.open(
        GenerationRequest(
            model="tiny",
            max_output_tokens=OUTPUT_TOKENS,
            policy=policy,
            sampling=sampling or SamplingParams(),
            cache_mode=mode,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, VOCAB_SIZE, (PROMPT_TOKENS,), generator=generator).tolist()
    events = await hear(service, opened, prompt)
    heard = Heard(id_ for event in events if isinstance(event, Output) for id_ in event.token_ids)
    assert isinstance(events[-1], Finished)
    heard.finished = events[-1]
    return heard


class Fault:
    """Raises in calls on one rank's store, from the `after`-th on."""

    def __init__(self, store: KVStore, after: int) -> None:
        self.store = store
        self.left = after
        self.num_raised = 0

    def strike(self, store: object) -> None:
        if store is self.store:
            self.left -= 1
            if self.left < 0:
                self.num_raised += 1
                raise ValueError(SECRET)


Sabotage = Callable[[Fault], AbstractContextManager[Any]]


def encoding(fault: Fault) -> AbstractContextManager[Any]:
    """Blocks of int4 become encoded."""
    encode = BlockEncoding._encode

    def failing(self: BlockEncoding, layers: Any, part: Any, full: Any) -> None:
        if part.codec.startswith("int4"):
            fault.strike(self._store)
        encode(self, layers, part, full)

    return patch.object(BlockEncoding, "_encode", failing)


def halfway(fault: Fault) -> AbstractContextManager[Any]:
    """Blocks of int4 have been written, and spoilt."""
    encode = KVStore.encode_together

    def failing(
        self: KVStore, layers: Any, codec: str, ids_B: Any, *rest: Any, **more: Any
    ) -> None:
        encode(self, layers, codec, ids_B, *rest, **more)
        if codec.startswith("int4"):
            fault.strike(self)

    return patch.object(KVStore, "encode_together", failing)


def decoding(fault: Fault) -> AbstractContextManager[Any]:
    """Blocks of int4 are read."""
    decode = KVStore.read_encoded

    def failing(self: KVStore, layer: int, codec: str, ids_B: Any) -> Any:
        if codec.startswith("int4"):
            fault.strike(self)
        return decode(self, layer, codec, ids_B)

    return patch.object(KVStore, "read_encoded", failing)


def compaction(fault: Fault) -> AbstractContextManager[Any]:
    """Survivors of int4 are moved to their place."""
    write = SurvivorChoice._write

    def failing(self: SurvivorChoice, layer: int, part: Any, *rest: Any) -> Any:
        if part.part.codec.startswith("int4"):
            fault.strike(self._store)
        return write(self, layer, part, *rest)

    return patch.object(SurvivorChoice, "_write", failing)


def scoring(fault: Fault) -> AbstractContextManager[Any]:
    """Blocks are compared with the rows of int4."""
    scores = SelectedAttention._scores

    def failing(self: SelectedAttention, geometry: Any, part: Any, *rest: Any) -> Any:
        if part.part.codec.startswith("int4"):
            fault.strike(self._store)
        return scores(self, geometry, part, *rest)

    return patch.object(SelectedAttention, "_scores", failing)


def picking(fault: Fault) -> AbstractContextManager[Any]:
    """Rows of int4 read the blocks that they picked."""
    read = SelectedAttention._read

    def failing(self: SelectedAttention, layer: int, part: Any, *rest: Any) -> Any:
        if part.part.codec.startswith("int4"):
            fault.strike(self._store)
        return read(self, layer, part, *rest)

    return patch.object(SelectedAttention, "_read", failing)


FAULTS: dict[str, tuple[Sabotage, str, str]] = {
    "encoding": (encoding, "int4", "encoding blocks"),
    "halfway": (halfway, "int4", "encoding blocks"),
    "decoding": (decoding, "int4", "reading the cache"),
    "survivors": (
        compaction,
        "int4 + heavy_hitters:budget=0.5,epoch=32",
        "choosing what to keep",
    ),
    "scoring": (scoring, "int4 + quest:tokens=48", "choosing what to read"),
    "picking": (picking, "int4 + estimated:share=0.4", "choosing what to read"),
}


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(("num_ranks", "failing_rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_of_one_policy_on_one_rank_ends_its_request_alone(
    name: str, num_ranks: int, failing_rank: int, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    sabotage, policy, doing = FAULTS[name]
    async with running_engine(served_model(), config(num_ranks)) as (service, executor):
        alone = [await generate(service, each, seed) for seed, each in enumerate(NEIGHBOURS)]
        fault = Fault(executor.runners[failing_rank]._store, after)
        with sabotage(fault):
            failed, *together = await asyncio.gather(
                generate(service, policy, 77),
                *(generate(service, each, seed) for seed, each in enumerate(NEIGHBOURS)),
            )
        healed = await generate(service, policy, 77)
        status = await service.status()

    assert fault.num_raised
    assert together == alone
    finished = failed.finished
    assert (finished.reason, finished.error_kind) == (FinishReason.ERROR, "ComputationFailed")
    assert finished.error_metadata == {"policy": policy, "doing": doing, "kind": "ValueError"}
    assert policy in finished.error_message
    assert SECRET not in finished.error_message + caplog.text
    # What was told before is right: it ends where the fault is found.
    assert failed == healed[: len(failed)]
    assert len(failed) < len(healed) == OUTPUT_TOKENS
    assert all(rank.num_free_blocks == rank.num_blocks for rank in status.ranks)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, seed=3)])
@pytest.mark.parametrize("num_ranks", [1, 2])
async def test_predictions_that_are_no_numbers_end_their_request_alone(
    num_ranks: int, sampling: SamplingParams, value: float
) -> None:
    async with running_engine(served_model(), config(num_ranks)) as (service, _):
        alone = await generate(service, EXACT, 1)
        expected = await generate(service, "int8", 2, sampling=sampling)
        with no_numbers(value, after_position=PROMPT_TOKENS + 4):
            spoilt, neighbour = await asyncio.gather(
                generate(service, "int8", 2, sampling=sampling), generate(service, EXACT, 1)
            )
        status = await service.status()

    assert neighbour == alone
    assert spoilt == expected[:4]
    assert spoilt.finished.error_kind == "ComputationFailed"
    assert "int8" in spoilt.finished.error_message
    assert all(rank.num_free_blocks == rank.num_blocks for rank in status.ranks)


def no_numbers(value: float, *, after_position: int) -> AbstractContextManager[Any]:
    """Logits of int8's rows from a position on are spoilt, as the sampler gets them."""
    sampled = runner.sampled_tokens

    def spoiling(here: Any, logits_RV: torch.Tensor, *rest: Any) -> Any:
        logits_RV = logits_RV.clone()
        for row, rows in enumerate(here):
            if rows.part.codec == "int8" and rows.part.end >= after_position:
                logits_RV[row, 5] = value
        return sampled(here, logits_RV, *rest)

    return patch.object(runner, "sampled_tokens", spoiling)


@pytest.mark.parametrize("num_ranks", [1, 2])
async def test_scores_that_are_no_numbers_end_their_request(num_ranks: int) -> None:
    def spoiling(pieces: Any, logits_RV: torch.Tensor) -> Any:
        return scores(pieces, logits_RV * float("nan"))

    scores = runner.scores
    async with running_engine(served_model(), config(num_ranks)) as (service, _):
        with patch.object(runner, "scores", spoiling):
            scored = await generate(service, EXACT, 1, sampling=SamplingParams(prompt_logprobs=0))

    assert not scored
    assert scored.finished.error_kind == "ComputationFailed"


@pytest.mark.parametrize("num_ranks", [1, 2])
async def test_what_a_failed_sequence_computed_is_not_found_later(num_ranks: int) -> None:
    """Nor by requests that began with it before it was known."""
    cluster = config(num_ranks, prefix_cache=True)
    async with running_engine(served_model(), cluster) as (service, executor):
        expected = await generate(service, "int4", 5, mode=CacheMode.BYPASS)
        fault = Fault(executor.runners[-1]._store, 0)
        waiting: list[Future[Heard]] = []

        def follow(_plan: StepPlan) -> None:
            """The answer of the step that failed is not out: it has left its blocks for others."""
            if fault.num_raised and not waiting:
                fault.left = 1_000_000
                follower = generate(service, "int4", 5)
                waiting.append(asyncio.run_coroutine_threadsafe(follower, loop))

        loop = asyncio.get_running_loop()
        executor.after_step = follow
        with halfway(fault):
            failed = await generate(service, "int4", 5)
            followed = await asyncio.wrap_future(waiting[0])
        again = await generate(service, "int4", 5)

    assert failed.finished.error_kind == "ComputationFailed"
    assert followed == again == expected
    assert followed.finished.usage.cached_input_tokens == 0
    # What the follower computed is kept.
    assert again.finished.usage.cached_input_tokens > 0


@pytest.mark.parametrize("num_ranks", [1, 2])
async def test_a_context_that_cannot_be_encoded_fails_alone_and_leaves_nothing(
    num_ranks: int,
) -> None:
    prompt = array("I", range(3, 3 + PROMPT_TOKENS))
    async with running_engine(served_model(), config(num_ranks)) as (service, executor):
        alone = await generate(service, EXACT, 1)
        fault = Fault(executor.runners[-1]._store, 0)
        with encoding(fault):
            opened = await service.open_context(ContextRequest(context_id="book", policy="int4"))
            chunk = TokenChunk(0, prompt.tobytes())
            await service.append_context(DEFAULT_TENANT, "book", opened.upload, chunk)
            uploading = service.finish_context(DEFAULT_TENANT, "book", opened.upload)
            neighbour, refusal = await asyncio.gather(
                generate(service, EXACT, 1), uploading, return_exceptions=True
            )
        status = await service.status()

    assert fault.num_raised
    assert isinstance(refusal, ContextNotReady)
    assert "policy int4 failed at encoding blocks" in refusal.message
    assert neighbour == alone
    assert all(rank.num_free_blocks == rank.num_blocks for rank in status.ranks)


@pytest.mark.parametrize("failing_rank", [0, 1])
async def test_a_stored_context_that_cannot_be_restored_fails_alone(
    tmp_path: Path, failing_rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, cluster = served_model(), stored_config(tmp_path)
    ids = list(range(3, 3 + PROMPT_TOKENS))
    asked = GenerationRequest(model="tiny", max_output_tokens=2, context="book")
    async with running_engine(model, cluster) as (service, _):
        await stored(service, ids, "book", policy="int4")
    async with running_engine(model, cluster) as (service, executor):
        alone = await generate(service, EXACT, 1)
        fault = Fault(executor.runners[failing_rank]._store, 0)
        with restoring(fault):
            refusal, neighbour = await asyncio.gather(
                service.open(asked), generate(service, EXACT, 1), return_exceptions=True
            )
        status = await service.status()
        events = await hear(service, await service.open(asked), [5, 6, 7])

    assert fault.num_raised
    assert isinstance(refusal, ComputationFailed)
    assert refusal.metadata["doing"] == "restoring a stored context"
    assert SECRET not in refusal.message + caplog.text
    assert neighbour == alone
    assert all(rank.num_free_blocks == rank.num_blocks for rank in status.ranks)
    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.LENGTH


def restoring(fault: Fault) -> AbstractContextManager[Any]:
    """Blocks of a context have been read, and spoilt."""
    write_held = spilling.write_held

    def failing(store: KVStore, *rest: Any, **more: Any) -> None:
        write_held(store, *rest, **more)
        fault.strike(store)

    return patch.object(spilling, "write_held", failing)
