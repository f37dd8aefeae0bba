"""Work of parts of steps, and the pace that is learnt from them."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.engine.step_cost import CostModel, Pace, Work
from tests.fake_engine import model_spec


def counted(start: int, end: int, window: int | None) -> int:
    """Keys that positions [start, end) see, one by one."""
    return sum(min(position + 1, window or position + 1) for position in range(start, end))


@given(
    history=st.integers(0, 60),
    num_tokens=st.integers(1, 40),
    window=st.sampled_from([None, 1, 7, 30, 500]),
)
def test_attention_is_two_operations_a_number_of_each_key_and_value_that_is_seen(
    history: int, num_tokens: int, window: int | None
) -> None:
    spec = model_spec(windows=(window,))
    layer = spec.layers[0]
    per_key = 2 * layer.num_query_heads * (layer.key_dim + layer.value_dim)

    work = CostModel(spec).prefill(history, num_tokens)

    assert work.attention == per_key * counted(history, history + num_tokens, window)


def test_dense_work_is_what_the_model_says_and_else_that_of_its_hidden_size() -> None:
    spec = model_spec()
    known = msgspec.structs.replace(spec, dense_flops_per_token=1000)

    assert CostModel(known).prefill(500, 7).dense == 7000
    # 12 hidden² weights, two operations each; the queries are 2 x 4 wide.
    assert CostModel(spec).prefill(500, 7).dense == 7 * 24 * 8**2


def test_a_chunk_costs_more_the_longer_its_history_and_parts_cost_what_the_whole_does() -> None:
    cost = CostModel(model_spec(windows=(None, 16)))
    parts = [cost.prefill(start, 25) for start in range(0, 1000, 25)]

    assert parts == sorted(parts, key=lambda work: work.total)
    assert sum(work.total for work in parts) == cost.prefill(0, 1000).total


def test_a_decode_counts_its_history_more_than_a_row_of_a_chunk() -> None:
    cost = CostModel(model_spec())

    decode, row = cost.decode(1000), cost.prefill(1000, 1)

    assert decode.dense == row.dense
    assert decode.reading > 10 * row.attention


def test_the_pace_finds_what_each_kind_of_work_takes() -> None:
    draw, pace = random.Random(0), Pace()
    for _ in range(400):
        work = Work(draw.uniform(1, 100), draw.uniform(0, 300), draw.uniform(0, 50))
        pace.observe(work, (2 * work.dense + work.attention + 5 * work.reading) / 1000)

    assert pace.is_known
    for work, seconds in (
        (Work(dense=100), 0.2),
        (Work(attention=100), 0.1),
        (Work(reading=100), 0.5),
    ):
        assert pace.seconds(work) == pytest.approx(seconds, rel=0.01)


def test_steps_that_are_cut_to_the_same_time_do_not_make_work_seem_free() -> None:
    """A chunk of a longer history is shorter, so that all take 0.1 s, and 0.01 s beside."""
    pace = Pace()
    for history in range(400):
        tokens = 100 / (1 + history / 50)
        pace.observe(Work(dense=tokens, attention=tokens * history / 50), 0.11)

    # Half of it may well be fixed: nothing tells.
    assert 0.05 < pace.seconds(Work(dense=100)) <= 0.11
    assert pace.fixed_s + pace.seconds(Work(dense=100)) == pytest.approx(0.11, rel=0.1)
    both = Work(dense=25, attention=75)
    assert pace.fixed_s + pace.seconds(both) == pytest.approx(0.11, rel=0.1)


def test_what_a_step_takes_beside_its_work_is_told_apart_where_steps_differ() -> None:
    draw, pace = random.Random(0), Pace()
    for _ in range(400):
        tokens = draw.choice([16, 64, 512])
        pace.observe(Work(dense=tokens), 0.05 + tokens / 1000)

    assert pace.seconds(Work(dense=512)) == pytest.approx(0.512, rel=0.05)
    assert 0.025 <= pace.fixed_s <= 0.055


def test_a_step_is_expected_to_take_what_is_fixed_and_what_its_work_adds() -> None:
    pace = Pace()
    unknown = pace.step_s(Work(dense=5.0))
    for size in (1.0, 2.0, 3.0, 4.0, 5.0):
        pace.observe(Work(dense=size), 0.5 + size)

    work = Work(dense=3.0)
    assert unknown == 0.0
    assert pace.step_s(work) == pace.fixed_s + pace.seconds(work) == pytest.approx(3.5, rel=0.01)
    assert pace.step_s(Work()) == 0.0


def test_no_kind_of_work_ever_takes_less_than_nothing() -> None:
    draw, pace = random.Random(1), Pace()
    for _ in range(100):
        work = Work(draw.uniform(1, 9), draw.uniform(0, 9), draw.uniform(0, 9))
        pace.observe(work, draw.uniform(0.001, 1))
        assert min(pace.seconds(Work(*(i == j for j in range(3)))) for i in range(3)) >= 0


def test_a_machine_that_became_slower_is_noticed() -> None:
    pace = Pace()
    for seconds in [0.1] * 50 + [0.4] * 100:
        pace.observe(Work(dense=10), seconds)

    assert pace.fixed_s + pace.seconds(Work(dense=10)) == pytest.approx(0.4, rel=0.05)


def test_nothing_is_known_before_the_first_steps_and_empty_ones_teach_nothing() -> None:
    pace = Pace()
    for _ in range(9):
        pace.observe(Work(), 1.0)
    assert not pace.is_known
    # So little is held against nobody.
    assert 0 < pace.seconds(Work(dense=1e9)) < 0.01
