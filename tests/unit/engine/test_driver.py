"""The driver with steps that the test answers, fails or leaves hanging."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from kvcluster.config import EngineConfig
from kvcluster.engine.api import FinishReason
from kvcluster.engine.driver import EngineDriver, SystemClock, random_id
from kvcluster.engine.plan import StepPlan, StepResult
from kvcluster.errors import RankLost
from tests.fake_engine import FakeCluster, model_spec

PROMPT = list(range(1, 21))


@dataclass
class HeldExecutor:
    """Steps wait for the test. The ring runs each when it is called, as a real one would."""

    fake: FakeCluster
    plans: list[StepPlan] = field(default_factory=list)
    answers: list[asyncio.Future[StepResult]] = field(default_factory=list)
    num_cancelled: int = 0
    called: asyncio.Event = field(default_factory=asyncio.Event)

    async def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self.answers.append(asyncio.get_running_loop().create_future())
        self.called.set()
        try:
            return await self.answers[len(self.plans) - 1]
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise

    def answer(self, index: int) -> None:
        self.answers[index].set_result(self.fake.ring.execute(self.plans[index]))


@dataclass
class Driven:
    fake: FakeCluster
    executor: HeldExecutor
    driver: EngineDriver

    async def called(self, num_plans: int) -> None:
        """Wait until so many plans have been sent."""
        async with asyncio.timeout(5):
            while len(self.executor.plans) < num_plans:
                self.executor.called.clear()
                await self.executor.called.wait()

    async def turn(self) -> None:
        """Let the driver do all it can do now."""
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
async def driven() -> AsyncIterator[Driven]:
    fake = FakeCluster(
        spec=model_spec(eos_token_ids=()),
        config=EngineConfig(prefill_chunk_tokens=16, lookahead_steps=2, step_timeout_s=30),
    )
    executor = HeldExecutor(fake)
    driver = EngineDriver(fake.engine, executor)
    driver.start()
    yield Driven(fake, executor, driver)
    await driver.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_two_steps_are_in_flight_and_no_more(driven: Driven) -> None:
    driven.fake.submit(PROMPT, 50)
    driven.driver.wake()
    await driven.called(2)
    await driven.turn()

    assert [plan.step for plan in driven.executor.plans] == [1, 2]


async def test_results_are_taken_in_order_even_when_a_later_one_is_first(driven: Driven) -> None:
    generation = driven.fake.submit(PROMPT, 2)
    driven.driver.wake()
    await driven.called(2)
    ring = driven.fake.ring
    results = [ring.execute(plan) for plan in driven.executor.plans]
    driven.executor.answers[1].set_result(results[1])
    await driven.turn()
    assert driven.fake.output(generation) == []

    driven.executor.answers[0].set_result(results[0])
    await driven.called(3)
    assert len(driven.fake.output(generation)) == 1


async def test_an_idle_driver_wakes_for_a_new_request(driven: Driven) -> None:
    await driven.turn()
    assert driven.executor.plans == []

    driven.fake.submit(PROMPT)
    driven.driver.wake()
    await driven.called(1)


async def test_a_generation_runs_to_its_end_and_the_driver_becomes_idle(driven: Driven) -> None:
    generation = driven.fake.submit(PROMPT[:5], 3)
    driven.driver.wake()
    idle = asyncio.create_task(driven.driver.wait_idle())
    step = 0
    while not idle.done():
        await driven.turn()
        if step < len(driven.executor.plans):
            driven.executor.answer(step)
            step += 1

    assert driven.fake.reason(generation) is FinishReason.LENGTH
    assert driven.fake.num_leaked == 0


async def test_a_failing_step_ends_every_generation_with_rank_lost(driven: Driven) -> None:
    generation = driven.fake.submit(PROMPT, 50)
    driven.driver.wake()
    await driven.called(2)
    driven.executor.answers[0].set_exception(RankLost("rank 2 died"))
    await driven.turn()

    finished = driven.fake.finished(generation)
    assert finished.error_kind == "RankLost"
    assert "rank 2 died" in finished.error_message
    assert driven.executor.num_cancelled == 1


async def test_any_fault_of_the_executor_means_a_lost_rank(driven: Driven) -> None:
    generation = driven.fake.submit(PROMPT, 50)
    driven.driver.wake()
    await driven.called(1)
    driven.executor.answers[0].set_exception(OSError("connection reset"))
    await driven.turn()

    assert driven.fake.finished(generation).error_kind == "RankLost"


async def test_a_wrong_answer_means_a_lost_rank(driven: Driven) -> None:
    generation = driven.fake.submit(PROMPT, 50)
    driven.driver.wake()
    await driven.called(1)
    driven.executor.answers[0].set_result(StepResult(1, 2, ()))
    await driven.turn()

    assert driven.fake.finished(generation).error_kind == "RankLost"


async def test_a_step_that_hangs_past_its_deadline_means_a_lost_rank(driven: Driven) -> None:
    generation = driven.fake.submit(PROMPT, 50, disconnect_grace_s=1000.0)
    driven.driver.wake()
    await driven.called(2)
    driven.fake.clock.now += 29
    driven.driver.wake()
    await driven.turn()
    assert not driven.fake.engine.find(generation).log.is_finished

    driven.fake.clock.now += 2
    driven.driver.wake()
    await driven.turn()
    assert "longer than 30 s" in driven.fake.finished(generation).error_message


async def test_a_steps_time_runs_from_when_the_step_before_it_was_done(driven: Driven) -> None:
    generation = driven.fake.submit(PROMPT, 50, disconnect_grace_s=1000.0)
    driven.driver.wake()
    await driven.called(2)
    driven.fake.clock.now += 20
    driven.executor.answer(0)
    await driven.called(3)
    driven.fake.clock.now += 20
    driven.driver.wake()
    await driven.turn()

    assert not driven.fake.engine.find(generation).log.is_finished


async def test_after_a_restart_requests_run_again(driven: Driven) -> None:
    driven.fake.submit(PROMPT, 50)
    driven.driver.wake()
    await driven.called(1)
    driven.executor.answers[0].set_exception(RankLost("rank 2 died"))
    await driven.turn()
    num_plans = len(driven.executor.plans)

    driven.fake.engine.restart(2)
    driven.fake.submit(PROMPT, 1)
    driven.driver.wake()
    await driven.called(num_plans + 1)

    assert (driven.executor.plans[-1].epoch, driven.executor.plans[num_plans].step) == (2, 1)


async def test_stopping_ends_generations_and_cancels_steps(driven: Driven) -> None:
    generation = driven.fake.submit(PROMPT, 50)
    driven.driver.wake()
    await driven.called(2)

    await driven.driver.stop()

    assert driven.fake.finished(generation).error_kind == "Draining"
    assert driven.executor.num_cancelled == 2


async def test_a_deadline_is_noticed_while_a_step_runs(driven: Driven) -> None:
    generation = driven.fake.submit(PROMPT, 50, deadline_s=3.0)
    driven.driver.wake()
    await driven.called(1)
    driven.fake.clock.now += 3
    driven.driver.wake()
    await driven.turn()

    assert driven.fake.reason(generation) is FinishReason.DEADLINE


async def test_a_driver_is_started_once(driven: Driven) -> None:
    with pytest.raises(RuntimeError, match="already"):
        driven.driver.start()


async def test_a_timer_wakes_the_driver_by_itself() -> None:
    fake = FakeCluster(clock=SystemClock())  # type: ignore[arg-type]
    driver = EngineDriver(fake.engine, HeldExecutor(fake))
    driver.start()
    generation = fake.submit(PROMPT, 50, deadline_s=0.02)
    driver.wake()
    async with asyncio.timeout(5):
        async for _ in fake.engine.find(generation).log.follow(0):
            pass

    assert fake.reason(generation) is FinishReason.DEADLINE
    await driver.stop()


def test_ids_differ() -> None:
    assert len({random_id() for _ in range(100)}) == 100
