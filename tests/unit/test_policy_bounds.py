"""Policies that are given as a bound: how it is read, and which measured recipe it stands for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.errors import InvalidField, PolicyUnsupported
from kvcluster.policy_bounds import AutoBound, MeasuredRecipe, parse_bound, resolve


def recipe(policy: str, ratio: float, increase: float, recall: float = 1.0) -> MeasuredRecipe:
    return MeasuredRecipe(
        policy=policy,
        ratio=ratio,
        perplexity_increase=increase,
        perplexity_error=0.001,
        recall=recall,
    )


WANTED = "want ppl<=1%, ratio>=4 or recall>=98% after auto:, got"
RECIPES = (
    recipe("int8", 1.9, 0.0005),
    recipe("int4", 3.8, 0.004),
    recipe("rotated4", 3.8, 0.003),
    recipe("latent", 7.3, 0.006, recall=4 / 6),
    recipe("latent:r=0.5", 5.1, 0.009),
    recipe("int2", 6.4, 0.03),
)
BOUNDS = st.builds(
    AutoBound,
    max_perplexity_increase=st.none() | st.floats(0, 1, allow_subnormal=False),
    min_ratio=st.floats(1, 1e9),
    min_recall=st.floats(0, 1, allow_subnormal=False),
) | st.builds(AutoBound, max_perplexity_increase=st.integers(0, 10_000).map(lambda n: n / 10_000))


@pytest.mark.parametrize(
    ("text", "bound", "canonical"),
    [
        ("auto: ppl<=1%", AutoBound(max_perplexity_increase=0.01), "auto: ppl<=1%"),
        (" auto :ppl <= .50 %", AutoBound(max_perplexity_increase=0.005), "auto: ppl<=0.5%"),
        ("auto:ratio>=4", AutoBound(min_ratio=4), "auto: ratio>=4"),
        (
            "auto: ratio >= 4.5, ppl<=100%",
            AutoBound(max_perplexity_increase=1.0, min_ratio=4.5),
            "auto: ppl<=100%, ratio>=4.5",
        ),
        (
            "auto: recall>=98.5%, ppl<=1%",
            AutoBound(max_perplexity_increase=0.01, min_recall=0.985),
            "auto: ppl<=1%, recall>=98.5%",
        ),
        ("auto: ratio>=4, recall>=100%", AutoBound(min_ratio=4), "auto: ratio>=4"),
    ],
)
def test_a_bound_is_read_with_either_limit_or_both(
    text: str, bound: AutoBound, canonical: str
) -> None:
    assert parse_bound(text) == bound
    assert str(bound) == canonical


@given(BOUNDS)
def test_a_bound_that_is_written_is_read_as_what_was_meant(bound: AutoBound) -> None:
    assert parse_bound(str(bound)) == bound


@pytest.mark.parametrize("text", ["", "int4", "automatic: ppl<=1%", "int4 + auto: ppl<=1%"])
def test_what_does_not_begin_with_auto_is_no_bound(text: str) -> None:
    assert parse_bound(text) is None


@pytest.mark.parametrize(
    ("text", "position", "sentence"),
    [
        ("auto", 6, f"{WANTED} ''"),
        ("auto:", 6, f"{WANTED} ''"),
        ("auto: ppl<=1%,", 15, f"{WANTED} ''"),
        ("auto: ppl>=1%", 7, f"{WANTED} 'ppl>=1%'"),
        ("auto: loss<=1%", 7, f"{WANTED} 'loss<=1%'"),
        ("auto: ratio>4", 7, f"{WANTED} 'ratio>4'"),
        ("auto: ratio=4", 7, f"{WANTED} 'ratio=4'"),
        ("auto: 1<=ratio>=4", 7, f"{WANTED} '1<=ratio>=4'"),
        ("auto: ppl<=1", 12, "ppl is a percentage: 1%, got '1'"),
        ("auto: ppl<= -1%", 13, "ppl must be at least 0 and at most 1, got '-1%'"),
        ("auto: ppl<=nan%", 12, "ppl must be a number, got 'nan%'"),
        ("auto: ratio>=", 14, "ratio must be a number, got ''"),
        ("auto: ratio>=0.5", 14, "ratio must be at least 1, got '0.5'"),
        ("auto: ratio>=4, ratio>=5", 17, "ratio is bounded twice"),
        ("auto: ppl<=1%, recall>=98", 24, "recall is a percentage: 1%, got '98'"),
        ("auto: ppl<=1%, recall>=101%", 24, "recall must be at least 0 and at most 1, got '101%'"),
        (
            "auto: recall>=98%",
            1,
            "recall is bounded beside ppl or ratio: auto: ppl<=1%, recall>=98%",
        ),
        ("auto: ppl<=1% + window", 17, "auto stands alone: it chooses every method"),
    ],
)
def test_a_mistake_in_a_bound_is_quoted_with_its_place(
    text: str, position: int, sentence: str
) -> None:
    with pytest.raises(InvalidField) as info:
        parse_bound(text)

    assert info.value.message == f"policy: at character {position}: {sentence}"


@pytest.mark.parametrize(
    ("bound", "policy"),
    [
        ("auto: ppl<=1%", "latent:r=0.5"),
        ("auto: ppl<=0.4%", "rotated4"),
        ("auto: ppl<=0.1%", "int8"),
        ("auto: ppl<=5%", "int2"),
        ("auto: ratio>=1", "int8"),
        ("auto: ratio>=3", "rotated4"),
        ("auto: ratio>=4", "latent:r=0.5"),
        ("auto: ratio>=6", "int2"),
        ("auto: ratio>=3, ppl<=1%", "latent:r=0.5"),
        ("auto: ratio>=3, ppl<=0.3%", "rotated4"),
    ],
)
def test_a_bound_stands_for_the_best_recipe_that_keeps_every_needle(
    bound: str, policy: str
) -> None:
    assert resolve(bound_of(bound), RECIPES) == policy


def test_the_recall_gate_is_the_callers_to_lower() -> None:
    assert resolve(bound_of("auto: ppl<=1%, recall>=60%"), RECIPES) == "latent"


@given(st.permutations(RECIPES), BOUNDS)
def test_the_order_of_the_table_does_not_matter(
    recipes: list[MeasuredRecipe], bound: AutoBound
) -> None:
    def outcome(table: list[MeasuredRecipe] | tuple[MeasuredRecipe, ...]) -> str:
        try:
            return resolve(bound, table)
        except PolicyUnsupported as error:
            return error.message

    assert outcome(recipes) == outcome(RECIPES)


@given(BOUNDS)
def test_what_is_chosen_keeps_to_the_bound(bound: AutoBound) -> None:
    try:
        chosen = resolve(bound, RECIPES)
    except PolicyUnsupported:
        return
    (found,) = (each for each in RECIPES if each.policy == chosen)

    assert found.recall >= bound.min_recall
    assert found.ratio >= (bound.min_ratio or 0)
    assert found.perplexity_increase <= (
        math.inf if bound.max_perplexity_increase is None else bound.max_perplexity_increase
    )


@pytest.mark.parametrize(
    ("bound", "nearest"),
    [
        ("auto: ppl<=0.01%", "int8 (ratio 1.9, perplexity +0.05% ± 0.10%, recall 1)"),
        ("auto: ratio>=7", "int2 (ratio 6.4, perplexity +3.00% ± 0.10%, recall 1)"),
        ("auto: ppl<=1%, ratio>=6", "int2 (ratio 6.4, perplexity +3.00% ± 0.10%, recall 1)"),
        ("auto: ppl<=1%, ratio>=9", "int2 (ratio 6.4, perplexity +3.00% ± 0.10%, recall 1)"),
    ],
)
def test_a_bound_that_nothing_meets_is_refused_with_the_nearest(bound: str, nearest: str) -> None:
    with pytest.raises(PolicyUnsupported) as info:
        resolve(bound_of(bound), RECIPES)

    assert info.value.message.startswith(f"{bound}: no measured policy keeps to it")
    assert info.value.message.endswith(f"the nearest is {nearest}")
    assert info.value.metadata["nearest"] == nearest.partition(" ")[0]


def test_where_no_recipe_keeps_the_needles_the_one_with_most_is_named() -> None:
    recipes = (recipe("a", 9.0, 0.0, recall=0.5), recipe("b", 2.0, 0.0, recall=0.75))

    with pytest.raises(PolicyUnsupported, match=r"recall of 1; the nearest is b \(.*recall 0.75\)"):
        resolve(bound_of("auto: ppl<=1%"), recipes)


def test_a_model_without_measurements_says_how_to_get_them() -> None:
    with pytest.raises(PolicyUnsupported, match="run `kvcluster calibrate`"):
        resolve(bound_of("auto: ppl<=1%"), ())


@pytest.mark.parametrize("bound", ["auto: ppl<=1%", "auto: ratio>=1"])
def test_a_measurement_that_failed_is_no_candidate(bound: str) -> None:
    recipes = (
        recipe("overflow", 9.0, math.nan),
        recipe("unscored", 9.0, 0.0, recall=math.nan),
        *RECIPES,
        recipe("infinite", 9.0, math.inf),
    )

    assert resolve(bound_of(bound), recipes) == resolve(bound_of(bound), RECIPES)


def bound_of(text: str) -> AutoBound:
    bound = parse_bound(text)
    assert bound is not None
    return bound
