"""The recipes that a calibration measures, what a file says of them, and which are worth a choice.

`auto` reads the table: see `kvcluster.policy.resolve`.
"""

import math
from collections.abc import Sequence
from typing import Final

from kvcluster.policy_bounds import MeasuredRecipe
from kvcluster.quality.sweep_records import RecipeScore

DEFAULT_RECIPES: Final = (
    "exact",
    "int8",
    "int4",
    "int4:values=rotated3",
    "int4:values=rotated2",
    "rotated4",
    "rotated3",
    "int3",
    "latent:r=0.5,bits=8",
    "latent:r=0.75,bits=4,values=rotated3,ranks=adaptive",
    "latent:r=0.5,bits=4,values=rotated3,ranks=adaptive",
    "latent:r=0.375,bits=4,values=rotated3,ranks=adaptive",
    "latent:bits=4,values=rotated3,ranks=adaptive",
    "latent:bits=4,values=rotated2,ranks=adaptive",
    "latent:value_r=0.5,bits=4,ranks=filled,layers=6,scale_bits=8",
    "latent:r=0.1875,value_r=0.375,bits=4,ranks=filled,layers=6,scale_bits=8",
    "pooled:by=learned + exact",
)
"""From no loss to the smallest cache, and pooled heads, so that what they cost is known. Which of
them a model bears is what differs between models: some lose nothing with rotated keys, others need
a scale for each channel. Those of several layers are measured where `--layers` asked for bases."""


def measured_recipe(score: RecipeScore) -> MeasuredRecipe | None:
    """What a calibration file says of a policy; None for one whose predictions are no numbers.

    Where the exact cache finds no needle, none can be lost, and recall is 1.
    """
    increase, recall = score.perplexity_increase_percent, score.recall_share
    if increase is None or not math.isfinite(increase.value):
        return None
    return MeasuredRecipe(
        policy=score.policy,
        ratio=score.storage.ratio,
        perplexity_increase=increase.value / 100,
        perplexity_error=(increase.standard_error or 0.0) / 100,
        recall=1.0 if recall is None else recall,
    )


def dominated(recipes: Sequence[MeasuredRecipe]) -> list[bool]:
    """For each recipe, whether another is at least as good in size, perplexity and recall, and
    better in one of them. Errors do not count."""
    marks = [(recipe.ratio, -recipe.perplexity_increase, recipe.recall) for recipe in recipes]
    return [
        any(
            other != mark and all(o >= m for o, m in zip(other, mark, strict=True))
            for other in marks
        )
        for mark in marks
    ]
