"""How generations end: in time or not, with or without readers, with the ring, with the engine."""

import pytest

from kvcluster.config import EngineConfig
from kvcluster.engine.api import (
    FinishReason,
    GenerationState,
)
from kvcluster.engine.plan import StepResult
from kvcluster.errors import (
    DeadlineExceeded,
    Draining,
    GenerationNotFound,
    RankLost,
    UploadStalled,
)
from kvcluster.types import DEFAULT_TENANT, TenantId
from tests.fake_engine import (
    FakeCluster,
    model_spec,
    packed,
    request,
)

PROMPT = list(range(1, 21))


def cluster(**fields: object) -> FakeCluster:
    fields.setdefault("spec", model_spec(eos_token_ids=()))
    return FakeCluster(**fields)  # type: ignore[arg-type]


def test_a_deadline_ends_a_generation_and_frees_its_blocks() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT, 50, deadline_s=3.0)
    fake.step()
    fake.clock.now += 3
    fake.engine.tick()
    fake.run()

    assert fake.reason(generation) is FinishReason.DEADLINE
    assert fake.num_leaked == 0
    with pytest.raises(DeadlineExceeded):
        fake.engine.append_prompt(generation, packed([1]))


def test_a_generation_ends_when_its_last_reader_has_been_away_for_the_grace_period() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT, 50, disconnect_grace_s=5.0)
    fake.engine.attach(generation)
    fake.engine.attach(generation)
    fake.engine.detach(generation)
    fake.clock.now += 100
    fake.engine.tick()
    assert not fake.engine.find(generation).log.is_finished

    fake.engine.detach(generation)
    fake.clock.now += 4.9
    fake.engine.tick()
    assert not fake.engine.find(generation).log.is_finished
    fake.clock.now += 0.2
    fake.engine.tick()
    assert fake.reason(generation) is FinishReason.CANCELLED


def test_a_reader_that_comes_back_in_time_saves_the_generation() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT, 50, disconnect_grace_s=5.0)
    fake.engine.attach(generation)
    fake.engine.detach(generation)
    fake.engine.attach(generation)
    fake.clock.now += 100
    fake.engine.tick()

    assert not fake.engine.find(generation).log.is_finished


def test_a_generation_that_nobody_ever_reads_does_not_live_for_ever() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT, 50)
    fake.clock.now += 61
    fake.engine.tick()

    assert fake.reason(generation) is FinishReason.CANCELLED


def test_cancel_discards_steps_in_flight_and_frees_everything() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT, 50)
    other = fake.submit(PROMPT[:3], 3)
    fake.plan()
    fake.plan()

    fake.engine.cancel(generation)
    fake.run()

    assert fake.reason(generation) is FinishReason.CANCELLED
    assert len(fake.output(other)) == 3
    assert fake.num_leaked == 0


def test_an_ended_generation_stays_as_it_is() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT, 1)
    fake.run()

    fake.engine.cancel(generation)
    fake.engine.fail(generation, UploadStalled("late"))

    assert fake.reason(generation) is FinishReason.LENGTH


def test_a_failure_is_told_by_kind_and_message() -> None:
    fake = cluster()
    generation = fake.engine.submit(request())
    fake.engine.fail(generation, UploadStalled("no chunk for 60 s"))

    finished = fake.finished(generation)
    assert (finished.reason, finished.error_kind, finished.error_message) == (
        FinishReason.ERROR,
        "UploadStalled",
        "no chunk for 60 s",
    )
    with pytest.raises(UploadStalled):
        fake.engine.append_prompt(generation, packed([1]))


def test_ended_generations_keep_no_prompt() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT, 1)
    fake.run()

    assert len(fake.engine.find(generation).request.tokens) == 0


def test_events_can_be_replayed_until_they_expire() -> None:
    fake = cluster(config=EngineConfig(retention_s=10))
    generation = fake.submit(PROMPT, 1)
    fake.run()
    fake.clock.now += 9
    fake.engine.tick()
    assert fake.reason(generation) is FinishReason.LENGTH

    fake.clock.now += 2
    fake.engine.tick()
    with pytest.raises(GenerationNotFound):
        fake.engine.find(generation)


def test_of_too_many_ended_generations_the_oldest_goes_first() -> None:
    fake = cluster(config=EngineConfig(max_retained=2))
    generations = [fake.submit(PROMPT, 1) for _ in range(3)]
    for generation in generations:
        fake.engine.cancel(generation)

    assert [fake.engine.knows(generation) for generation in generations] == [False, True, True]


def test_records_are_those_of_the_tenant_newest_first() -> None:
    fake = cluster()
    done = fake.submit(PROMPT, 1)
    fake.run()
    fake.submit(PROMPT, tenant=TenantId("blue"))
    cancelled = fake.submit(PROMPT)
    fake.engine.cancel(cancelled)
    running = fake.submit(PROMPT)
    fake.plan()
    fake.plan()
    queued = fake.engine.submit(request())

    assert [
        (record.generation, record.state) for record in fake.engine.records(DEFAULT_TENANT)
    ] == [
        (queued, GenerationState.QUEUED),
        (running, GenerationState.RUNNING),
        (cancelled, GenerationState.CANCELLED),
        (done, GenerationState.SUCCEEDED),
    ]


def test_a_lost_ring_ends_every_generation_and_refuses_requests_until_restart() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT)
    waiting = fake.engine.submit(request())
    fake.plan()

    fake.engine.lose_ring("rank 1 died")

    assert [fake.finished(each).error_kind for each in (generation, waiting)] == ["RankLost"] * 2
    assert fake.partition.num_used == 0
    assert fake.engine.next_plan() is None
    with pytest.raises(RankLost):
        fake.submit(PROMPT)


def test_steps_are_numbered_from_one_again_in_the_next_epoch() -> None:
    fake = cluster()
    fake.submit(PROMPT)
    fake.step()
    fake.engine.lose_ring("rank 1 died")
    fake.engine.restart(2)

    fake.engine.submit(request())
    generation = fake.engine.submit(request(1))
    fake.engine.append_prompt(generation, packed(PROMPT))
    fake.engine.finish_prompt(generation)
    plan = fake.engine.next_plan()

    assert plan is not None
    assert (plan.epoch, plan.step, plan.ended) == (2, 1, ())


def test_an_answer_out_of_order_means_a_lost_rank() -> None:
    fake = cluster()
    fake.submit(PROMPT)
    fake.plan()

    with pytest.raises(RankLost):
        fake.engine.complete(StepResult(1, 7, ()))


def test_draining_refuses_new_requests_and_finishes_the_others() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT, 2)
    fake.engine.drain()
    with pytest.raises(Draining):
        fake.submit(PROMPT)

    fake.run()
    assert fake.reason(generation) is FinishReason.LENGTH


def test_a_restart_while_draining_does_not_take_requests_again() -> None:
    fake = cluster()
    fake.engine.drain()
    fake.engine.lose_ring("rank 1 died")
    fake.engine.restart(2)

    with pytest.raises(Draining):
        fake.submit(PROMPT)


def test_shutting_down_ends_what_is_unfinished() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT)
    fake.step()
    fake.engine.shut_down()
    fake.run()

    assert fake.finished(generation).error_kind == "Draining"
    assert fake.num_leaked == 0
