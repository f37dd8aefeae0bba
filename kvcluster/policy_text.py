"""The text of a policy, cut into parts that know where they stand: a fault points there."""

import re
from decimal import Decimal
from typing import Final, NamedTuple

from kvcluster.errors import InvalidField

FIELD = "policy"
MAX_CHARS = 1000
_MAX_QUOTED = 40
MAX_NUMBER: Final = 2**53
"""Beyond it, not every whole number has a float."""
_NUMBER = re.compile(r"(-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]-?[0-9]{1,3})?)(\s*%)?")


class Part(NamedTuple):
    """Part of the user's text, without the white space around it."""

    text: str
    at: int
    """Character of the whole text at which it begins, from 1."""

    def split(self, separator: str) -> "list[Part]":
        parts, at = [], self.at
        for raw in self.text.split(separator):
            parts.append(stripped(raw, at))
            at += len(raw) + 1
        return parts

    def after(self, separator: str) -> "Part":
        before, _, rest = self.text.partition(separator)
        return stripped(rest, self.at + len(before) + 1)


def whole_text(text: str) -> Part:
    """All of it. Raises: InvalidField for more than `MAX_CHARS`."""
    if len(text) > MAX_CHARS:
        raise InvalidField(FIELD, f"want at most {MAX_CHARS} characters, got {len(text)}")
    return stripped(text, 1)


def stripped(raw: str, at: int) -> Part:
    """What begins at this character, without the white space around it."""
    return Part(raw.strip(), at + len(raw) - len(raw.lstrip()))


def read_number(part: Part, name: str, *, is_whole: bool) -> int | float:
    """The number that a parameter is given; a percentage unless it `is_whole`.

    Raises: InvalidField.
    """
    matched = _NUMBER.fullmatch(part.text)
    if matched is None:
        raise fault(part, f"{name} must be a number, got {quoted(part)}")
    number = Decimal(matched[1]).scaleb(-2 if matched[2] else 0)
    if abs(number) > MAX_NUMBER:
        raise fault(part, f"{name} is too large: {quoted(part)}")
    if not is_whole:
        return float(number) + 0.0  # no negative zero
    if matched[2] or number != number.to_integral_value():
        raise fault(part, f"{name} must be a whole number, got {quoted(part)}")
    return int(number)


def fault(part: Part, rule: str) -> InvalidField:
    """What is wrong with a part; the character where it stands is `metadata["position"]`."""
    error = InvalidField(FIELD, f"at character {part.at}: {rule}")
    error.metadata["position"] = str(part.at)
    return error


def quoted(part: Part) -> str:
    """The part in quotes, not all of it where it is long."""
    is_long = len(part.text) > _MAX_QUOTED
    return repr(part.text[:_MAX_QUOTED] + "…" if is_long else part.text)
