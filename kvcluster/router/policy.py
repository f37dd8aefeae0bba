"""Policies as protos. A request has its policy as text or in parts; the engine knows text alone.

The form of the parts is checked here; which methods and arguments there are is for the engine.
"""

import math
import re
from typing import Final

from kvcluster.errors import InvalidField
from kvcluster.policy import Value, choice_text
from kvcluster.policy_bounds import AutoBound
from kvcluster.rpc.v1 import inference_service_pb2 as pb

FIELD = "cache_policy"
_BOUND_FIELDS: Final = ("max_perplexity_increase", "min_ratio", "min_recall")
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
    return " + ".join(
        _choice_text(f"{FIELD}.choices[{index}]", choice)
        for index, choice in enumerate(parts.choices)
    )


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
    return choice_text(choice.method, arguments)


def _check_name(field: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidField(field, "want a name of 1 to 64 of the characters A-Z a-z 0-9 _ . -")


def _check_finite(field: str, number: float) -> None:
    if not math.isfinite(number):
        raise InvalidField(field, f"want a finite number, got {number}")
