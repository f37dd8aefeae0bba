"""Connects the sans-IO engine to a ring group and to real time. Runs in the engine process.

One task owns the loop: take in results in order, tick, plan as far ahead as allowed, sleep until
something happens. Callers change the engine directly, on the same event loop, then `wake` it.
"""

import asyncio
import math
import secrets
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from kvcluster.engine.engine import Engine
from kvcluster.engine.plan import StepPlan, StepResult
from kvcluster.engine.stream import Signal
from kvcluster.errors import RankLost
from kvcluster.log import get_logger

log = get_logger(__name__)


class Executor(Protocol):
    """A ring group as the engine sees it."""

    async def execute(self, plan: StepPlan) -> StepResult:
        """Run one step on every rank at once. Calls overlap: plans run in the order of the calls.

        Raises: RankLost.
        """
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix(self) -> float:
        return time.time()


def random_id() -> str:
    """An id that cannot be guessed: whoever knows a generation's name has been told it."""
    return secrets.token_hex(16)


@dataclass(slots=True)
class _RunningStep:
    step: int
    task: asyncio.Task[StepResult]


class EngineDriver:
    """Runs an engine until `stop`. Not thread-safe: use it from one event loop."""

    def __init__(self, engine: Engine, executor: Executor) -> None:
        self._engine = engine
        self._executor = executor
        self._wake = asyncio.Event()
        self._idle = Signal()
        self._ring_lost = asyncio.Event()
        self._steps: deque[_RunningStep] = deque()
        self._head_since = 0.0
        self._abandoned: set[asyncio.Task[StepResult]] = set()
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run. Call it once, inside the event loop."""
        if self._loop_task is not None:
            raise RuntimeError("the driver has been started already")
        self._loop_task = asyncio.create_task(self._run(), name="engine-driver")
        self._loop_task.add_done_callback(self._on_run_ended)

    async def stop(self) -> None:
        """End unfinished generations and every task. Safe to call twice."""
        self._engine.shut_down()
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.wait({self._loop_task})
        self._abandon_steps()
        if self._abandoned:
            await asyncio.wait(self._abandoned)

    def wake(self) -> None:
        """The engine's state has changed: look for something to do."""
        self._wake.set()

    async def wait_idle(self) -> None:
        """Return when no generation is unfinished and no step in flight."""
        while self._engine.num_unfinished or self._engine.num_in_flight:
            await self._idle.wait()

    @property
    def has_failed(self) -> bool:
        """A fault of ours has ended the loop. Only a new engine helps."""
        task = self._loop_task
        return task is not None and task.done() and not task.cancelled()

    def lose_ring(self, message: str) -> None:
        """A rank was lost while no step ran. Says the same as a step that fails."""
        if not self._ring_lost.is_set():
            self._lose_ring(message)

    async def wait_ring_lost(self) -> None:
        """Return when a rank is lost: no step runs until `restart`."""
        await self._ring_lost.wait()

    def restart(self, epoch: int) -> None:
        """The ring group runs again, with empty caches, in this epoch."""
        self._engine.restart(epoch)
        self._ring_lost.clear()
        self.wake()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            self._settle()
            self._engine.tick()
            self._plan()
            if not self._engine.num_unfinished and not self._engine.num_in_flight:
                self._idle.notify()
            await self._sleep()

    def _settle(self) -> None:
        while self._steps and self._steps[0].task.done():
            running = self._steps.popleft()
            self._head_since = self._now()
            failure = "was cancelled" if running.task.cancelled() else running.task.exception()
            if failure is not None:
                self._lose_ring(f"step {running.step}: {failure}")
                return
            try:
                self._engine.complete(running.task.result())
            except RankLost as lost:
                self._lose_ring(lost.message)
                return
        if self._steps and self._now() >= self._step_deadline:
            timeout_s = self._engine.parts.config.step_timeout_s
            self._lose_ring(f"step {self._steps[0].step} took longer than {timeout_s:g} s")

    def _plan(self) -> None:
        while len(self._steps) < self._engine.parts.config.lookahead_steps:
            plan = self._engine.next_plan()
            if plan is None:
                return
            if not self._steps:
                self._head_since = self._now()
            task = asyncio.create_task(self._execute(plan), name=f"step-{plan.step}")
            task.add_done_callback(lambda _: self._wake.set())
            self._steps.append(_RunningStep(plan.step, task))

    async def _execute(self, plan: StepPlan) -> StepResult:
        return await self._executor.execute(plan)

    async def _sleep(self) -> None:
        due = min(self._engine.next_wakeup(), self._step_deadline)
        timer = None
        if due < math.inf:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(max(0.0, due - self._now()), self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()

    @property
    def _step_deadline(self) -> float:
        """When the oldest step has run for too long; infinite while none runs."""
        if not self._steps:
            return math.inf
        return self._head_since + self._engine.parts.config.step_timeout_s

    def _now(self) -> float:
        return self._engine.parts.clock.monotonic()

    def _lose_ring(self, message: str) -> None:
        log.error("ring_lost", epoch=self._engine.epoch, num_requests=self._engine.num_unfinished)
        self._abandon_steps()
        self._engine.lose_ring(message)
        self._ring_lost.set()

    def _abandon_steps(self) -> None:
        for running in self._steps:
            running.task.cancel()
            self._abandoned.add(running.task)
            running.task.add_done_callback(self._forget_step)
        self._steps.clear()

    def _forget_step(self, task: asyncio.Task[StepResult]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled():
            # Asking marks the error as seen: the ring is lost already, for an earlier reason.
            task.exception()

    def _on_run_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("engine_driver_failed", exc_info=error)
            self._abandon_steps()
            self._engine.lose_ring("the engine has stopped because of a fault in it")
