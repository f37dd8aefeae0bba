"""The policy language: how a request names the compression of its cache.

    latent:r=0.25,bits=4 + heavy_hitters:budget=0.2
    auto: ppl<=1%, ratio>=4

A policy is one method for each plug-point, in any order; what is left out takes its default. A
bound (`auto`) stands for a policy that was measured to meet it. White space is free.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Final, TypeAlias

import msgspec

from kvcluster.policy_text import MAX_NUMBER, Part, fault, quoted, read_number, whole_text
from kvcluster.types import Policy

AUTO = "auto"
Value: TypeAlias = int | float | str
Arguments: TypeAlias = Mapping[str, Value]
"""Of a method, by name. Every parameter is there, defaults filled in."""

_WORD = re.compile(r"[A-Za-z0-9_.-]+")


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


def parse_policy(text: str, menu: Menu) -> Policy:
    """The policy that `text` names; empty: exact storage of every token, all of them read.

    Raises: InvalidField that quotes the offending part, with the 1-based character at which it
    stands as `metadata["position"]`.
    """
    whole = whole_text(text)
    chosen: dict[PlugPoint, Choice] = {}
    for part in whole.split("+") if whole.text else ():
        name = part.split(":")[0]
        if name.text == AUTO:
            raise fault(name, f"{AUTO} stands alone: it chooses every method")
        method = _named(name, menu.methods)
        choice = _choice(part, method)
        other = chosen.get(method.plug_point)
        if other is not None:
            raise fault(
                part, f"{quoted(part)} is a second {method.plug_point} beside {other}: name one"
            )
        chosen[method.plug_point] = choice
    return Policy(**{plug_point.value: choice.text for plug_point, choice in chosen.items()})


def parse_choice(text: str, methods: Iterable[Method]) -> Choice:
    """One method with its arguments, such as a part of `Policy`. Raises: InvalidField."""
    part = whole_text(text)
    return _choice(part, _named(part.split(":")[0], tuple(methods)))


def choice_text(name: str, arguments: Arguments) -> str:
    """A method in the policy language, for `parse_choice` to check."""
    given = ",".join(f"{key}={value_text(value)}" for key, value in arguments.items())
    return f"{name}:{given}" if given else name


def value_text(value: Value) -> str:
    """The shortest text that is read back as this value."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_NUMBER:
        return str(int(value))
    # A plus sign would end the method.
    return str(value).replace("e+", "e")


def _named(name: Part, methods: Sequence[Method]) -> Method:
    for method in methods:
        if method.name == name.text:
            return method
    if not name.text:
        raise fault(name, "a method is missing: '+' stands between two")
    offered = "; ".join(
        f"{plug_point}: {', '.join(m.name for m in methods if m.plug_point is plug_point)}"
        for plug_point in PlugPoint
        if any(method.plug_point is plug_point for method in methods)
    )
    nearest = _nearest(name.text, [*(method.name for method in methods), AUTO])
    raise fault(name, f"no method is called {quoted(name)}{nearest}; {offered}")


def _choice(part: Part, method: Method) -> Choice:
    given: dict[str, Value] = {}
    parameters = {parameter.name: parameter for parameter in method.parameters}
    for argument in part.after(":").split(",") if ":" in part.text else ():
        key = argument.split("=")[0]
        if key.text in given:
            raise fault(argument, f"{key.text} of {method.name} is given twice")
        if "=" not in argument.text or not key.text:
            raise fault(argument, f"want NAME=VALUE for {method.name}, got {quoted(argument)}")
        if key.text not in parameters:
            has = f"it has {', '.join(parameters)}" if parameters else "it has none"
            nearest = _nearest(key.text, parameters)
            raise fault(key, f"no parameter {quoted(key)} of {method.name}{nearest}; {has}")
        given[key.text] = read_value(argument.after("="), parameters[key.text], key.text)
    changed = {
        name: given[name]
        for name, parameter in parameters.items()
        if name in given and given[name] != parameter.default
    }
    arguments = {name: parameter.default for name, parameter in parameters.items()} | changed
    return Choice(method.name, arguments, choice_text(method.name, changed))


def read_value(part: Part, parameter: Parameter, name: str) -> Value:
    """What a parameter is given, as its type. Raises: InvalidField."""
    value: Value = part.text
    if not isinstance(parameter.default, str):
        value = read_number(part, name, is_whole=isinstance(parameter.default, int))
    rule = parameter.fault_of(value)
    if rule:
        raise fault(part, f"{name} {rule}, got {quoted(part)}")
    return value


def _nearest(word: str, offered: Iterable[str]) -> str:
    found = difflib.get_close_matches(word.lower(), offered, n=1)
    return f" (did you mean {found[0]}?)" if found else ""
