"""The ranks that serve requests together: placed by Ray, one actor each. Lives in the engine.

Ray places the actors, starts and stops them, and carries one call a step to rank 0; everything
else between ranks goes over the ring (`transport`).
"""

import asyncio
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kvcluster.cache.spill import PartReceipt
from kvcluster.cluster.worker import Host, Rendezvous, Worker
from kvcluster.config import ClusterConfig, TransportKind
from kvcluster.engine.plan import StepPlan, StepResult
from kvcluster.engine.spill_plan import SpillRead, SpillWrite
from kvcluster.errors import ConfigError, KvClusterError, RankLost
from kvcluster.freed_memory import overwrite_freed_memory
from kvcluster.garbage import exempt_living
from kvcluster.log import get_logger
from kvcluster.types import ModelSpec

T = TypeVar("T")

log = get_logger(__name__)

PLACEMENT_TIMEOUT_S = 120.0
_STEPS = 2
"""A step that runs, and the next one."""


def worker_actor(worker_class: type[Worker]) -> Any:
    """The Ray actor around a worker: steps in as many threads as may be under way, everything else
    beside them."""

    class WorkerActor(worker_class):  # type: ignore[valid-type, misc]
        def __init__(self, rank: int, config: ClusterConfig) -> None:
            # Copies of a tenant's blocks: of a step, and on their way off the GPU and back.
            overwrite_freed_memory()
            super().__init__(rank, config)

        def node_id(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

        def address(self) -> str:
            return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

        def note_warm(self) -> None:
            exempt_living()

    # Ray names an actor by its qualified name.
    WorkerActor.__name__ = WorkerActor.__qualname__ = worker_class.__name__
    groups = dict.fromkeys(("execute", "follow", "load", "connect"), "step") | {"live": "life"}
    groups |= dict.fromkeys(("write_spill", "read_spill"), "disk")
    for name, group in groups.items():
        marked = ray.method(concurrency_group=group)(_own_method(worker_class, name))
        setattr(WorkerActor, name, marked)
    sizes = {"step": _STEPS, "life": 1, "disk": 1, "control": 2}
    options: Any = ray.remote(concurrency_groups=sizes)  # type: ignore[call-overload]
    return options(WorkerActor)


class RingGroup:
    """An `Executor`: runs plans on all ranks. One epoch at a time; a lost rank ends the epoch."""

    def __init__(self, config: ClusterConfig, worker_class: type[Worker] = Worker) -> None:
        self._config = config
        self._actor_class = worker_actor(worker_class)
        self._placement: PlacementGroup | None = None
        self.workers: list[Any] = []
        self._watching: list[asyncio.Future[None]] = []
        self._lost: asyncio.Future[None] | None = None
        self.epoch = 0
        self._num_calls = 0
        """Of `execute`, in this epoch."""
        self.nodes: list[str] = []
        self.has_gpus = False
        """Whether each rank has one; known once they are started."""

    async def start(self) -> ModelSpec:
        """Place the ranks, load the model on each, connect them.

        Raises: ConfigError (does not fit the Ray cluster), ModelError, RankLost.
        """
        self._placement = await self._place()
        self.workers = [self._create(rank) for rank in range(self._config.ring.num_ranks)]
        hosts: list[Host] = await self._on_all("host")
        self.has_gpus = all(host.has_gpu for host in hosts)
        self.nodes = await self._on_all("node_id")
        await self._share_cores(hosts)
        specs: list[ModelSpec] = await self._on_all("load")
        await self._connect(self._transport(hosts))
        return specs[0]

    async def execute(self, plan: StepPlan) -> StepResult:
        """Run one step on every rank at once. Calls may overlap: plans run in call order.

        Raises: RankLost if any rank dies, fails or leaves the ring.
        """
        assert self._lost is not None, "start comes first"
        self._num_calls += 1
        answer = asyncio.ensure_future(
            _unwrapped(
                self.workers[0].execute.remote(msgspec.msgpack.encode(plan), self._num_calls)
            )
        )
        try:
            await asyncio.wait({answer, self._lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self._lost.result()
            return msgspec.msgpack.decode(await answer, type=StepResult)
        finally:
            # A step that was given up may still fail, and nobody would ask for that error.
            answer.cancel()

    async def write_spill(self, order: SpillWrite) -> Sequence[PartReceipt]:
        """See `SpillRanks`."""
        answers = await self._on_disk("write_spill", msgspec.msgpack.encode(order))
        return [
            receipt
            for answer in answers
            for receipt in msgspec.msgpack.decode(answer, type=list[PartReceipt])
        ]

    async def read_spill(self, order: SpillRead) -> None:
        """See `SpillRanks`."""
        await self._on_disk("read_spill", msgspec.msgpack.encode(order))

    async def _on_disk(self, method: str, order: bytes) -> list[Any]:
        """What all ranks answer, once none is at work any more. Raises: what one of them raised."""
        if not self.workers:
            raise RankLost("the ring group is being started again: try later")
        calls = (getattr(worker, method).remote(order) for worker in self.workers)
        answers = await asyncio.gather(*map(_unwrapped, calls), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return list(answers)

    async def wait_lost(self) -> None:
        """Return when a rank of this epoch is lost, in a step or between steps."""
        assert self._lost is not None, "start comes first"
        await asyncio.wait({self._lost})

    async def stop(self) -> None:
        """End all ranks and give their place back. Safe to call at any time."""
        if self._lost is not None:
            self._lost.cancel()
        for watching in self._watching:
            watching.cancel()
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    async def _place(self) -> PlacementGroup:
        ring = self._config.ring
        bundle = {"CPU": 1.0} | ({"GPU": 1.0} if _cluster_has_gpus() else {})
        placement: PlacementGroup = placement_group(
            [bundle] * ring.num_ranks, strategy=ring.placement
        )
        try:
            async with asyncio.timeout(PLACEMENT_TIMEOUT_S):
                await placement.ready()
        except TimeoutError as late:
            remove_placement_group(placement)
            raise ConfigError(
                f"ring.num_ranks: {ring.num_ranks} ranks of {bundle} do not fit the Ray cluster "
                f"({_resources(ray.available_resources)} free); use fewer ranks or add nodes"
            ) from late
        return placement

    def _create(self, rank: int) -> Any:
        assert self._placement is not None
        return self._actor_class.options(
            num_cpus=1,
            num_gpus=1 if _cluster_has_gpus() else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, rank),
            runtime_env={"env_vars": _thread_policy(self._config.ring.num_ranks)},
        ).remote(rank, self._config)

    async def _share_cores(self, hosts: list[Host]) -> None:
        machines = [host.machine for host in hosts]
        await asyncio.gather(
            *(
                _unwrapped(
                    worker.share_cores.remote(
                        [rank for rank, other in enumerate(machines) if other == machine]
                    )
                )
                for worker, machine in zip(self.workers, machines, strict=True)
            )
        )

    def _transport(self, hosts: list[Host]) -> TransportKind:
        wanted = self._config.ring.transport
        if wanted is not TransportKind.AUTO:
            return wanted
        if self.has_gpus:
            return TransportKind.NCCL
        is_one_machine = len({host.machine for host in hosts}) == 1
        return TransportKind.SOCKETS if is_one_machine else TransportKind.GLOO

    async def _connect(self, transport: TransportKind) -> None:
        self.epoch += 1
        self._num_calls = 0
        meeting: Rendezvous = await _unwrapped(
            self.workers[0].propose_meeting.remote(self.epoch, transport)
        )
        await self._on_all("connect", meeting)
        await _unwrapped(self.workers[0].close_meeting.remote(meeting))
        loop = asyncio.get_running_loop()
        self._lost = loop.create_future()
        # Seen here, whether or not a step is waiting for it.
        self._lost.add_done_callback(lambda lost: lost.cancelled() or lost.exception())
        calls = [self.workers[0].live.remote()]
        calls += [worker.follow.remote() for worker in self.workers[1:]]
        self._watching = [asyncio.ensure_future(_unwrapped(call)) for call in calls]
        for rank, watching in enumerate(self._watching):
            watching.add_done_callback(partial(self._on_rank_end, rank))
        log.info("ring_connected", epoch=self.epoch, transport=transport, ranks=len(self.workers))

    def _on_rank_end(self, rank: int, done: "asyncio.Future[None]") -> None:
        assert self._lost is not None
        if done.cancelled() or self._lost.done():
            return
        error = done.exception()
        log.error("rank_lost", rank=rank, epoch=self.epoch, error=type(error).__name__)
        self._lost.set_exception(
            error
            if isinstance(error, RankLost)
            else RankLost(f"rank {rank} ended: {type(error).__name__}")
        )

    async def _on_all(self, method: str, *arguments: object) -> list[Any]:
        return await asyncio.gather(
            *(_unwrapped(getattr(worker, method).remote(*arguments)) for worker in self.workers)
        )


async def _unwrapped(call: Awaitable[T]) -> T:
    """An actor call whose errors are ours: what the worker raised, or RankLost."""
    try:
        return await call
    except RayTaskError as error:
        if isinstance(error.cause, KvClusterError):
            raise error.cause from error
        # Only the class: the text may name what is none of a client's business.
        log.error("rank_failed", exc_info=error.cause)
        raise RankLost(f"a rank failed: {type(error.cause).__name__}") from error
    except RayError as error:
        raise RankLost(f"a rank is gone: {type(error).__name__}") from error


def _thread_policy(num_ranks: int) -> dict[str, str]:
    """Ranks of one machine share its cores: an OpenMP thread that spins while it waits takes one
    from a rank that works. A rank alone is faster when its threads spin."""
    return {"OMP_WAIT_POLICY": "PASSIVE"} if num_ranks > 1 else {}


def _cluster_has_gpus() -> bool:
    return _resources(ray.cluster_resources).get("GPU", 0) > 0


def _resources(ask: Any) -> dict[str, float]:
    return dict(ask())


def _own_method(worker_class: type[Worker], name: str) -> Any:
    """A method of the actor's own: Ray marks methods, and must not mark the worker's."""
    inherited = getattr(worker_class, name)

    def method(self: Worker, *arguments: object) -> Any:
        return inherited(self, *arguments)

    method.__name__ = name
    return method
