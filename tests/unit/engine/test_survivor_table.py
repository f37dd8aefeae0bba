"""What the engine holds of a sequence that keeps tokens by score, counted without any token."""

import pytest

from kvcluster.engine.footprint import footprint
from kvcluster.engine.survivor_table import survivor_table
from kvcluster.errors import QuotaExceeded
from kvcluster.policy import Menu, Method, PlugPoint
from kvcluster.retention.offered import RETENTION_METHODS
from kvcluster.types import PAGE_BLOCKS, Policy
from tests.fake_engine import FakeCluster, model_spec, sampling
from tests.fake_ring import expected_output

PER_PAGE = 16
BLOCK_SIZE = 4
MENU = Menu(
    (Method(plug_point=PlugPoint.CODEC, name="half", meaning="2 bytes"), *RETENTION_METHODS)
)
TENTH = "heavy_hitters:budget=0.1,epoch=16"
HALF = "heavy_hitters:budget=0.5,epoch=16"


def cluster(*windows: int | None, **fields: object) -> FakeCluster:
    return FakeCluster(
        spec=model_spec(windows=windows or (None,), eos_token_ids=()),
        menu=MENU,
        encoded_per_page={"half": [PER_PAGE] * max(1, len(windows))},
        **fields,  # type: ignore[arg-type]
    )


def test_a_sequence_holds_its_survivors_and_its_open_epoch() -> None:
    fake = cluster(num_ranks=1)
    fake.submit(list(range(1, 71)), 8, policy=HALF)
    for _ in range(6):
        fake.step()

    (request,) = fake.engine._scheduler.running
    assert request.num_planned == 71
    # 64 of the tokens are in epochs that ended: 32 survive. 7 are in the open one.
    held = [fake.partition.held(table) for table in request.tables]
    assert held == [(2,), (8,)]
    # 32 positions of 4 bytes and 39 sums of 8 are 440 bytes, 4 blocks' worth of 128.
    assert fake.partition.num_used == 10 + 4
    block_bytes = BLOCK_SIZE * fake.spec.kv_bytes_per_token
    assert request.peak_kv_bytes == 10 * block_bytes + 440


def test_encoded_survivors_are_exact_in_their_first_and_last_block_only() -> None:
    fake = cluster(num_ranks=1)
    fake.submit(list(range(1, 66)), 8, policy=f"half + {TENTH.replace('0.1', '0.4')}")
    for _ in range(6):
        fake.step()

    (request,) = fake.engine._scheduler.running
    survivors = request.survivors
    assert survivors is not None
    # 26 survivors of 64 are 6 blocks and half a one.
    assert (len(survivors.table), survivors.table.num_exact(0)) == (7, 2)
    assert survivors.table.num_encoded(0) == 6
    assert request.table is not None
    assert (request.table.num_exact(0), request.table.num_encoded(0)) == (1, 0)


def test_no_chunk_goes_on_into_the_next_epoch() -> None:
    fake = cluster(num_ranks=1)
    fake.submit(list(range(1, 41)), 2, policy="snap:epoch=12,queries=4")
    fake.run()

    chunks = [(step.start, step.num_tokens) for plan in fake.plans for step in plan.sequences]
    assert chunks == [(0, 12), (12, 12), (24, 12), (36, 4), (40, 1)]


def test_layers_with_windows_throughout_keep_nothing_by_score() -> None:
    fake = cluster(9, num_ranks=1)
    generation = fake.submit(list(range(1, 41)), 2, policy=HALF)
    fake.run()

    assert survivor_table(Policy(retention=HALF), (9,), BLOCK_SIZE) is None
    assert len(fake.output(generation)) == 2
    assert not any(step.survivors for plan in fake.plans for step in plan.sequences)


@pytest.mark.parametrize("codec", ["exact", "half"])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 100])
def test_admission_counts_the_most_that_is_ever_held(codec: str, num_tokens: int) -> None:
    """A sequence alone gets on in just the blocks that admission counted."""
    policy = Policy(codec=codec, retention=HALF)
    fake = cluster(num_ranks=1)
    (needed,) = footprint(
        policy,
        fake.spec,
        num_tokens,
        fake.partition,
        block_size=BLOCK_SIZE,
        chunk_tokens=BLOCK_SIZE,
    ).blocks
    prompt = list(range(1, num_tokens + 1))
    # Encoded blocks take whole pages.
    unit = 1 if codec == "exact" else PAGE_BLOCKS
    enough = cluster(num_ranks=1, num_blocks=-(-needed // unit) * unit)

    generation = enough.submit(prompt, 1, policy=str(policy))
    enough.run()

    assert enough.output(generation) == expected_output(
        prompt, sampling(), max_output_tokens=1, spec=enough.spec
    )
    assert enough.num_leaked == 0


def test_one_block_less_than_that_is_refused() -> None:
    # Of 40 tokens 16 survive when 32 have been seen: 4 blocks beside the epoch's 4. Their positions
    # and the sums of theirs and the 8 open tokens take 256 bytes, 2 blocks' worth.
    prompt, policy = list(range(1, 41)), "heavy_hitters:budget=0.5,epoch=16"
    short, enough = (cluster(num_ranks=1, num_blocks=count) for count in (9, 10))

    generation = enough.submit(prompt, 1, policy=policy)
    with pytest.raises(QuotaExceeded, match="needs 10 cache blocks"):
        short.submit(prompt, 1, policy=policy)

    enough.run()
    assert len(enough.output(generation)) == 1


@pytest.mark.parametrize("policy", [HALF, "key_diversity:budget=1,epoch=8"])
@pytest.mark.parametrize("lookahead", [1, 2, 3])
@pytest.mark.parametrize("windows", [(None,), (6, None)])
def test_requests_that_fight_for_blocks_all_get_their_own_tokens(
    windows: tuple[int | None, ...], lookahead: int, policy: str
) -> None:
    fake = cluster(*windows, num_blocks=17)
    prompts = [[(start + place) % 100 + 1 for place in range(60)] for start in range(8)]
    generations = [fake.submit(prompt, 60, policy=policy) for prompt in prompts]

    fake.run()

    num_starts = sum(len(plan.started) for plan in fake.plans)
    assert num_starts > len(prompts), "some were preempted"
    for generation, prompt in zip(generations, prompts, strict=True):
        assert fake.output(generation) == expected_output(
            prompt, sampling(), max_output_tokens=60, spec=fake.spec
        )
    assert fake.num_leaked == 0
