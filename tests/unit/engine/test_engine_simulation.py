"""Any interleaving of uploads, steps, cancels, deadlines, preemptions and changes of tenants'
shares gives each request the tokens that it would have alone, breaks no floor, and leaves nothing
behind.
"""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcluster.cache.tier import TierShare
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import Admitted, CacheMode, Finished, FinishReason
from kvcluster.errors import AdmissionError, ContextTooLong, InvalidField
from kvcluster.policy import Menu, Method, PlugPoint
from kvcluster.retention.offered import RETENTION_METHODS
from kvcluster.tenancy.limits import NO_LIMITS
from kvcluster.types import DEFAULT_TENANT, GenerationId, SamplingParams, TenantId
from tests.fake_engine import VOCAB_SIZE, FakeCluster, model_spec, packed, request, sampling
from tests.fake_ring import expected_output

WINDOWS: Sequence[tuple[int | None, ...]] = ((None,), (None, 6), (9,), (3, None, 17))
CODECS = {"half": 16, "fifth": 41, "stepped": 25}
STEPS = {"stepped": 3}
"""Blocks that are encoded at a time."""
MENU = Menu(
    (
        *(Method(plug_point=PlugPoint.CODEC, name=name, meaning="") for name in CODECS),
        *RETENTION_METHODS,
    )
)
"""Blocks of a page by codec."""


TENANTS = (DEFAULT_TENANT, TenantId("blue"), TenantId("red"))

COMMON = tuple(position * position % VOCAB_SIZE for position in range(90))
"""What prompts begin with, so that requests share blocks."""
RETENTIONS = (
    "window:recent={1}",
    "window:recent={4}",
    "heavy_hitters:budget=0.2,epoch={2}",
    "snap:budget=0.7,epoch={8},queries=1",
    "key_diversity:budget=1,epoch={1}",
)
"""{n}: n blocks."""


def lacking(cluster: FakeCluster) -> int:
    """Blocks that floors promise and that are not there."""
    ledger = cluster.partitions.ledger
    free = [sum(pool.num_free for pool in groups) for groups in zip(*cluster.pools, strict=True)]
    promised = [ledger.floor_left(tenant) for tenant in TENANTS]
    return sum(max(0, sum(floors) - left) for *floors, left in zip(*promised, free, strict=True))


class Sent:
    """What the client knows of one request."""

    def __init__(self, prompt: list[int], max_output_tokens: int, params: SamplingParams) -> None:
        self.prompt = prompt
        self.max_output_tokens = max_output_tokens
        self.params = params
        self.num_sent = 0
        self.is_complete = False


class EngineSimulation(RuleBasedStateMachine):
    """Clients and the ring take turns in any order. The fake ring distrusts every plan."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 8]),
        chunk=st.sampled_from([1, 5, 8, 16, 64]),
        num_ranks=st.integers(1, 4),
        capacity_tokens=st.integers(40, 260),
        shard_min=st.sampled_from([1, 8, 30, 1000]),
        windows=st.sampled_from(WINDOWS),
        lookahead=st.integers(1, 3),
        max_running=st.integers(1, 6),
        exact_recent=st.sampled_from([0, 4, 9]),
        keeps_blocks=st.sampled_from([True, True, False]),
    )
    def build(
        self,
        block_size: int,
        chunk: int,
        num_ranks: int,
        capacity_tokens: int,
        shard_min: int,
        windows: tuple[int | None, ...],
        lookahead: int,
        max_running: int,
        exact_recent: int,
        keeps_blocks: bool,
    ) -> None:
        self.cluster = FakeCluster(
            spec=model_spec(windows=windows, max_context_tokens=200),
            cache=CacheConfig(
                block_size=block_size,
                capacity_tokens=1024,
                exact_recent_tokens=exact_recent,
                prefix_cache=keeps_blocks,
            ),
            config=EngineConfig(
                prefill_chunk_tokens=chunk,
                shard_min_tokens=shard_min,
                lookahead_steps=lookahead,
                max_running=max_running,
                max_waiting=8,
                upload_window_chunks=2,
                retention_s=1e9,
            ),
            num_ranks=num_ranks,
            num_blocks=-(-capacity_tokens // (block_size * num_ranks)),
            menu=MENU,
            encoded_per_page={name: [count] * len(windows) for name, count in CODECS.items()},
            encoded_steps=STEPS,
        )
        self.block_size = block_size
        self.lookahead = lookahead
        self.lacking = 0
        self.sent: dict[GenerationId, Sent] = {}

    @rule(
        common=st.integers(0, 90),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30),
        cache_mode=st.sampled_from(CacheMode),
        namespace=st.sampled_from(["", "", "", "a"]),
        max_output_tokens=st.integers(1, 70),
        seed=st.integers(0, 3),
        stop=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        is_declared=st.booleans(),
        is_sent_at_once=st.booleans(),
        priority=st.sampled_from([0, 0, 0, 7]),
        deadline_s=st.sampled_from([None, None, None, None, 5.0, 20.0]),
        codec=st.sampled_from(["exact", "exact", *CODECS]),
        retention=st.sampled_from(["full", "full", *RETENTIONS]),
        scores_prompt=st.booleans(),
        tenant=st.sampled_from(TENANTS),
        weight=st.integers(1, 3),
    )
    def submit(
        self,
        *,
        common: int,
        own: list[int],
        cache_mode: CacheMode,
        namespace: str,
        max_output_tokens: int,
        seed: int,
        stop: list[int],
        is_declared: bool,
        is_sent_at_once: bool,
        priority: int,
        deadline_s: float | None,
        codec: str,
        retention: str,
        scores_prompt: bool,
        tenant: TenantId,
        weight: int,
    ) -> None:
        prompt = [*COMMON[:common], *own]
        policy = f"{codec} + {retention.format(*(n * self.block_size for n in range(9)))}"
        params = sampling(
            seed=seed,
            stop_token_ids=tuple(stop),
            prompt_logprobs=0 if scores_prompt else None,
        )
        try:
            generation = self.cluster.engine.submit(
                request(
                    max_output_tokens,
                    sampling=params,
                    input_tokens=len(prompt) if is_declared else None,
                    priority=priority,
                    policy=policy,
                    deadline_s=deadline_s,
                    cache_mode=cache_mode,
                    cache_namespace=namespace,
                    disconnect_grace_s=3_600.0,
                    tenant=tenant,
                    limits=msgspec.structs.replace(NO_LIMITS, weight=weight),
                )
            )
        except AdmissionError:
            return
        self.sent[generation] = Sent(prompt, max_output_tokens, params)
        if is_sent_at_once:
            self.send(generation, len(prompt))
            if generation in self.unfinished():
                self.finish(generation)

    @rule(data=st.data(), size=st.integers(1, 40))
    def upload(self, data: st.DataObject, size: int) -> None:
        able = [generation for generation in self.uploading() if self.can_go_on(generation)]
        if able:
            self.go_on(data.draw(st.sampled_from(able)), size)

    def uploading(self) -> list[GenerationId]:
        return [
            generation for generation in self.unfinished() if not self.sent[generation].is_complete
        ]

    def can_go_on(self, generation: GenerationId) -> bool:
        sent = self.sent[generation]
        is_held_back = not self.cluster.engine.prompt_room(generation)
        return sent.num_sent == len(sent.prompt) or not is_held_back

    def go_on(self, generation: GenerationId, size: int) -> None:
        """The client's next call: a chunk, or the end of the prompt after the last one."""
        sent = self.sent[generation]
        if sent.num_sent == len(sent.prompt):
            self.finish(generation)
        else:
            self.send(generation, size)

    def send(self, generation: GenerationId, size: int) -> None:
        sent = self.sent[generation]
        piece = sent.prompt[sent.num_sent : sent.num_sent + size]
        try:
            self.cluster.engine.append_prompt(generation, packed(piece))
        except (AdmissionError, ContextTooLong, InvalidField) as error:
            self.cluster.engine.fail(generation, error)
            return
        sent.num_sent += len(piece)

    def finish(self, generation: GenerationId) -> None:
        self.cluster.engine.finish_prompt(generation)
        self.sent[generation].is_complete = True

    @rule(count=st.integers(1, 12))
    def plan(self, count: int) -> None:
        for _ in range(count):
            if len(self.cluster.answers) >= self.lookahead:
                self.cluster.answer()
            self.cluster.plan()

    @rule(
        floors=st.tuples(*(st.sampled_from([0, 0, 0.2, 0.4]) for _ in TENANTS)),
        limits=st.tuples(*(st.sampled_from([0.3, 0.7, 1, 1]) for _ in TENANTS)),
        chance=st.integers(0, 3),
    )
    def change_shares(
        self, floors: tuple[float, ...], limits: tuple[float, ...], chance: int
    ) -> None:
        if chance:
            return
        total = self.cluster.partitions.ledger.total_bytes
        shares = {
            tenant: TierShare(
                floor_bytes=int(total * min(floor, limit)), limit_bytes=int(total * limit)
            )
            for tenant, floor, limit in zip(TENANTS, floors, limits, strict=True)
        }
        self.cluster.partitions.apply(shares)
        self.lacking = lacking(self.cluster)

    @precondition(lambda self: self.cluster.answers)
    @rule()
    def answer(self) -> None:
        self.cluster.answer()

    @rule(data=st.data(), chance=st.integers(0, 5))
    def cancel(self, data: st.DataObject, chance: int) -> None:
        if self.sent and not chance:
            self.cluster.engine.cancel(data.draw(st.sampled_from(sorted(self.sent))))

    @rule(seconds=st.floats(0.1, 3))
    def wait(self, seconds: float) -> None:
        self.cluster.clock.now += seconds
        self.cluster.engine.tick()
        if self.cluster.engine.next_wakeup() <= self.cluster.clock.now:
            # The next step was to be planned late, and it is late.
            self.cluster.plan()
        assert self.cluster.engine.next_wakeup() > self.cluster.clock.now

    @invariant()
    def events_are_well_formed(self) -> None:
        for generation in getattr(self, "sent", {}):
            events = self.cluster.events(generation)
            assert isinstance(events[0], Admitted)
            assert not any(isinstance(event, Finished) for event in events[:-1])

    @invariant()
    def books_are_exact_and_no_floor_loses_a_block(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.check_books()
            # Less only after a change of shares: what was borrowed before comes back by and by.
            assert lacking(self.cluster) <= self.lacking
            self.lacking = lacking(self.cluster)

    @invariant()
    def outputs_begin_like_those_of_the_request_alone(self) -> None:
        for generation, sent in getattr(self, "sent", {}).items():
            output = self.cluster.output(generation)
            assert output == self.alone(sent)[: len(output)]

    @invariant()
    def scores_follow_the_prompt(self) -> None:
        for generation, sent in getattr(self, "sent", {}).items():
            scores = self.cluster.scores(generation)
            assert scores == self.expected_scores(sent)[: len(scores)]

    def expected_scores(self, sent: Sent) -> list[float]:
        if sent.params.prompt_logprobs is None:
            return []
        return [-float(token) for token in sent.prompt[1:]]

    def alone(self, sent: Sent) -> list[int]:
        return expected_output(
            sent.prompt,
            sent.params,
            max_output_tokens=sent.max_output_tokens,
            spec=self.cluster.spec,
        )

    def unfinished(self) -> list[GenerationId]:
        return [
            generation
            for generation in self.sent
            if not self.cluster.engine.find(generation).log.is_finished
        ]

    def teardown(self) -> None:
        if not hasattr(self, "cluster"):
            return
        for _ in range(2000):
            self.cluster.run()
            if not self.uploading():
                break
            able = [generation for generation in self.uploading() if self.can_go_on(generation)]
            assert able, "an engine with nothing to do lets someone upload"
            self.go_on(able[0], 7)
        assert self.unfinished() == []
        for generation, sent in self.sent.items():
            finished = self.cluster.finished(generation)
            if finished.reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert self.cluster.output(generation) == self.alone(sent)
                assert self.cluster.scores(generation) == self.expected_scores(sent)
            else:
                # Cancelled, late, or not able to fit: never the engine's own fault.
                assert finished.error_kind in ("", "QuotaExceeded")
        assert self.cluster.num_leaked == 0


EngineSimulation.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# A failure is worth the minutes in which it is made small.
TestEngineSimulation = pytest.mark.timeout(600)(EngineSimulation.TestCase)


@pytest.mark.timeout(600)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=2, max_size=8),
    spare_blocks=st.integers(0, 6),
    block_size=st.sampled_from([1, 4, 8]),
    num_ranks=st.integers(1, 3),
    shard_min=st.sampled_from([1, 20, 1000]),
    windows=st.sampled_from(WINDOWS),
    lookahead=st.integers(1, 3),
)
@example(  # What is kept of a window stands before a block that its request goes on reading.
    lengths=[(3, 11), (49, 5)],
    spare_blocks=1,
    block_size=4,
    num_ranks=1,
    shard_min=1,
    windows=(None, 6),
    lookahead=1,
)
@settings(max_examples=150, deadline=None)
def test_requests_that_fight_for_blocks_all_get_their_own_tokens(
    lengths: list[tuple[int, int]],
    spare_blocks: int,
    block_size: int,
    num_ranks: int,
    shard_min: int,
    windows: tuple[int | None, ...],
    lookahead: int,
) -> None:
    """The pools hold the largest request and hardly more, so most requests are preempted."""
    largest = max(prompt + output for prompt, output in lengths)
    cluster = FakeCluster(
        spec=model_spec(windows=windows, eos_token_ids=()),
        cache=CacheConfig(block_size=block_size),
        config=EngineConfig(
            prefill_chunk_tokens=16, shard_min_tokens=shard_min, lookahead_steps=lookahead
        ),
        num_ranks=num_ranks,
        num_blocks=-(-(-(-largest // block_size) + spare_blocks) // num_ranks),
    )
    prompts = [
        [(index + position) % VOCAB_SIZE for position in range(num_prompt_tokens)]
        for index, (num_prompt_tokens, _) in enumerate(lengths)
    ]
    generations = [
        cluster.submit(prompt, max_output_tokens)
        for prompt, (_, max_output_tokens) in zip(prompts, lengths, strict=True)
    ]

    cluster.run()

    for generation, prompt, (_, max_output_tokens) in zip(
        generations, prompts, lengths, strict=True
    ):
        assert cluster.reason(generation) is FinishReason.LENGTH
        assert cluster.output(generation) == expected_output(
            prompt, sampling(), max_output_tokens=max_output_tokens, spec=cluster.spec
        )
    assert cluster.num_leaked == 0
