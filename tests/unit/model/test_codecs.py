"""What a calibration's table says, and of which cache."""

import msgspec
import pytest

from kvcluster.codec.calibration import Calibration
from kvcluster.config import CacheConfig
from kvcluster.errors import CalibrationMismatch
from kvcluster.model.codecs import measured_table, table_mismatch
from kvcluster.policy_bounds import MeasuredRecipe, MeasuredTable

RECIPES = (
    MeasuredRecipe(
        policy="int4", ratio=3.5, perplexity_increase=0.01, perplexity_error=0.001, recall=1.0
    ),
)
TABLE = MeasuredTable(block_size=16, exact_recent_tokens=40, recipes=RECIPES)


def calibration(recipes_json: str) -> Calibration:
    return Calibration(
        weights_digest="", text_digests=(), num_tokens=0, layers=(), recipes_json=recipes_json
    )


def test_a_table_is_read_back() -> None:
    assert measured_table(calibration(msgspec.json.encode(TABLE).decode())) == TABLE


def test_an_older_table_is_of_the_cache_as_it_is_cut_by_default() -> None:
    older = calibration(msgspec.json.encode(RECIPES).decode())

    table = measured_table(older)

    assert table.recipes == RECIPES
    assert table_mismatch(table, CacheConfig()) == ""
    assert table_mismatch(table, CacheConfig(block_size=32)) != ""


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"recipes": []}'])
def test_a_table_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(CalibrationMismatch, match="table cannot be read"):
        measured_table(calibration(text))


@pytest.mark.parametrize(
    ("block_size", "exact_recent_tokens", "counts"),
    [(16, 40, True), (16, 33, True), (16, 48, True), (16, 49, False), (8, 40, False)],
)
def test_a_table_counts_where_rows_read_as_many_blocks_exact(
    block_size: int, exact_recent_tokens: int, counts: bool
) -> None:
    cache = CacheConfig(block_size=block_size, exact_recent_tokens=exact_recent_tokens)

    assert (table_mismatch(TABLE, cache) == "") == counts
