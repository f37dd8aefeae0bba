"""The engine by hand: time stands still until it is moved, steps run when told."""

import pytest

from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import (
    Admitted,
    FinishReason,
    GenerationState,
    Output,
    Phase,
    Progress,
)
from kvcluster.engine.plan import StepResult
from kvcluster.errors import (
    ClusterOverloaded,
    ContextTooLong,
    DeadlineExceeded,
    Draining,
    GenerationNotFound,
    InvalidField,
    PromptCorrupt,
    QuotaExceeded,
    RankLost,
    UploadStalled,
)
from kvcluster.types import DEFAULT_TENANT, GenerationId, TenantId
from tests.fake_engine import (
    CharacterTokenizer,
    FakeCluster,
    model_spec,
    packed,
    request,
    sampling,
)
from tests.fake_ring import expected_output

PROMPT = list(range(1, 21))


def cluster(**fields: object) -> FakeCluster:
    fields.setdefault("spec", model_spec(eos_token_ids=()))
    return FakeCluster(**fields)  # type: ignore[arg-type]


def progress(fake: FakeCluster, generation: GenerationId) -> list[Progress]:
    return [event for event in fake.events(generation) if isinstance(event, Progress)]


def test_a_generation_is_admitted_then_gives_tokens_then_finishes() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT, 3)
    fake.run()

    kinds = [type(event).__name__ for event in fake.events(generation)]
    assert kinds == ["Admitted", "Output", "Output", "Output", "Finished"]
    assert fake.reason(generation) is FinishReason.LENGTH
    assert fake.output(generation) == expected_output(
        PROMPT, sampling(), max_output_tokens=3, spec=fake.spec
    )


def test_the_first_event_names_the_resolved_policy_and_the_place_in_the_queue() -> None:
    fake = cluster()
    fake.submit(PROMPT)
    generation = fake.submit(PROMPT, policy="full")

    first = fake.events(generation)[0]

    assert isinstance(first, Admitted)
    assert (first.policy, first.queue_position) == ("exact", 1)


def test_a_later_urgent_request_has_nobody_before_it() -> None:
    fake = cluster()
    fake.submit(PROMPT)
    first = fake.events(fake.submit(PROMPT, priority=1))[0]

    assert isinstance(first, Admitted)
    assert first.queue_position == 0


def test_the_end_of_sequence_token_ends_the_output_and_is_part_of_it() -> None:
    first_token = expected_output(
        PROMPT, sampling(), max_output_tokens=1, spec=model_spec(eos_token_ids=())
    )[0]
    fake = cluster(spec=model_spec(eos_token_ids=(first_token,)))
    generation = fake.submit(PROMPT, 9)
    fake.run()

    assert fake.output(generation) == [first_token]
    assert fake.reason(generation) is FinishReason.STOP
    assert fake.num_leaked == 0


def test_an_ignored_end_of_sequence_token_does_not_end_the_output() -> None:
    first_token = expected_output(
        PROMPT, sampling(), max_output_tokens=1, spec=model_spec(eos_token_ids=())
    )[0]
    fake = cluster(spec=model_spec(eos_token_ids=(first_token,)))
    generation = fake.submit(PROMPT, 4, sampling=sampling(ignore_eos=True))
    fake.run()

    assert len(fake.output(generation)) == 4


def test_a_stop_token_before_min_output_tokens_is_an_ordinary_token() -> None:
    tokens = expected_output(
        PROMPT, sampling(), max_output_tokens=2, spec=model_spec(eos_token_ids=())
    )
    fake = cluster()
    generation = fake.submit(
        PROMPT,
        5,
        sampling=sampling(stop_token_ids=(tokens[0], tokens[1]), min_output_tokens=1),
    )
    fake.run()

    assert fake.output(generation) == tokens


def test_the_token_sampled_ahead_of_a_late_stop_is_discarded() -> None:
    tokens = expected_output(
        PROMPT, sampling(), max_output_tokens=1, spec=model_spec(eos_token_ids=())
    )
    fake = cluster()
    generation = fake.submit(PROMPT[:20], 9, sampling=sampling(stop_token_ids=(tokens[0],)))
    for _ in range(4):
        fake.plan()
    while fake.answers:
        fake.answer()

    assert fake.output(generation) == tokens


def test_a_stop_string_cuts_the_text_and_is_named() -> None:
    ids = expected_output(
        PROMPT, sampling(), max_output_tokens=6, spec=model_spec(eos_token_ids=())
    )
    text = "".join(map(chr, ids))
    fake = cluster(tokenizer=CharacterTokenizer())
    generation = fake.submit(PROMPT, 6, sampling=sampling(stop=(text[2:4],)))
    fake.run()

    assert fake.text(generation) == text[:2]
    assert fake.finished(generation).stop_sequence == text[2:4]
    assert fake.reason(generation) is FinishReason.STOP
    assert fake.output(generation) == ids[:4]


def test_text_held_back_is_shown_when_the_generation_is_cancelled() -> None:
    ids = expected_output(
        PROMPT, sampling(), max_output_tokens=1, spec=model_spec(eos_token_ids=())
    )
    fake = cluster(tokenizer=CharacterTokenizer())
    generation = fake.submit(PROMPT, 9, sampling=sampling(stop=(chr(ids[0]) + "\uffff",)))
    fake.step()
    fake.step()
    assert fake.text(generation) == ""

    fake.engine.cancel(generation)

    assert fake.text(generation) == chr(ids[0])
    last = fake.events(generation)[-2]
    assert isinstance(last, Output)
    assert (last.index, last.token_ids) == (1, ())


def test_usage_counts_tokens_and_the_most_bytes_held() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT, 3)
    fake.run()

    usage = fake.finished(generation).usage
    per_token = fake.spec.kv_bytes_per_token
    assert (usage.input_tokens, usage.output_tokens) == (20, 3)
    # 22 tokens are stored in 6 blocks of 4; the third output token is never fed back.
    assert usage.kv_bytes == 24 * per_token
    assert usage.kv_bytes_uncompressed == 22 * per_token


def test_a_refused_request_leaves_nothing_behind() -> None:
    fake = cluster()
    with pytest.raises(InvalidField):
        fake.engine.submit(request(policy="int3"))

    assert fake.engine.num_known == 0
    assert fake.plan() is None


def test_a_full_queue_refuses_one_more() -> None:
    fake = cluster(config=EngineConfig(max_running=1, max_waiting=1))
    fake.submit(PROMPT)
    fake.submit(PROMPT)

    with pytest.raises(ClusterOverloaded) as info:
        fake.engine.submit(request())
    assert info.value.retry_after_s == 1.0


def test_an_upload_over_the_context_limit_is_refused_at_once() -> None:
    fake = cluster(spec=model_spec(max_context_tokens=30))
    generation = fake.engine.submit(request(15))
    fake.engine.append_prompt(generation, packed(PROMPT[:10]))

    with pytest.raises(ContextTooLong):
        fake.engine.append_prompt(generation, packed(PROMPT[:6]))


def test_an_upload_over_the_partition_is_refused_at_once() -> None:
    fake = cluster(num_ranks=1, num_blocks=4)
    generation = fake.engine.submit(request(1))
    fake.engine.append_prompt(generation, packed(PROMPT[:16]))

    with pytest.raises(QuotaExceeded):
        fake.engine.append_prompt(generation, packed([1]))


def test_a_prompt_that_is_not_as_long_as_declared_is_refused() -> None:
    fake = cluster()
    generation = fake.engine.submit(request(input_tokens=20))
    fake.engine.append_prompt(generation, packed(PROMPT[:19]))

    with pytest.raises(InvalidField, match="declared 20, but 19"):
        fake.engine.finish_prompt(generation)
    with pytest.raises(InvalidField, match="declared 20, but more"):
        fake.engine.append_prompt(generation, packed([1, 2]))


def test_an_empty_prompt_is_refused() -> None:
    fake = cluster()
    generation = fake.engine.submit(request())

    with pytest.raises(InvalidField, match="empty"):
        fake.engine.finish_prompt(generation)


def test_a_complete_prompt_takes_no_more() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT)

    with pytest.raises(PromptCorrupt):
        fake.engine.append_prompt(generation, packed([1]))


def test_room_for_the_prompt_shrinks_with_upload_and_grows_with_prefill() -> None:
    fake = cluster(config=EngineConfig(prefill_chunk_tokens=8, upload_window_chunks=2))
    generation = fake.engine.submit(request())
    assert fake.engine.prompt_room(generation) == 16

    fake.engine.append_prompt(generation, packed(PROMPT))
    assert fake.engine.prompt_room(generation) == 0

    fake.step()
    fake.step()
    assert fake.engine.prompt_room(generation) == 12


def test_there_is_room_for_more_than_a_block_however_small_the_chunks() -> None:
    fake = cluster(
        cache=CacheConfig(block_size=16),
        config=EngineConfig(prefill_chunk_tokens=1, upload_window_chunks=1),
    )

    assert fake.engine.prompt_room(fake.engine.submit(request())) == 32


def test_progress_comes_at_every_interval_until_the_first_token() -> None:
    fake = cluster()
    generation = fake.engine.submit(request(9, input_tokens=20, progress_interval_s=0.5))
    for _ in range(3):
        fake.clock.now = fake.engine.next_wakeup()
        fake.engine.tick()
    fake.engine.append_prompt(generation, packed(PROMPT))
    fake.engine.finish_prompt(generation)
    fake.step()
    fake.clock.now += 0.5
    fake.engine.tick()
    fake.step()
    fake.clock.now += 5
    fake.engine.tick()

    assert [
        (each.phase, each.done_tokens, each.total_tokens) for each in progress(fake, generation)
    ] == [
        (Phase.UPLOADING, 0, 20),
        (Phase.UPLOADING, 0, 20),
        (Phase.UPLOADING, 0, 20),
        (Phase.PREFILLING, 16, 20),
    ]


def test_progress_tells_that_a_request_is_queued() -> None:
    fake = cluster(config=EngineConfig(max_running=1))
    fake.submit(PROMPT, 50)
    queued = fake.submit(PROMPT)
    fake.step()
    fake.clock.now += 1
    fake.engine.tick()

    assert progress(fake, queued)[0].phase is Phase.QUEUED


def test_the_total_is_zero_while_the_length_is_not_known() -> None:
    fake = cluster()
    generation = fake.engine.submit(request())
    fake.engine.append_prompt(generation, packed(PROMPT))
    fake.clock.now += 1
    fake.engine.tick()

    assert progress(fake, generation)[0].total_tokens == 0


def test_progress_estimates_what_is_left_of_this_and_of_earlier_prompts() -> None:
    fake = cluster(spec=model_spec(eos_token_ids=()), num_blocks=500)
    fake.submit([1] * 160, 1)
    while fake.plan() is not None:
        fake.clock.now += 1.6
        fake.answer()
    fake.submit([1] * 80)
    generation = fake.submit([1] * 40)
    fake.clock.now += 1
    fake.engine.tick()

    remaining_s = progress(fake, generation)[0].estimated_remaining_s
    # 16 tokens take 1.6 s, whatever the context; the last, shorter chunk took as long.
    assert remaining_s == pytest.approx(12.0, rel=0.05)


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
