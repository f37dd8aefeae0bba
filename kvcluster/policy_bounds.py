"""Bounds in place of policies: `auto: ppl<=1%, recall>=98%` is a policy measured to meet them."""

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Final

import msgspec

from kvcluster.errors import PolicyUnsupported
from kvcluster.policy import AUTO, Parameter, read_value, value_text
from kvcluster.policy_text import fault, quoted, stripped, whole_text

_LIMIT: Final = re.compile(r"([a-z]+)\s*([<>=]+)(.*)", re.DOTALL)


class AutoBound(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy must keep to, in place of its name. Perplexity or ratio is bounded, or both."""

    max_perplexity_increase: float | None = None
    """Relative to the exact cache: 0.01 is 1 %."""
    min_ratio: float | None = None
    """Bytes of the exact cache per byte stored."""
    min_recall: float = 1.0
    """Needles found, of those that the exact cache finds."""

    def __str__(self) -> str:
        limits = []
        if self.max_perplexity_increase is not None:
            limits.append(f"ppl<={_percent(self.max_perplexity_increase)}")
        if self.min_ratio is not None:
            limits.append(f"ratio>={value_text(self.min_ratio)}")
        if self.min_recall != 1:
            limits.append(f"recall>={_percent(self.min_recall)}")
        return f"{AUTO}: {', '.join(limits)}"


class MeasuredRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """A policy and what it cost on one model."""

    policy: str
    ratio: float
    """Bytes of the exact cache per byte stored."""
    perplexity_increase: float
    """Relative to the exact cache: 0.01 is 1 %."""
    perplexity_error: float
    """Standard error of that."""
    recall: float
    """Needles found, of those that the exact cache finds."""

    def __str__(self) -> str:
        return (
            f"{self.policy} (ratio {self.ratio:.3g}, perplexity "
            f"{self.perplexity_increase:+.2%} ± {self.perplexity_error:.2%}, "
            f"recall {self.recall:.3g})"
        )


class MeasuredTable(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured with one calibration, and how the cache was cut meanwhile: ratios,
    perplexity and recall are of that."""

    block_size: int
    exact_recent_tokens: int
    recipes: tuple[MeasuredRecipe, ...]


def parse_bound(text: str) -> AutoBound | None:
    """The bound that `text` gives after `auto`; None: it is no bound but a policy.

    Raises: InvalidField as `parse_policy` does.
    """
    whole = whole_text(text)
    if whole.split(":")[0].text != AUTO:
        return None
    if "+" in whole.text:
        raise fault(whole.split("+")[1], f"{AUTO} stands alone: it chooses every method")
    given: dict[str, float] = {}
    for part in whole.after(":").split(","):
        matched = _LIMIT.fullmatch(part.text)
        parameter = _LIMITS.get(matched[1] + matched[2]) if matched else None
        if matched is None or parameter is None:
            raise fault(part, f"want {_WANTED} after {AUTO}:, got {quoted(part)}")
        if parameter.name in given:
            raise fault(part, f"{matched[1]} is bounded twice")
        number = stripped(matched[3], part.at + matched.start(3))
        if matched[1] != "ratio" and not number.text.endswith("%"):
            raise fault(number, f"{matched[1]} is a percentage: 1%, got {quoted(number)}")
        given[parameter.name] = float(read_value(number, parameter, matched[1]))
    if set(given) == {"min_recall"}:
        raise fault(whole, f"recall is bounded beside ppl or ratio: {AUTO}: ppl<=1%, recall>=98%")
    return AutoBound(**given)


def resolve(bound: AutoBound, recipes: Sequence[MeasuredRecipe]) -> str:
    """The measured policy for a bound: the smallest cache within the perplexity; where a ratio
    alone is given, the least perplexity at that ratio. Recipes of too little recall are left out.

    Raises: PolicyUnsupported when none meets the bound, or none was measured.
    """
    if not recipes:
        raise PolicyUnsupported(
            f"{bound}: nothing has been measured on this model: run `kvcluster calibrate` and "
            "serve with its file, or name a policy"
        )
    most = bound.max_perplexity_increase
    measured = [recipe for recipe in recipes if math.isfinite(recipe.perplexity_increase)]
    recalling = [recipe for recipe in measured if recipe.recall >= bound.min_recall]
    small = [recipe for recipe in recalling if recipe.ratio >= (bound.min_ratio or 0.0)]
    good = [recipe for recipe in small if most is None or recipe.perplexity_increase <= most]
    if good:
        return min(good, key=_by_perplexity if most is None else _by_size).policy
    if small:
        nearest = min(small, key=_by_perplexity)
    elif recalling:
        nearest = min(recalling, key=_by_size)
    else:
        nearest = max(recipes, key=lambda recipe: recipe.recall)
    raise PolicyUnsupported(
        f"{bound}: no measured policy keeps to it with a recall of {bound.min_recall:g}; "
        f"the nearest is {nearest}",
        metadata={"nearest": nearest.policy},
    )


_LIMITS: Final = {
    "ppl<=": Parameter(
        name="max_perplexity_increase", meaning="", default=0.0, lowest=0, highest=1
    ),
    "ratio>=": Parameter(name="min_ratio", meaning="", default=1.0, lowest=1),
    "recall>=": Parameter(name="min_recall", meaning="", default=1.0, lowest=0, highest=1),
}
_WANTED: Final = "ppl<=1%, ratio>=4 or recall>=98%"


def _percent(share: float) -> str:
    return f"{(Decimal(repr(share)) * 100).normalize():f}%"


def _by_perplexity(recipe: MeasuredRecipe) -> tuple[float, float, str]:
    return recipe.perplexity_increase, -recipe.ratio, recipe.policy


def _by_size(recipe: MeasuredRecipe) -> tuple[float, float, str]:
    return -recipe.ratio, recipe.perplexity_increase, recipe.policy
