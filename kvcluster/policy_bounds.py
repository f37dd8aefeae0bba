"""Bounds in place of policies: `auto: ppl<=1%, ratio>=4` is a policy measured to meet them."""

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
    """What a policy must keep to, in place of its name. One of both is set, or both."""

    max_perplexity_increase: float | None = None
    """Relative to the exact cache: 0.01 is 1 %."""
    min_ratio: float | None = None
    """Bytes of the exact cache per byte stored."""

    def __str__(self) -> str:
        limits = []
        if self.max_perplexity_increase is not None:
            percent = (Decimal(repr(self.max_perplexity_increase)) * 100).normalize()
            limits.append(f"ppl<={percent:f}%")
        if self.min_ratio is not None:
            limits.append(f"ratio>={value_text(self.min_ratio)}")
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
            raise fault(part, f"want ppl<=1% or ratio>=4 after {AUTO}:, got {quoted(part)}")
        if parameter.name in given:
            raise fault(part, f"{matched[1]} is bounded twice")
        number = stripped(matched[3], part.at + matched.start(3))
        if matched[1] == "ppl" and not number.text.endswith("%"):
            raise fault(number, f"ppl is a percentage: 1%, got {quoted(number)}")
        given[parameter.name] = float(read_value(number, parameter, matched[1]))
    return AutoBound(**given)


def resolve(bound: AutoBound, recipes: Sequence[MeasuredRecipe], *, min_recall: float = 1.0) -> str:
    """The measured policy for a bound: the smallest cache within the perplexity; where a ratio
    alone is given, the least perplexity at that ratio. Recipes below `min_recall` are left out.

    Raises: PolicyUnsupported when none meets the bound, or none was measured.
    """
    if not recipes:
        raise PolicyUnsupported(
            f"{bound}: nothing has been measured on this model: run `kvcluster calibrate` and "
            "serve with its file, or name a policy"
        )
    most = bound.max_perplexity_increase
    measured = [recipe for recipe in recipes if math.isfinite(recipe.perplexity_increase)]
    recalling = [recipe for recipe in measured if recipe.recall >= min_recall]
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
        f"{bound}: no measured policy keeps to it with a recall of {min_recall:g}; the nearest is "
        f"{nearest}",
        metadata={"nearest": nearest.policy},
    )


_LIMITS: Final = {
    "ppl<=": Parameter(
        name="max_perplexity_increase", meaning="", default=0.0, lowest=0, highest=1
    ),
    "ratio>=": Parameter(name="min_ratio", meaning="", default=1.0, lowest=1),
}


def _by_perplexity(recipe: MeasuredRecipe) -> tuple[float, float, str]:
    return recipe.perplexity_increase, -recipe.ratio, recipe.policy


def _by_size(recipe: MeasuredRecipe) -> tuple[float, float, str]:
    return -recipe.ratio, recipe.perplexity_increase, recipe.policy
