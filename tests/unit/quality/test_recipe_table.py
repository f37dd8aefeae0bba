"""What a calibration file says of a recipe, and which recipes no bound should ever name."""

import math

import pytest

from kvcluster.policy import parse_policy
from kvcluster.policy_bounds import MeasuredRecipe
from kvcluster.quality.recipe_table import DEFAULT_RECIPES, dominated, measured_recipe
from kvcluster.quality.records import RecallScore, Storage, TextScore
from kvcluster.quality.served import MENU
from kvcluster.quality.spans import Mean
from kvcluster.quality.stored import StoredBytes
from kvcluster.quality.sweep_records import RecipeScore

STORAGE = Storage.of(StoredBytes(num_tokens=100, encoded_elements=800, encoded_bytes=400))


def recipe(ratio: float, increase: float, recall: float = 1.0) -> MeasuredRecipe:
    return MeasuredRecipe(
        policy=f"{ratio}",
        ratio=ratio,
        perplexity_increase=increase,
        perplexity_error=0.001,
        recall=recall,
    )


def score(increase: float, num_found: int, num_found_by_exact: int) -> RecipeScore:
    text = TextScore(
        policy="int4",
        text="text",
        text_digest="0",
        num_tokens=100,
        first_scored=10,
        exact_nll=1.0,
        nll_increase=Mean(value=increase / 100, standard_error=None),
        perplexity_increase_percent=Mean(value=increase, standard_error=0.5),
        kl=Mean(value=0.0, standard_error=None),
        top1_agreement=Mean(value=1.0, standard_error=None),
        storage=STORAGE,
    )
    recall = RecallScore(
        policy="int4",
        document="document",
        num_tokens=90,
        needles=(),
        num_found=num_found,
        num_found_by_exact=num_found_by_exact,
        num_found_of_exact=num_found,
        storage=STORAGE,
    )
    return RecipeScore(policy="int4", device="cpu", seconds=1.0, texts=(text,), recall=(recall,))


def test_a_recipe_is_written_in_shares_not_percent() -> None:
    assert measured_recipe(score(2.0, 3, 4)) == MeasuredRecipe(
        policy="int4",
        ratio=4.0,
        perplexity_increase=0.02,
        perplexity_error=0.005,
        recall=0.75,
    )


def test_where_the_exact_cache_finds_nothing_nothing_is_lost() -> None:
    found = measured_recipe(score(2.0, 0, 0))

    assert found is not None
    assert found.recall == 1.0


@pytest.mark.parametrize("increase", [math.nan, math.inf])
def test_a_recipe_whose_predictions_are_no_numbers_is_left_out(increase: float) -> None:
    assert measured_recipe(score(increase, 1, 1)) is None


def test_a_recipe_is_dominated_by_one_that_is_nowhere_worse_and_somewhere_better() -> None:
    recipes = [recipe(2, 0.01), recipe(4, 0.01), recipe(4, 0.01), recipe(8, 0.02, 0.9)]

    assert dominated(recipes) == [True, False, False, False]


def test_less_recall_is_kept_only_for_something_better() -> None:
    assert dominated([recipe(4, 0.01), recipe(4, 0.01, 0.5)]) == [False, True]


def test_default_recipes_are_a_dozen_different_policies_in_canonical_spelling() -> None:
    assert [str(parse_policy(text, MENU)) for text in DEFAULT_RECIPES] == [*DEFAULT_RECIPES]
    assert len(set(DEFAULT_RECIPES)) == len(DEFAULT_RECIPES) >= 12
