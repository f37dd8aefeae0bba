"""The engine by hand: time stands still until it is moved, steps run when told."""

import pytest

from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import (
    Admitted,
    FinishReason,
    Output,
    Phase,
    Progress,
)
from kvcluster.errors import (
    ClusterOverloaded,
    ContextTooLong,
    InvalidField,
    PromptCorrupt,
    QuotaExceeded,
)
from kvcluster.types import GenerationId
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
    assert (first.policy, first.policy_source, first.queue_position) == ("exact", "request", 1)


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


def test_progress_comes_whenever_an_interval_passes_without_an_output() -> None:
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
        (Phase.DECODING, 20, 20),
    ]


def test_a_preempted_generation_tells_that_it_waits_and_is_computed_again() -> None:
    fake = cluster(
        num_ranks=1, num_blocks=6, config=EngineConfig(prefill_chunk_tokens=4, shard_min_tokens=16)
    )
    fake.submit(PROMPT[:4], 16)
    preempted = fake.submit(PROMPT[:7], 12)
    while fake.plan() is not None:
        fake.answer()
        fake.clock.now += 2
        fake.engine.tick()
    seen = [(each.phase, each.done_tokens) for each in progress(fake, preempted)]

    decoding = seen.index((Phase.DECODING, 7))
    waiting = seen.index((Phase.QUEUED, 0), decoding)
    assert (Phase.PREFILLING, 4) in seen[waiting:]
    assert fake.reason(preempted) is FinishReason.LENGTH


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
