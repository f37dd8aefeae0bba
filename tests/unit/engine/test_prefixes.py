"""Requests of one tenant share the blocks of equal beginnings, and nobody can tell but by the time.

The fake ring keeps the tokens of every block and refuses a sequence that begins with blocks of
other tokens, or in other forms than a sequence of its length holds.
"""

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcluster.cache import block_keys
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import CacheMode, FinishReason, Progress
from kvcluster.types import DEFAULT_TENANT, GenerationId, TenantId
from tests.fake_engine import VOCAB_SIZE, FakeCluster, model_spec, packed, request, sampling
from tests.fake_ring import expected_output
from tests.unit.engine.test_engine_simulation import CODECS, MENU, STEPS, WINDOWS

PROMPT = [position * position % (VOCAB_SIZE - 1) + 1 for position in range(41)]
"""Ten whole blocks of four tokens, and one token."""


def cluster(*, windows: Sequence[int | None] = (None,), **fields: object) -> FakeCluster:
    defaults: dict[str, object] = {
        "spec": model_spec(windows=windows, eos_token_ids=()),
        "cache": CacheConfig(block_size=4, exact_recent_tokens=0),
        "menu": MENU,
        "encoded_per_page": {name: [count] * len(windows) for name, count in CODECS.items()},
        "encoded_steps": STEPS,
    }
    return FakeCluster(**defaults | fields)  # type: ignore[arg-type]


def cached(fake: FakeCluster, generation: GenerationId) -> int:
    return fake.finished(generation).usage.cached_input_tokens


def alone(fake: FakeCluster, prompt: Sequence[int], num_tokens: int = 4) -> list[int]:
    return expected_output(list(prompt), sampling(), max_output_tokens=num_tokens, spec=fake.spec)


def ran(fake: FakeCluster, prompt: Sequence[int], **fields: object) -> int:
    """Run one request, whose answer must be right; returns its cached tokens."""
    generation = fake.submit(prompt, **fields)
    fake.run()
    assert fake.output(generation) == alone(fake, prompt)
    return cached(fake, generation)


def test_a_prompt_that_was_computed_before_is_not_computed_again() -> None:
    fake = cluster()
    first = fake.submit(PROMPT)
    fake.run()
    num_computed = sum(step.num_tokens for plan in fake.plans for step in plan.sequences)
    second = fake.submit(PROMPT)
    fake.run()

    steps = [step.num_tokens for plan in fake.plans for step in plan.sequences]
    assert sum(steps) - num_computed == 1 + 3
    assert fake.output(second) == fake.output(first) == alone(fake, PROMPT)
    assert (cached(fake, first), cached(fake, second)) == (0, 40)
    assert fake.num_leaked == 0


def test_the_next_turn_of_a_conversation_begins_after_the_last_answer() -> None:
    fake = cluster()
    first = fake.submit(PROMPT, 8)
    fake.run()
    turn = [*PROMPT, *fake.output(first), 5, 6, 7]

    # The last output token is never fed back: 48 tokens are computed.
    assert ran(fake, turn) == 48


def test_a_prompt_that_differs_later_shares_what_comes_before() -> None:
    fake = cluster()
    ran(fake, PROMPT)

    assert ran(fake, [*PROMPT[:22], 99, 98, 97, 96]) == 20
    assert ran(fake, [99, *PROMPT[1:]]) == 0


@pytest.mark.parametrize("policy", ["half", "window:recent=8", "half + window:recent=12"])
def test_policies_that_give_blocks_up_share_what_ends_where_a_prompt_ended(policy: str) -> None:
    fake = cluster(cache=CacheConfig(block_size=4, exact_recent_tokens=8))
    ran(fake, PROMPT, policy=policy)

    assert ran(fake, [*PROMPT[:40], 99, 98], policy=policy) == 40
    # In the middle, what later rows read is not there in the form that they read, but the first
    # block, which every policy keeps exact.
    assert ran(fake, [*PROMPT[:22], 99, 98], policy=policy) == 4


def test_a_model_with_windows_shares_what_ends_where_a_prompt_ended() -> None:
    fake = cluster(windows=(6, None, 9))
    ran(fake, PROMPT)

    assert ran(fake, [*PROMPT[:40], 99, 98]) == 40
    assert ran(fake, [*PROMPT[:22], 99, 98]) == 0


def test_blocks_of_one_policy_are_read_under_no_other() -> None:
    fake = cluster()
    ran(fake, PROMPT, policy="half")

    assert ran(fake, PROMPT, policy="fifth") == 0
    assert ran(fake, PROMPT) == 0
    assert ran(fake, PROMPT, policy="half") == 40


@pytest.mark.parametrize("policy", ["snap:budget=0.5,epoch=8,queries=1"])
def test_a_policy_whose_rows_read_more_than_blocks_shares_nothing(policy: str) -> None:
    fake = cluster()
    ran(fake, PROMPT, policy=policy)

    assert ran(fake, PROMPT, policy=policy) == 0


def test_tenants_share_nothing() -> None:
    """Paired: the tenant's own second request does hit."""
    fake = cluster()
    ran(fake, PROMPT)

    assert ran(fake, PROMPT, tenant=TenantId("blue")) == 0
    assert ran(fake, PROMPT, tenant=TenantId("blue")) == 40
    assert ran(fake, PROMPT, tenant=DEFAULT_TENANT) == 40


def test_namespaces_of_a_tenant_share_nothing() -> None:
    fake = cluster()
    ran(fake, PROMPT, cache_namespace="one")

    assert ran(fake, PROMPT, cache_namespace="two") == 0
    assert ran(fake, PROMPT, cache_namespace="one") == 40


def test_a_request_that_reads_only_leaves_nothing() -> None:
    fake = cluster()
    assert ran(fake, PROMPT, cache_mode=CacheMode.READ_ONLY) == 0
    assert ran(fake, PROMPT) == 0

    assert ran(fake, [*PROMPT, 1, 2, 3], cache_mode=CacheMode.READ_ONLY) == 40
    assert ran(fake, [*PROMPT, 1, 2, 3]) == 40


def test_a_request_that_bypasses_reads_nothing_and_leaves_nothing() -> None:
    fake = cluster()
    assert ran(fake, PROMPT, cache_mode=CacheMode.BYPASS) == 0
    assert ran(fake, PROMPT) == 0

    assert ran(fake, PROMPT, cache_mode=CacheMode.BYPASS) == 0


def test_prompt_scores_are_computed_for_every_token() -> None:
    fake = cluster()
    ran(fake, PROMPT)
    generation = fake.submit(PROMPT, sampling=sampling(prompt_logprobs=0))
    fake.run()

    assert fake.scores(generation) == [-float(token) for token in PROMPT[1:]]
    assert cached(fake, generation) == 0


def test_a_prompt_is_not_computed_while_all_of_it_that_came_is_there() -> None:
    """Half of the prompt is known when the rest is still to come; none of it is computed again."""
    fake = cluster(config=EngineConfig(prefill_chunk_tokens=16, upload_window_chunks=1))
    ran(fake, PROMPT)
    generation = fake.engine.submit(request())
    for start in range(0, len(PROMPT), 8):
        assert fake.engine.prompt_room(generation) > 0
        fake.engine.append_prompt(generation, packed(PROMPT[start : start + 8]))
        fake.run()
    fake.engine.finish_prompt(generation)
    fake.run()

    assert fake.output(generation) == alone(fake, PROMPT)
    assert cached(fake, generation) == 40


def test_a_prompt_begins_as_soon_as_something_of_it_is_new() -> None:
    fake = cluster()
    ran(fake, PROMPT)
    generation = fake.engine.submit(request())
    fake.engine.append_prompt(generation, packed([*PROMPT[:20], 99, 98, 97, 96, 95]))
    fake.run()

    assert fake.engine.find(generation).request.num_computed == 24
    assert fake.engine.find(generation).request.num_cached == 20


def test_progress_tells_what_was_there() -> None:
    fake = cluster()
    ran(fake, PROMPT)
    generation = fake.submit(PROMPT, progress_interval_s=1.0)
    fake.plan()
    fake.clock.now += 2
    fake.engine.tick()

    [progress] = [event for event in fake.events(generation) if isinstance(event, Progress)]
    assert progress.cached_tokens == 40
    fake.run()


def test_requests_at_the_same_time_share_a_beginning_that_is_there() -> None:
    fake = cluster()
    ran(fake, PROMPT)
    used = fake.partition.num_used
    generations = [fake.submit([*PROMPT[:40], own]) for own in (1, 2, 3)]
    fake.plan()

    # One open block each: the others have three users and one more, the cache.
    assert fake.partition.num_used == used + 3
    fake.run()
    for own, generation in zip((1, 2, 3), generations, strict=True):
        assert fake.output(generation) == alone(fake, [*PROMPT[:40], own])
    assert fake.num_leaked == 0


def test_kept_blocks_give_way_to_requests_that_want_their_memory() -> None:
    fake = cluster(num_ranks=1, num_blocks=16)
    ran(fake, PROMPT)
    other = [99, *PROMPT[1:], *PROMPT[1:9]]

    assert ran(fake, other) == 0
    assert fake.engine._scheduler.prefixes.cache(DEFAULT_TENANT).statistics().num_evicted > 0
    assert ran(fake, other) == 48
    assert ran(fake, PROMPT) < 40


def test_the_least_recently_used_beginning_goes_first() -> None:
    fake = cluster(num_ranks=1, num_blocks=24)
    one, two = [1, *PROMPT[1:]], [2, *PROMPT[1:]]
    ran(fake, one)
    ran(fake, two)
    ran(fake, one)
    ran(fake, [3, *PROMPT[1:17]])

    assert ran(fake, one, cache_mode=CacheMode.READ_ONLY) == 40
    assert ran(fake, two, cache_mode=CacheMode.READ_ONLY) < 40


def test_forced_collisions_share_no_wrong_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys of one place are equal: only the comparison of tokens is left."""

    def digest(self: block_keys.BlockKeys, content: bytes) -> bytes:
        return len(self.keys).to_bytes(2, "little")

    monkeypatch.setattr(block_keys.BlockKeys, "_digest", digest)
    fake = cluster()
    ran(fake, PROMPT)

    assert ran(fake, [99, *PROMPT[1:]]) == 0
    assert ran(fake, [*PROMPT[:20], 99, *PROMPT[21:]]) == 20
    assert ran(fake, PROMPT) == 40


def test_keys_of_tenants_places_and_scopes_differ() -> None:
    scope = block_keys.Scope("model", "exact", 4, "")
    scopes = [
        scope,
        block_keys.Scope("other", "exact", 4, ""),
        block_keys.Scope("model", "int4", 4, ""),
        block_keys.Scope("model", "exact", 4, "namespace"),
    ]
    keys = set[bytes]()
    for secret in (b"a" * 32, b"b" * 32):
        for each in scopes:
            named = block_keys.BlockKeys(secret, each)
            named.extend(array("I", [7] * 12))
            keys |= set(named.keys)

    assert len(keys) == 2 * len(scopes) * 3


def test_a_ring_that_is_lost_takes_what_was_kept_with_it() -> None:
    fake = cluster()
    ran(fake, PROMPT)
    fake.engine.lose_ring("gone")

    assert fake.partition.num_used == 0
    assert len(fake.engine._scheduler.prefixes.cache(DEFAULT_TENANT)) == 0


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 60),
            st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=12),
            st.integers(1, 20),
        ),
        min_size=2,
        max_size=8,
    ),
    policy=st.sampled_from(
        ["exact", "half", "stepped", "window:recent=8", "fifth + window:recent=16"]
    ),
    at_once=st.integers(1, 3),
    spare_blocks=st.integers(0, 40),
    block_size=st.sampled_from([2, 4, 8]),
    num_ranks=st.integers(1, 4),
    shard_min=st.sampled_from([1, 20, 1000]),
    windows=st.sampled_from(WINDOWS),
    exact_recent=st.sampled_from([0, 5, 9]),
)
def test_whatever_is_shared_each_request_gets_its_own_tokens(
    requests: list[tuple[int, list[int], int]],
    policy: str,
    at_once: int,
    spare_blocks: int,
    block_size: int,
    num_ranks: int,
    shard_min: int,
    windows: tuple[int | None, ...],
    exact_recent: int,
) -> None:
    common = [position * position % VOCAB_SIZE for position in range(60)]
    fake = cluster(
        windows=windows,
        cache=CacheConfig(block_size=block_size, exact_recent_tokens=exact_recent),
        config=EngineConfig(prefill_chunk_tokens=16, shard_min_tokens=shard_min),
        num_ranks=num_ranks,
        num_blocks=-(-(96 // block_size + 24 + spare_blocks) // num_ranks) + 16,
    )
    policy = policy.replace("recent=8", f"recent={4 * block_size}")
    policy = policy.replace("recent=16", f"recent={2 * block_size}")
    prompts = [([*common[:shared], *own], length) for shared, own, length in requests]
    while prompts:
        batch, prompts = prompts[:at_once], prompts[at_once:]
        running = [fake.submit(prompt, length, policy=policy) for prompt, length in batch]
        fake.run()
        for (prompt, length), generation in zip(batch, running, strict=True):
            assert fake.reason(generation) is FinishReason.LENGTH
            assert fake.output(generation) == alone(fake, prompt, length)
    assert fake.num_leaked == 0
