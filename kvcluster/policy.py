"""The policy language: how a request names the compression of its cache.

    latent:r=0.25,bits=4 + heavy_hitters:budget=0.2
    auto: ppl<=1%, ratio>=4

A policy is one method for each plug-point, in any order; what is left out takes its default. A
bound (`auto`) stands for a policy that was measured to meet it. White space is free.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias

import msgspec

from kvcluster.errors import InvalidField, PolicyUnsupported
from kvcluster.types import Policy

FIELD = "policy"
AUTO = "auto"
MAX_CHARS = 1000
Value: TypeAlias = int | float | str
Arguments: TypeAlias = Mapping[str, Value]
"""Of a method, by name. Every parameter is there, defaults filled in."""

_MAX_QUOTED = 40
_MAX_NUMBER = 2**53
"""Beyond it, not every whole number has a float."""
_NUMBER = re.compile(r"(-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]-?[0-9]{1,3})?)(\s*%)?")
_WORD = re.compile(r"[A-Za-z0-9_.-]+")
_LIMIT = re.compile(r"([a-z]+)\s*([<>=]+)(.*)", re.DOTALL)


class PlugPoint(StrEnum):
    """A question that each policy answers with one method."""

    SHARING = "sharing"
    """Whose K and V does a layer and head read?"""
    CODEC = "codec"
    """How are the numbers written?"""
    RETENTION = "retention"
    """Which tokens stay?"""
    SELECTION = "selection"
    """Which of those does a query read?"""


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """What a method can be told. ValueError when the default is not allowed."""

    name: str
    meaning: str
    default: Value
    """Its type is the parameter's: whole number, number or word."""
    lowest: float | None = None
    highest: float | None = None
    """Inclusive, both."""
    is_lowest_open: bool = False
    """`lowest` itself is not allowed: for shares, which are over 0."""
    choices: tuple[Value, ...] = ()
    """The only values that are allowed; empty: all in the range."""

    def __post_init__(self) -> None:
        if self.fault_of(self.default):
            raise ValueError(f"the default of {self.name} {self.fault_of(self.default)}")

    def fault_of(self, value: Value) -> str:
        """What a value of the right type must be and is not; empty: it is allowed."""
        if self.choices:
            listed = ", ".join(map(value_text, self.choices))
            return "" if value in self.choices else f"must be one of {listed}"
        if isinstance(value, str):
            return "" if _WORD.fullmatch(value) else "must be a word of A-Z a-z 0-9 _ . -"
        above = self.lowest is None or value > self.lowest
        at_lowest = not self.is_lowest_open and value == self.lowest
        if (above or at_lowest) and (self.highest is None or value <= self.highest):
            return ""
        over = "over" if self.is_lowest_open else "at least"
        sides = ((over, self.lowest), ("at most", self.highest))
        given = [f"{side} {value_text(end)}" for side, end in sides if end is not None]
        return f"must be {' and '.join(given)}"


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to a plug-point's question."""

    plug_point: PlugPoint
    name: str
    meaning: str
    parameters: tuple[Parameter, ...] = ()

    def __str__(self) -> str:
        """The method with every parameter at its default: `latent:r=0.25,bits=4`."""
        return choice_text(self.name, {part.name: part.default for part in self.parameters})

    def choose(self, **arguments: Value) -> "Choice":
        """The method with these arguments. Raises: InvalidField, as for the same in text."""
        return parse_choice(choice_text(self.name, arguments), [self])


class Choice(msgspec.Struct, frozen=True):
    """A method and all its arguments, as `parse_choice` and `Method.choose` build it."""

    name: str
    arguments: dict[str, Value]
    text: str
    """Canonical: without the arguments that are at their default, in the method's order."""

    def __str__(self) -> str:
        return self.text


_DEFAULTS: Final = (
    Method(plug_point=PlugPoint.SHARING, name=Policy().sharing, meaning="as the model shares"),
    Method(plug_point=PlugPoint.CODEC, name=Policy().codec, meaning="as the model gives them"),
    Method(plug_point=PlugPoint.RETENTION, name=Policy().retention, meaning="every token"),
    Method(plug_point=PlugPoint.SELECTION, name=Policy().selection, meaning="all that is kept"),
)


class Menu(msgspec.Struct, frozen=True):
    """All methods that a deployment offers. Those of the default policy are always among them."""

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names) or AUTO in names:
            raise ValueError(f"a name in the policy language has one meaning: {sorted(names)}")
        missing = tuple(method for method in _DEFAULTS if method.name not in names)
        msgspec.structs.force_setattr(self, "methods", (*missing, *self.methods))

    def at(self, plug_point: PlugPoint) -> tuple[Method, ...]:
        return tuple(method for method in self.methods if method.plug_point is plug_point)


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


def parse_policy(text: str, menu: Menu) -> Policy:
    """The policy that `text` names; empty: exact storage of every token, all of them read.

    Raises: InvalidField that quotes the offending part, with the 1-based character at which it
    stands as `metadata["position"]`.
    """
    whole = _whole(text)
    chosen: dict[PlugPoint, Choice] = {}
    for part in whole.split("+") if whole.text else ():
        name = part.split(":")[0]
        if name.text == AUTO:
            raise _fault(name, f"{AUTO} stands alone: it chooses every method")
        method = _named(name, menu.methods)
        choice = _choice(part, method)
        other = chosen.get(method.plug_point)
        if other is not None:
            raise _fault(
                part, f"{_quoted(part)} is a second {method.plug_point} beside {other}: name one"
            )
        chosen[method.plug_point] = choice
    return Policy(**{plug_point.value: choice.text for plug_point, choice in chosen.items()})


def parse_choice(text: str, methods: Iterable[Method]) -> Choice:
    """One method with its arguments, such as a part of `Policy`. Raises: InvalidField."""
    part = _whole(text)
    return _choice(part, _named(part.split(":")[0], tuple(methods)))


def parse_bound(text: str) -> AutoBound | None:
    """The bound that `text` gives after `auto`; None: it is no bound but a policy.

    Raises: InvalidField as `parse_policy` does.
    """
    whole = _whole(text)
    if whole.split(":")[0].text != AUTO:
        return None
    if "+" in whole.text:
        raise _fault(whole.split("+")[1], f"{AUTO} stands alone: it chooses every method")
    given: dict[str, float] = {}
    for part in whole.after(":").split(","):
        matched = _LIMIT.fullmatch(part.text)
        parameter = _LIMITS.get(matched[1] + matched[2]) if matched else None
        if matched is None or parameter is None:
            raise _fault(part, f"want ppl<=1% or ratio>=4 after {AUTO}:, got {_quoted(part)}")
        if parameter.name in given:
            raise _fault(part, f"{matched[1]} is bounded twice")
        number = _stripped(matched[3], part.at + matched.start(3))
        if matched[1] == "ppl" and not number.text.endswith("%"):
            raise _fault(number, f"ppl is a percentage: 1%, got {_quoted(number)}")
        given[parameter.name] = float(_value(number, parameter, matched[1]))
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


def choice_text(name: str, arguments: Arguments) -> str:
    """A method in the policy language, for `parse_choice` to check."""
    given = ",".join(f"{key}={value_text(value)}" for key, value in arguments.items())
    return f"{name}:{given}" if given else name


def value_text(value: Value) -> str:
    """The shortest text that is read back as this value."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_NUMBER:
        return str(int(value))
    # A plus sign would end the method.
    return str(value).replace("e+", "e")


_LIMITS: Final = {
    "ppl<=": Parameter(
        name="max_perplexity_increase", meaning="", default=0.0, lowest=0, highest=1
    ),
    "ratio>=": Parameter(name="min_ratio", meaning="", default=1.0, lowest=1),
}


class _Part(NamedTuple):
    """Part of the user's text, without the white space around it."""

    text: str
    at: int
    """Character of the whole text at which it begins, from 1."""

    def split(self, separator: str) -> "list[_Part]":
        parts, at = [], self.at
        for raw in self.text.split(separator):
            parts.append(_stripped(raw, at))
            at += len(raw) + 1
        return parts

    def after(self, separator: str) -> "_Part":
        before, _, rest = self.text.partition(separator)
        return _stripped(rest, self.at + len(before) + 1)


def _whole(text: str) -> _Part:
    if len(text) > MAX_CHARS:
        raise InvalidField(FIELD, f"want at most {MAX_CHARS} characters, got {len(text)}")
    return _stripped(text, 1)


def _stripped(raw: str, at: int) -> _Part:
    return _Part(raw.strip(), at + len(raw) - len(raw.lstrip()))


def _named(name: _Part, methods: Sequence[Method]) -> Method:
    for method in methods:
        if method.name == name.text:
            return method
    if not name.text:
        raise _fault(name, "a method is missing: '+' stands between two")
    offered = "; ".join(
        f"{plug_point}: {', '.join(m.name for m in methods if m.plug_point is plug_point)}"
        for plug_point in PlugPoint
        if any(method.plug_point is plug_point for method in methods)
    )
    nearest = _nearest(name.text, [*(method.name for method in methods), AUTO])
    raise _fault(name, f"no method is called {_quoted(name)}{nearest}; {offered}")


def _choice(part: _Part, method: Method) -> Choice:
    given: dict[str, Value] = {}
    parameters = {parameter.name: parameter for parameter in method.parameters}
    for argument in part.after(":").split(",") if ":" in part.text else ():
        key = argument.split("=")[0]
        if key.text in given:
            raise _fault(argument, f"{key.text} of {method.name} is given twice")
        if "=" not in argument.text or not key.text:
            raise _fault(argument, f"want NAME=VALUE for {method.name}, got {_quoted(argument)}")
        if key.text not in parameters:
            has = f"it has {', '.join(parameters)}" if parameters else "it has none"
            nearest = _nearest(key.text, parameters)
            raise _fault(key, f"no parameter {_quoted(key)} of {method.name}{nearest}; {has}")
        given[key.text] = _value(argument.after("="), parameters[key.text], key.text)
    changed = {
        name: given[name]
        for name, parameter in parameters.items()
        if name in given and given[name] != parameter.default
    }
    arguments = {name: parameter.default for name, parameter in parameters.items()} | changed
    return Choice(method.name, arguments, choice_text(method.name, changed))


def _value(part: _Part, parameter: Parameter, name: str) -> Value:
    value: Value = part.text
    if not isinstance(parameter.default, str):
        value = _number(part, name, is_whole=isinstance(parameter.default, int))
    rule = parameter.fault_of(value)
    if rule:
        raise _fault(part, f"{name} {rule}, got {_quoted(part)}")
    return value


def _number(part: _Part, name: str, *, is_whole: bool) -> int | float:
    matched = _NUMBER.fullmatch(part.text)
    if matched is None:
        raise _fault(part, f"{name} must be a number, got {_quoted(part)}")
    number = Decimal(matched[1]).scaleb(-2 if matched[2] else 0)
    if abs(number) > _MAX_NUMBER:
        raise _fault(part, f"{name} is too large: {_quoted(part)}")
    if not is_whole:
        return float(number) + 0.0  # no negative zero
    if matched[2] or number != number.to_integral_value():
        raise _fault(part, f"{name} must be a whole number, got {_quoted(part)}")
    return int(number)


def _fault(part: _Part, rule: str) -> InvalidField:
    error = InvalidField(FIELD, f"at character {part.at}: {rule}")
    error.metadata["position"] = str(part.at)
    return error


def _quoted(part: _Part) -> str:
    is_long = len(part.text) > _MAX_QUOTED
    return repr(part.text[:_MAX_QUOTED] + "…" if is_long else part.text)


def _nearest(word: str, offered: Iterable[str]) -> str:
    found = difflib.get_close_matches(word.lower(), offered, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _by_perplexity(recipe: MeasuredRecipe) -> tuple[float, float, str]:
    return recipe.perplexity_increase, -recipe.ratio, recipe.policy


def _by_size(recipe: MeasuredRecipe) -> tuple[float, float, str]:
    return -recipe.ratio, recipe.perplexity_increase, recipe.policy
