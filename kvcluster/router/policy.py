"""Policies as protos. A request has its policy as text or in parts; the engine knows text alone.

The form of the parts is checked here; which methods and arguments there are is for the engine.
"""

import math
import re
from collections.abc import Iterator
from typing import Final

from kvcluster.errors import InvalidField
from kvcluster.policy import Value, choice_text, value_text
from kvcluster.policy_bounds import AutoBound
from kvcluster.rpc.v1 import inference_service_pb2 as pb

FIELD = "cache_policy"
_BOUND_FIELDS: Final = ("max_perplexity_increase", "min_ratio", "min_recall")
_BOUND_WORDS: Final = ("ppl<=", "ratio>=", "recall>=")
_BETWEEN: Final = " + "
_FAULT = re.compile(r"policy: at character ([0-9]+): (.*)", re.DOTALL)
# What the text of a policy is made of besides names must not come in through a name.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def policy_from_proto(message: pb.GenerateRequest | pb.EstimateGenerationRequest) -> str:
    """The policy of a request in the policy language; empty: it names none.

    Raises: InvalidField when it is given twice, or its parts have no such text.
    """
    if not message.HasField("cache_policy"):
        return message.policy
    if message.policy:
        raise InvalidField("policy", f"is given twice: leave out policy or {FIELD}")
    parts = message.cache_policy
    if parts.HasField("bound") == bool(parts.choices):
        raise InvalidField(FIELD, "want choices or a bound: leave it out for the default")
    if parts.HasField("bound"):
        return _bound_text(parts.bound)
    return _BETWEEN.join(
        _choice_text(f"{FIELD}.choices[{index}]", choice)
        for index, choice in enumerate(parts.choices)
    )


def fault_in_parts(
    fault: str, message: pb.GenerateRequest | pb.EstimateGenerationRequest
) -> tuple[str, str] | None:
    """Field and rule of what the engine found wrong in the text that a policy in parts became: its
    sender never saw that text. None: the policy was sent as text, or the fault is another."""
    matched = _FAULT.fullmatch(fault)
    if matched is None or not message.HasField("cache_policy"):
        return None
    place = int(matched[1]) - 1
    field = [field for start, field in _fields(message.cache_policy) if start <= place][-1]
    return field, matched[2]


def _fields(parts: pb.CachePolicy) -> Iterator[tuple[int, str]]:
    """Where the text of each field begins in the policy's text, from 0, ascending."""
    if parts.HasField("bound"):
        text = _bound_text(parts.bound)
        yield 0, f"{FIELD}.bound"
        for word, name in zip(_BOUND_WORDS, _BOUND_FIELDS, strict=True):
            if word in text:
                yield text.index(word), f"{FIELD}.bound.{name}"
    start = 0
    for index, choice in enumerate(parts.choices):
        field = f"{FIELD}.choices[{index}]"
        yield start, f"{field}.method"
        at = start + len(choice.method) + 1
        arguments = _arguments(field, choice)
        for name, value in arguments.items():
            yield at, f"{field}.arguments[{name}]"
            at += len(f"{name}={value_text(value)},")
        start += len(choice_text(choice.method, arguments)) + len(_BETWEEN)


def _bound_text(bound: pb.PolicyBound) -> str:
    has_perplexity, has_ratio, has_recall = (bound.HasField(name) for name in _BOUND_FIELDS)
    if not has_perplexity and not has_ratio:
        raise InvalidField(f"{FIELD}.bound", "want max_perplexity_increase, min_ratio or both")
    for name in _BOUND_FIELDS:
        _check_finite(f"{FIELD}.bound.{name}", getattr(bound, name))
    return str(
        AutoBound(
            max_perplexity_increase=bound.max_perplexity_increase if has_perplexity else None,
            min_ratio=bound.min_ratio if has_ratio else None,
            min_recall=bound.min_recall if has_recall else 1.0,
        )
    )


def _choice_text(field: str, choice: pb.PolicyChoice) -> str:
    _check_name(f"{field}.method", choice.method)
    return choice_text(choice.method, _arguments(field, choice))


def _arguments(field: str, choice: pb.PolicyChoice) -> dict[str, Value]:
    arguments: dict[str, Value] = {}
    # The order of a map is not kept on the wire, and equal requests are to have equal text.
    for name in sorted(choice.arguments):
        _check_name(f"{field}.arguments", name)
        value = choice.arguments[name]
        key = f"{field}.arguments[{name}]"
        match value.WhichOneof("kind"):
            case "number":
                _check_finite(key, value.number)
                arguments[name] = value.number
            case "word":
                _check_name(key, value.word)
                arguments[name] = value.word
            case _:
                raise InvalidField(key, "is missing: set number or word")
    return arguments


def _check_name(field: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidField(field, "want a name of 1 to 64 of the characters A-Z a-z 0-9 _ . -")


def _check_finite(field: str, number: float) -> None:
    if not math.isfinite(number):
        raise InvalidField(field, f"want a finite number, got {number}")
