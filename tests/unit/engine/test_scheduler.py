"""What is in the plans, seen through an engine on a fake ring (block size 4, chunk 16)."""

import pytest

from kvcluster.cache.capacity import block_bytes_per_group
from kvcluster.cache.tier import TierShare
from kvcluster.config import EngineConfig
from kvcluster.engine.api import FinishReason
from kvcluster.engine.plan import StepPlan
from kvcluster.types import DEFAULT_TENANT, LayerGeometry, Route
from tests.fake_engine import FakeCluster, model_spec, packed, request
from tests.fake_ring import expected_output

PROMPT = list(range(1, 41))


def cluster(**fields: object) -> FakeCluster:
    fields.setdefault("spec", model_spec(eos_token_ids=()))
    return FakeCluster(**fields)  # type: ignore[arg-type]


def config(**fields: object) -> EngineConfig:
    defaults: dict[str, object] = {"prefill_chunk_tokens": 16, "shard_min_tokens": 16}
    return EngineConfig(**(defaults | fields))  # type: ignore[arg-type]


def shapes(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    assert plan is not None
    return [(part.sequence, part.start, part.num_tokens) for part in plan.sequences]


def owners(fake: FakeCluster, sequence: int = 1) -> list[int]:
    return fake.ring.sequences[sequence].owners


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded() -> None:
    fake = cluster()
    fake.submit(PROMPT, 3)

    assert [shapes(fake.step()) for _ in range(5)] == [
        [(1, 0, 16)],
        [(1, 16, 16)],
        [(1, 32, 8)],
        [(1, 40, 1)],
        [(1, 41, 1)],
    ]


def test_only_the_step_with_the_last_prompt_token_samples() -> None:
    fake = cluster()
    fake.submit(PROMPT, 2)
    for _ in range(4):
        fake.step()

    assert [part.samples for plan in fake.plans for part in plan.sequences] == [
        False,
        False,
        True,
        True,
    ]


def test_decodes_of_running_requests_ride_with_prefill_chunks_of_others() -> None:
    fake = cluster()
    fake.submit(PROMPT[:5], 9)
    fake.step()
    fake.submit(PROMPT)

    # One decode leaves 15 tokens of the step, which is three whole blocks.
    assert shapes(fake.step()) == [(1, 5, 1), (2, 0, 12)]


def test_several_prompts_share_a_step() -> None:
    fake = cluster()
    fake.submit(PROMPT[:5])
    fake.submit(PROMPT[:6])
    fake.submit(PROMPT[:9])

    assert shapes(fake.step()) == [(1, 0, 5), (2, 0, 6), (3, 0, 4)]


def test_prefill_gets_a_whole_block_however_many_requests_decode() -> None:
    fake = cluster(config=config(prefill_chunk_tokens=4))
    for _ in range(5):
        fake.submit(PROMPT[:3], 50)
        fake.step()
    fake.submit(PROMPT)

    assert shapes(fake.step())[-1] == (6, 0, 4)


def test_look_ahead_plans_a_decode_before_its_token_is_known() -> None:
    fake = cluster()
    fake.submit(PROMPT[:5], 3)
    fake.plan()

    plan = fake.plan()

    assert shapes(plan) == [(1, 5, 1)]
    assert plan is not None
    assert plan.sequences[0].token_ids == b""


def test_the_higher_priority_is_prefilled_first_even_before_one_that_has_begun() -> None:
    fake = cluster()
    fake.submit(PROMPT)
    fake.step()
    fake.submit(PROMPT[:20], priority=3)

    assert shapes(fake.step()) == [(2, 0, 16)]
    assert shapes(fake.step()) == [(2, 16, 4), (1, 16, 12)]


def test_an_upload_is_prefilled_in_whole_blocks_while_it_runs() -> None:
    fake = cluster()
    generation = fake.engine.submit(request())
    fake.engine.append_prompt(generation, packed(PROMPT[:4]))
    assert fake.step() is None

    fake.engine.append_prompt(generation, packed(PROMPT[4:11]))
    assert shapes(fake.step()) == [(1, 0, 8)]
    assert fake.step() is None

    fake.engine.finish_prompt(generation)
    assert shapes(fake.step()) == [(1, 8, 3)]


def test_a_short_request_stays_on_one_rank() -> None:
    fake = cluster()
    fake.submit(PROMPT[:15], 20)
    for _ in range(15):
        fake.step()

    assert set(owners(fake)) == {0}


def test_short_requests_spread_over_the_emptiest_ranks() -> None:
    fake = cluster()
    for _ in range(4):
        fake.submit(PROMPT[:4])
    fake.step()

    assert sorted(sequence.owners for sequence in fake.ring.sequences.values()) == [
        [0],
        [0],
        [1],
        [1],
    ]


def test_a_long_request_is_dealt_in_zigzag() -> None:
    fake = cluster(config=config(prefill_chunk_tokens=32))
    fake.submit(PROMPT[:32])
    fake.step()

    assert owners(fake) == [0, 0, 1, 1, 1, 1, 0, 0]


def test_a_request_of_declared_length_is_spread_from_its_first_chunk() -> None:
    fake = cluster()
    generation = fake.engine.submit(request(input_tokens=40))
    fake.engine.append_prompt(generation, packed(PROMPT[:9]))
    fake.step()

    assert sorted(owners(fake)) == [0, 1]


def test_a_request_that_turns_out_long_spreads_later() -> None:
    fake = cluster()
    generation = fake.engine.submit(request())
    fake.engine.append_prompt(generation, packed(PROMPT[:12]))
    fake.step()
    assert set(owners(fake)) == {0}

    fake.engine.append_prompt(generation, packed(PROMPT[12:40]))
    fake.step()
    assert set(owners(fake)) == {0, 1}


def test_blocks_of_a_sharded_decode_rotate_over_the_ranks() -> None:
    fake = cluster(num_ranks=3)
    fake.submit(PROMPT[:24], 25)
    for _ in range(24):
        fake.step()

    grown = owners(fake)[6:]
    assert sorted(grown) == [0, 0, 1, 1, 2, 2]


def test_a_request_overflows_to_the_rank_that_has_blocks() -> None:
    fake = cluster(num_blocks=2)
    fake.submit(PROMPT[:14], 2)
    fake.step()

    assert owners(fake) == [0, 0, 1, 1]


def test_the_last_to_arrive_is_preempted_and_recomputed_without_repeating_an_event() -> None:
    fake = cluster(num_ranks=1, num_blocks=6)
    first = fake.submit(PROMPT[:4], 16)
    second = fake.submit(PROMPT[:7], 12)

    fake.run()

    num_starts = sum(len(plan.started) for plan in fake.plans)
    assert num_starts > 2
    # The first one is decoded from its first step to its last without a break.
    assert [part.start for plan in fake.plans for part in plan.sequences if part.sequence == 1] == [
        0,
        *range(4, 19),
    ]
    for generation, prompt, count in ((first, PROMPT[:4], 16), (second, PROMPT[:7], 12)):
        assert fake.reason(generation) is FinishReason.LENGTH
        assert fake.output(generation) == expected_output(
            prompt,
            fake.engine.find(generation).request.spec.sampling,
            max_output_tokens=count,
            spec=fake.spec,
        )
    assert fake.num_leaked == 0


def test_a_part_of_a_prompt_that_is_on_its_way_is_all_prompt() -> None:
    fake = cluster()
    generation = fake.engine.submit(request(2))
    for start in (0, 18):
        fake.engine.append_prompt(generation, packed(PROMPT[start : start + 18]))
        fake.step()

    parts = [part for plan in fake.plans for part in plan.sequences]
    assert [(part.start, part.num_tokens) for part in parts] == [(0, 16), (16, 16)]
    assert all(part.num_prompt_tokens >= part.start + part.num_tokens for part in parts)


def test_output_that_is_computed_again_counts_as_output() -> None:
    fake = cluster(num_ranks=1, num_blocks=6)
    fake.submit(PROMPT[:4], 16)
    fake.submit(PROMPT[:7], 12)

    fake.run()

    # All sequences but the first are the second request: once from its start, then anew.
    again = [part for plan in fake.plans for part in plan.sequences if part.sequence > 1]
    assert max(part.num_tokens for part in again) > 7
    assert {part.num_prompt_tokens for part in again} == {7}


def test_a_preempted_request_restarts_only_when_its_steps_are_done() -> None:
    fake = cluster(num_ranks=1, num_blocks=6, config=config(lookahead_steps=8))
    first = fake.submit(PROMPT[:8], 16)
    second = fake.submit(PROMPT[:8], 8)
    while not fake.plans or not fake.plans[-1].ended:
        assert fake.plan() is not None

    preempted = fake.engine.find(second).request
    fake.engine.cancel(first)
    fake.plan()
    assert fake.partition.num_used == 0
    assert fake.plan() is None

    while preempted.num_steps_in_flight:
        assert preempted.sequence is None
        fake.answer()
    fake.run()
    assert fake.reason(second) is FinishReason.LENGTH


def test_a_request_that_can_get_no_block_even_alone_is_refused() -> None:
    """Admission counts blocks per group; pools of unlike shape can still have none together."""
    fake = cluster(num_ranks=2, num_blocks=4)
    generation = fake.submit(PROMPT[:30], 2)
    # What admission saw is no longer there: an operator lowered the limit.
    block_bytes = block_bytes_per_group(fake.spec, 4)[0]
    fake.partitions.apply({DEFAULT_TENANT: TierShare(limit_bytes=3 * block_bytes)})

    fake.run()

    assert fake.finished(generation).error_kind == "QuotaExceeded"
    assert fake.num_leaked == 0


def test_no_request_overtakes_a_waiting_one_that_needs_more_blocks() -> None:
    fake = cluster(num_ranks=1, num_blocks=10)
    fake.submit(PROMPT[:4], 30)
    fake.step()
    fake.submit(PROMPT[:36], 1)
    fake.submit(PROMPT[:4], 1)

    assert shapes(fake.step()) == [(1, 4, 1)]


def test_max_running_limits_who_holds_blocks() -> None:
    fake = cluster(config=config(max_running=2))
    for _ in range(3):
        fake.submit(PROMPT[:3], 9)
    fake.step()

    assert fake.engine.statistics().num_running == 2
    assert fake.engine.statistics().num_waiting == 1


def test_a_windowed_group_releases_what_no_later_query_reads() -> None:
    fake = cluster(spec=model_spec(windows=(None, 8), eos_token_ids=()))
    fake.submit(PROMPT, 10)
    for _ in range(10):
        fake.step()

    released = [release for plan in fake.plans for release in plan.released]
    assert {release.group for release in released} == {1}
    # The next query is at position 47 and sees 40 on: entry 10 is the first one kept.
    assert fake.ring.sequences[1].released_below == [0, 9]
    assert max(release.below for release in released) == 9


def test_a_model_with_windows_only_runs_prompts_longer_than_its_pools() -> None:
    fake = cluster(spec=model_spec(windows=(8,), eos_token_ids=()), num_ranks=1, num_blocks=9)
    prompt = [position % 100 for position in range(1000)]
    generation = fake.submit(prompt, 5)

    fake.run()

    assert fake.reason(generation) is FinishReason.LENGTH
    assert fake.num_leaked == 0


def test_the_route_is_chosen_per_chunk_by_the_function_given() -> None:
    asked: list[tuple[int, int, int]] = []

    def choose(
        layers: tuple[LayerGeometry, ...],
        *,
        num_new_tokens: int,
        num_history_tokens: int,
        num_ranks: int,
        element_bytes: float,
        stored_share: float,
    ) -> Route:
        asked.append((num_new_tokens, num_history_tokens, num_ranks))
        return Route.GATHER

    fake = cluster()
    fake.engine._scheduler._choose_route = choose
    fake.submit(PROMPT, 2)
    fake.run()

    assert asked == [(16, 0, 2), (16, 16, 2), (8, 32, 2)]
    routes = [part.route for plan in fake.plans for part in plan.sequences]
    assert routes == [Route.GATHER] * 3 + [Route.PASS_Q]


@pytest.mark.parametrize("route", ["pass_kv", "pass_q", "gather"])
def test_a_forced_route_is_used_for_every_chunk(route: str) -> None:
    fake = cluster(config=config(history_route=route))
    fake.submit(PROMPT, 1)
    fake.run()

    assert {part.route for plan in fake.plans for part in plan.sequences} == {Route(route)}


def test_a_sequence_that_never_started_is_not_named_in_a_plan() -> None:
    fake = cluster(config=config(max_running=1))
    fake.submit(PROMPT[:3], 3)
    waiting = fake.submit(PROMPT[:3], 3)
    fake.step()

    fake.engine.cancel(waiting)
    fake.run()

    assert {start.sequence for plan in fake.plans for start in plan.started} == {1}
    assert {sequence for plan in fake.plans for sequence in plan.ended} == {1}


def test_an_idle_engine_tells_the_ranks_once_what_to_forget() -> None:
    fake = cluster()
    generation = fake.submit(PROMPT[:3], 9)
    fake.step()
    fake.engine.cancel(generation)

    plan = fake.step()

    assert plan is not None
    assert (plan.sequences, plan.ended) == ((), (1,))
    assert fake.step() is None
    assert fake.num_leaked == 0


def test_with_nothing_to_do_there_is_no_plan() -> None:
    fake = cluster()
    fake.submit(PROMPT[:3], 1)
    fake.run()

    assert fake.plan() is None
