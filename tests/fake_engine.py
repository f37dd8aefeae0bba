"""An engine in one process with a fake ring, a clock that stands still until it is moved, and a
tokenizer of single characters.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvcluster.attention.strategy import choose_route
from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.block_table import BlockTable
from kvcluster.cache.capacity import block_bytes_per_group
from kvcluster.cache.partitions import CachePartitions
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Output,
    PromptScores,
)
from kvcluster.engine.engine import Engine
from kvcluster.engine.parts import EngineParts
from kvcluster.engine.plan import StepPlan, StepResult
from kvcluster.policy import Menu
from kvcluster.policy_bounds import MeasuredRecipe
from kvcluster.types import (
    DEFAULT_TENANT,
    EXACT,
    NO_BLOCK,
    GenerationId,
    LayerGeometry,
    ModelSpec,
    SamplingParams,
    TenantId,
)
from tests.fake_ring import FakeRing, Held

VOCAB_SIZE = 128


@dataclass
class FakeClock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now + 1e9


class CharacterTokenizer:
    """One token per character: its lowest seven bits. The encoder holds the last one back, as real
    ones may."""

    vocab_size = VOCAB_SIZE
    digest = "characters"

    def prompt_encoder(self) -> "CharacterEncoder":
        return CharacterEncoder()

    def output_decoder(self) -> "CharacterDecoder":
        return CharacterDecoder()


@dataclass
class CharacterEncoder:
    held: str = ""

    def push(self, text: str) -> list[int]:
        held = self.held + text
        self.held = held[-1:]
        return [ord(character) % 128 for character in held[:-1]]

    def finish(self) -> list[int]:
        return [ord(character) % 128 for character in self.held]


class CharacterDecoder:
    def push(self, token_id: int) -> str:
        return chr(token_id)

    def finish(self) -> str:
        return ""


def model_spec(
    *,
    windows: Sequence[int | None] = (None,),
    eos_token_ids: tuple[int, ...] = (0,),
    max_context_tokens: int = 100_000,
    has_tokenizer: bool = True,
) -> ModelSpec:
    return ModelSpec(
        name="fake",
        layers=tuple(
            LayerGeometry(
                num_query_heads=2, num_kv_heads=1, key_dim=4, value_dim=4, scale=0.5, window=window
            )
            for window in windows
        ),
        vocab_size=VOCAB_SIZE,
        max_context_tokens=max_context_tokens,
        eos_token_ids=eos_token_ids,
        dtype="float32",
        bytes_per_element=4,
        weights_digest="fake",
        tokenizer_digest=CharacterTokenizer.digest if has_tokenizer else "",
    )


def request(max_output_tokens: int = 4, **fields: object) -> GenerationRequest:
    return GenerationRequest(model="fake", max_output_tokens=max_output_tokens, **fields)  # type: ignore[arg-type]


def packed(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()


@dataclass
class FakeCluster:
    """An engine and its ring, driven by hand. Steps run when planned and answer when told."""

    spec: ModelSpec = field(default_factory=model_spec)
    cache: CacheConfig = field(
        default_factory=lambda: CacheConfig(block_size=4, exact_recent_tokens=0, prefix_cache=False)
    )
    config: EngineConfig = field(
        default_factory=lambda: EngineConfig(prefill_chunk_tokens=16, shard_min_tokens=16)
    )
    num_ranks: int = 2
    num_blocks: int = 32
    """Per rank and KV group."""
    tokenizer: CharacterTokenizer | None = None
    clock: FakeClock = field(default_factory=FakeClock)
    menu: Menu = field(default_factory=Menu)
    encoded_per_page: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By the text of a codec of the menu."""
    encoded_steps: Mapping[str, int] = field(default_factory=dict)
    """By the text of a codec whose blocks are encoded so many at a time."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """By the text of a policy, why it is refused."""
    recipes: Sequence[MeasuredRecipe] = ()
    default_policy: str = ""
    tenant_policies: Mapping[TenantId, str] = field(default_factory=dict)
    first_id: int = 1

    def __post_init__(self) -> None:
        num_groups = len(self.spec.windows)
        self.ring = FakeRing(
            self.spec,
            block_size=self.cache.block_size,
            exact_recent=self.cache.exact_recent_blocks,
            pool_sizes=[(self.num_blocks,) * num_groups] * self.num_ranks,
            encoded_per_page=self.encoded_per_page,
            encoded_step=self.encoded_steps.get,
        )
        self.pools = [
            [BlockPool(self.num_blocks) for _ in range(num_groups)] for _ in range(self.num_ranks)
        ]
        self.partitions = CachePartitions(
            self.pools,
            block_bytes=block_bytes_per_group(self.spec, self.cache.block_size),
            encoded_per_page=lambda codec: self.encoded_per_page[codec],
            exact_recent=self.cache.exact_recent_blocks,
            encoded_step=self.encoded_steps.get,
        )
        ids = iter(range(self.first_id, self.first_id + 1_000_000))
        self.engine = Engine(
            EngineParts(
                spec=self.spec,
                cache=self.cache,
                config=self.config,
                partitions=self.partitions,
                choose_route=choose_route,
                menu=self.menu,
                refusal=lambda policy: self.refused.get(str(policy)),
                recipes=self.recipes,
                default_policy=self.default_policy,
                tenant_policies=self.tenant_policies,
                tokenizer=self.tokenizer,
                clock=self.clock,
                new_id=lambda: f"generation-{next(ids)}",
            )
        )
        self.partition = self.partitions.of(DEFAULT_TENANT)
        self.answers: list[StepResult] = []
        self.plans: list[StepPlan] = []

    def submit(
        self, prompt: Sequence[int], max_output_tokens: int = 4, **fields: object
    ) -> GenerationId:
        """A request with its whole prompt."""
        generation = self.engine.submit(request(max_output_tokens, **fields))
        self.engine.append_prompt(generation, packed(prompt))
        self.engine.finish_prompt(generation)
        return generation

    def plan(self) -> StepPlan | None:
        """Plan a step and run it on the ring; the engine does not hear the answer yet."""
        plan = self.engine.next_plan()
        if plan is not None:
            self.plans.append(plan)
            self.answers.append(self.ring.execute(plan))
            self._compare_books()
        return plan

    def _compare_books(self) -> None:
        """Of entries that are still read, the engine and the ranks hold the same blocks."""
        for running in self.engine._scheduler.running:
            table = running.table
            assert table is not None
            assert running.sequence is not None
            on_ranks = self.ring.sequences[running.sequence]
            self._compare_tables(table, on_ranks.entries)
            if running.survivors is not None:
                # What no plan has told of yet comes last.
                self._compare_tables(running.survivors.table, on_ranks.survivors)

    def _compare_tables(self, table: BlockTable, entries: list[list[set[Held]]]) -> None:
        for group in table.groups:
            for entry in range(table.released_below[group], len(entries)):
                on_rank = {(held.codec, held.block_id) for held in entries[entry][group]}
                ids = (table.block_ids[group][entry], table.encoded_ids[group][entry])
                booked = zip((EXACT, table.codec), ids, strict=True)
                assert {held for held in booked if held[1] != NO_BLOCK} == on_rank

    def answer(self) -> None:
        """Tell the engine the oldest answer."""
        self.engine.complete(self.answers.pop(0))

    def step(self) -> StepPlan | None:
        """Plan, run and answer one step."""
        plan = self.plan()
        if plan is not None:
            self.answer()
        return plan

    def run(self, max_steps: int = 10_000) -> None:
        """Run until there is nothing to do, with `lookahead_steps` in flight."""
        for _ in range(max_steps):
            while len(self.answers) < self.config.lookahead_steps and self.plan() is not None:
                pass
            if not self.answers:
                return
            self.answer()
        raise AssertionError(f"not done after {max_steps} steps")

    def events(self, generation: GenerationId) -> list[Event]:
        events = self.engine.find(generation).log.after(0)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        return [event.event for event in events]

    def scores(self, generation: GenerationId) -> list[float]:
        """Log probabilities of the prompt, from its second token on."""
        scores: list[float] = []
        for event in self.events(generation):
            if isinstance(event, PromptScores):
                assert event.first == len(scores) + 1
                scores += event.logprobs
        return scores

    def output(self, generation: GenerationId) -> list[int]:
        outputs = [event for event in self.events(generation) if isinstance(event, Output)]
        ids: list[int] = []
        for output in outputs:
            assert output.index == len(ids)
            ids += output.token_ids
        return ids

    def text(self, generation: GenerationId) -> str:
        return "".join(event.text for event in self.events(generation) if isinstance(event, Output))

    def finished(self, generation: GenerationId) -> Finished:
        last = self.events(generation)[-1]
        assert isinstance(last, Finished)
        return last

    def reason(self, generation: GenerationId) -> FinishReason:
        return self.finished(generation).reason

    def evict_all(self) -> None:
        """Give up whatever is kept and not pinned."""
        for cache in self.engine._scheduler.prefixes._caches.values():
            for group in range(len(self.spec.windows)):
                cache.evict(group, 1 << 30)

    def check_books(self) -> None:
        """Assert that what is counted of blocks, used and idle, is exact."""
        self.partitions.check()
        for cache in self.engine._scheduler.prefixes._caches.values():
            cache.check()

    @property
    def num_leaked(self) -> int:
        """Blocks in use, in the engine's books and on the ranks, without those that are kept for
        later requests: these are given back first."""
        self.evict_all()
        return self.partitions.num_used + self.ring.num_used + len(self.ring.sequences)


def sampling(**fields: object) -> SamplingParams:
    return SamplingParams(**fields)  # type: ignore[arg-type]
