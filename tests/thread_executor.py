"""A real engine over real ranks in threads: everything but Ray, in one process and one second."""

import asyncio
import queue
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from threading import Lock

import msgspec
import torch

from kvcluster.cache.capacity import blocks_per_group
from kvcluster.cache.spill import PartReceipt
from kvcluster.cache.store import KVStore
from kvcluster.cluster.runner import StepRunner
from kvcluster.cluster.running_step import StepBefore, StepOutcome
from kvcluster.cluster.spilling import SpillShare
from kvcluster.config import ClusterConfig
from kvcluster.engine.api import Event, Opened, TokenChunk
from kvcluster.engine.plan import RankAnswer, StepPlan, StepResult, result_of
from kvcluster.engine.service import EngineService
from kvcluster.engine.spill_plan import SpillRead, SpillWrite
from kvcluster.engine.text import Tokenizer
from kvcluster.errors import RankLost
from kvcluster.model.codecs import load_codecs
from kvcluster.model.loader import LoadedModel
from kvcluster.serve.assembly import engine_service
from kvcluster.types import DEFAULT_TENANT
from tests.thread_ring import ThreadRing, run_ranks


class ThreadExecutor:
    """An `Executor`: one `StepRunner` per rank, each step in one thread per rank."""

    def __init__(self, model: LoadedModel, config: ClusterConfig) -> None:
        self._memory = Lock()
        self.runners = [
            StepRunner(
                model=model,
                store=KVStore(
                    model.spec,
                    blocks_per_group=blocks_per_group(model.spec, config.cache, config.engine),
                    block_size=config.cache.block_size,
                    like=next(model.module.parameters()),
                    codecs=load_codecs(model, config.calibration),
                ),
                ring=ring,
                epoch=1,
                exact_blocks=config.cache.exact_recent_blocks,
            )
            for ring in ThreadRing.group(config.ring.num_ranks)
        ]
        self.shares = [
            SpillShare(
                runner._store,
                rank=rank,
                num_ranks=config.ring.num_ranks,
                exact_blocks=config.cache.exact_recent_blocks,
                lock=self._memory,
            )
            for rank, runner in enumerate(self.runners)
        ]
        self.after_step: Callable[[StepPlan], None] = lambda _plan: None
        """Called when all ranks have run a step, before its answer is out."""
        self._before = StepBefore()
        # One thread: plans run in the order of the calls, as they do in a ring group.
        self._steps = ThreadPoolExecutor(1)

    async def execute(self, plan: StepPlan) -> StepResult:
        return await asyncio.get_running_loop().run_in_executor(self._steps, self._run, plan)

    async def write_spill(self, order: SpillWrite) -> Sequence[PartReceipt]:
        order = msgspec.msgpack.decode(msgspec.msgpack.encode(order), type=SpillWrite)
        receipts = await asyncio.gather(
            *(asyncio.to_thread(share.write, order) for share in self.shares)
        )
        return [receipt for of_rank in receipts for receipt in of_rank]

    async def read_spill(self, order: SpillRead) -> None:
        order = msgspec.msgpack.decode(msgspec.msgpack.encode(order), type=SpillRead)
        answers = await asyncio.gather(
            *(asyncio.to_thread(share.read, order) for share in self.shares),
            return_exceptions=True,
        )
        for answer in answers:
            if answer is not None:
                raise answer

    def start_again(self, *, epoch: int) -> None:
        """As new ranks of an epoch are: they know no sequence, and their memory is spoilt."""
        for runner in self.runners:
            runner._epoch, runner._next_step = epoch, 1
            runner._sequences.clear()
            for layer in range(len(runner._store.spec.layers)):
                for plane in runner._store.planes(layer):
                    plane.fill_(float("nan"))
        self._before = StepBefore()

    def close(self) -> None:
        self._steps.shutdown()

    def _run(self, plan: StepPlan) -> StepResult:
        def run_rank(rank: int) -> StepOutcome:
            torch.set_num_threads(1)
            return self.runners[rank].run(plan, self._before)

        try:
            with self._memory:
                outcomes = run_ranks(len(self.runners), run_rank)
        except queue.Empty as silence:
            raise RankLost("two ranks disagree on what to exchange") from silence
        assert len({outcome.answering_ranks for outcome in outcomes}) == 1
        for rank, outcome in enumerate(outcomes):
            assert rank in outcome.answering_ranks or outcome.answer == RankAnswer()
        result = result_of(plan, [outcome.answer for outcome in outcomes])
        self._before = StepBefore.of(result)
        self.after_step(plan)
        return result


@asynccontextmanager
async def running_engine(
    model: LoadedModel, config: ClusterConfig, tokenizer: Tokenizer | None = None
) -> AsyncIterator[tuple[EngineService, ThreadExecutor]]:
    """An engine that serves, marked ready, over ranks in threads."""
    executor = ThreadExecutor(model, config)
    nodes = [f"node-{rank}" for rank in range(config.ring.num_ranks)]
    service = engine_service(
        config, model.spec, executor, nodes=nodes, epoch=1, tokenizer=tokenizer
    )
    service.start()
    service.mark_ready()
    try:
        yield service, executor
    finally:
        await service.stop()
        executor.close()


async def hear(service: EngineService, opened: Opened, prompt: Sequence[int]) -> list[Event]:
    """All events of a generation whose prompt is uploaded meanwhile."""
    chunk = TokenChunk(0, array("I", prompt).tobytes())

    async def upload() -> None:
        await service.append_prompt(opened.generation, opened.upload, chunk)
        await service.finish_prompt(opened.generation, opened.upload)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(upload())
        return [
            event.event
            async for events in service.watch(DEFAULT_TENANT, opened.generation, 0)
            for event in events
        ]
