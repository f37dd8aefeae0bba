"""Bytes that ranks keep beside the pages, counted without a tensor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.engine.footprint import footprint
from kvcluster.engine.kept_beside import KeptBeside
from kvcluster.policy import Menu
from kvcluster.retention.offered import RETENTION_METHODS, SCORED, budgeted
from kvcluster.retention.registry import scored_retention
from kvcluster.selection.offered import SELECTION_METHODS, needs_of
from kvcluster.selection.registry import build_selection
from kvcluster.types import EXACT, LayerGeometry, ModelSpec, Policy
from tests.fake_engine import FakeCluster, model_spec, sampling
from tests.fake_ring import expected_output

SIZE = 4
BY_SCORE = (
    "heavy_hitters:budget=0.3,epoch=16",
    "snap:budget=0.5,epoch=16,queries=5",
    "key_diversity:budget=0.1,recent=0,epoch=8",
)
RETENTIONS = ("full", "window:recent=12", *BY_SCORE)
SELECTIONS = (
    "all",
    "block_sparse:local=2",
    "estimated:share=0.5",
    "estimated:share=0.5,by=bound",
    "quest:tokens=16",
)


def layer(window: int | None = None, kv_layer: int | None = None) -> LayerGeometry:
    return LayerGeometry(
        num_query_heads=4,
        num_kv_heads=2,
        key_dim=8,
        value_dim=8,
        scale=1.0,
        window=window,
        kv_layer=kv_layer,
    )


def spec_of(*layers: LayerGeometry) -> ModelSpec:
    return ModelSpec(
        name="counted",
        layers=layers,
        vocab_size=8,
        max_context_tokens=1000,
        eos_token_ids=(),
        dtype="bfloat16",
        bytes_per_element=2,
        weights_digest="",
        tokenizer_digest="",
    )


@given(
    retention=st.sampled_from(RETENTIONS),
    selection=st.sampled_from(SELECTIONS),
    num_tokens=st.integers(1, 130),
)
def test_the_most_is_the_most_of_all_lengths_until_then(
    retention: str, selection: str, num_tokens: int
) -> None:
    policy = Policy(retention=retention, selection=selection)
    beside = KeptBeside(policy, spec_of(layer()), SIZE)

    found = beside.most_bytes(num_tokens)

    assert found == max(beside.num_bytes(length) for length in range(num_tokens + 1))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_engine_knows_what_a_selection_needs(selection: str) -> None:
    method = build_selection(selection, SIZE)

    assert needs_of(selection) == (method.needs if method is not None else "nothing")


@pytest.mark.parametrize("retention", BY_SCORE)
def test_the_engine_counts_marks_as_the_method_makes_them(retention: str) -> None:
    counted, method = budgeted(retention, SIZE), scored_retention(retention, SIZE)

    assert counted is not None
    assert method is not None
    assert counted.carries_mass == method.carries_mass
    for position in range(0, 64, SIZE):
        start = counted.epoch_start(position)
        assert counted.first_observed(start) == method.first_observed(start)


def test_every_method_is_tested() -> None:
    assert {text.split(":")[0] for text in BY_SCORE} == {method.name for method in SCORED}
    assert {text.split(":")[0] for text in SELECTIONS} == {
        method.name for method in SELECTION_METHODS
    }


def test_only_layers_without_a_window_and_with_keys_of_their_own_count() -> None:
    policy = Policy(retention=BY_SCORE[0], selection="quest:tokens=16")
    alone = KeptBeside(policy, spec_of(layer()), SIZE)
    others = KeptBeside(policy, spec_of(layer(window=8), layer(), layer(kv_layer=1)), SIZE)

    assert others.most_bytes(100) == alone.most_bytes(100) > 0
    assert (alone.group, others.group) == (0, 1)


def test_a_policy_that_chooses_nothing_keeps_nothing() -> None:
    beside = KeptBeside(Policy(), spec_of(layer()), SIZE)

    assert beside.most_bytes(1000) == 0


@pytest.mark.parametrize("retention", RETENTIONS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_sequence_alone_gets_on_in_what_admission_counts(selection: str, retention: str) -> None:
    policy, prompt = Policy(retention=retention, selection=selection), list(range(1, 76))
    menu = Menu((*RETENTION_METHODS, *SELECTION_METHODS))
    spec = model_spec(eos_token_ids=())
    counting = FakeCluster(spec=spec, menu=menu, num_ranks=1)
    (needed,) = footprint(
        policy, spec, 80, counting.partition, block_size=SIZE, chunk_tokens=SIZE
    ).blocks
    fake = FakeCluster(spec=spec, menu=menu, num_ranks=1, num_blocks=needed)

    generation = fake.submit(prompt, 6, policy=str(policy).removeprefix(f"{EXACT} + "))
    fake.run()

    assert fake.output(generation) == expected_output(
        prompt, sampling(), max_output_tokens=6, spec=spec
    )
    assert fake.num_leaked == 0


@pytest.mark.parametrize(("policy", "num_starts"), [("all", 2), ("quest:tokens=12", 3)])
def test_what_is_kept_beside_counts_against_the_tenants_share(policy: str, num_starts: int) -> None:
    """Two sequences of 40 tokens: 10 blocks each, of 128 bytes, and 10 summaries of 40."""
    fake = FakeCluster(
        spec=model_spec(eos_token_ids=()),
        menu=Menu(SELECTION_METHODS),
        num_ranks=1,
        num_blocks=26,
    )
    generations = [
        fake.submit(list(range(first, first + 36)), 5, policy=policy) for first in (1, 41)
    ]

    fake.run()

    assert all(len(fake.output(generation)) == 5 for generation in generations)
    # 20 blocks are there for both, 28 blocks' worth are not: one has to wait for the other.
    assert sum(len(plan.started) for plan in fake.plans) == num_starts
    assert fake.num_leaked == 0
