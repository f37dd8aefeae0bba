"""Policies in parts become the text that says the same."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.errors import InvalidField
from kvcluster.policy import Value, parse_choice, parse_policy
from kvcluster.policy_bounds import AutoBound, parse_bound
from kvcluster.router.policy import fault_in_parts, policy_from_proto
from kvcluster.rpc.v1 import inference_service_pb2 as pb
from kvcluster.types import Policy
from tests.unit.test_policy import MENU, POLICIES


def value_to_proto(value: Value) -> pb.PolicyValue:
    if isinstance(value, str):
        return pb.PolicyValue(word=value)
    return pb.PolicyValue(number=value)


def choice_to_proto(text: str) -> pb.PolicyChoice:
    choice = parse_choice(text, MENU.methods)
    return pb.PolicyChoice(
        method=choice.name,
        arguments={name: value_to_proto(value) for name, value in choice.arguments.items()},
    )


def text_of(*choices: pb.PolicyChoice) -> str:
    """After the way over the wire."""
    request = pb.GenerateRequest(cache_policy=pb.CachePolicy(choices=choices))
    return policy_from_proto(pb.GenerateRequest.FromString(request.SerializeToString()))


@given(POLICIES)
def test_a_policy_in_parts_is_the_policy_in_text(policy: Policy) -> None:
    parts = [policy.sharing, policy.codec, policy.retention, policy.selection]

    assert parse_policy(text_of(*map(choice_to_proto, parts)), MENU) == policy


@given(
    st.none() | st.floats(0, 1, allow_subnormal=False),
    st.none() | st.floats(1, 1e6),
    st.none() | st.floats(0, 1, allow_subnormal=False),
)
def test_a_bound_in_parts_is_the_bound_in_text(
    most: float | None, least: float | None, recall: float | None
) -> None:
    if most is None and least is None:
        return
    bound = pb.PolicyBound(max_perplexity_increase=most, min_ratio=least, min_recall=recall)
    request = pb.EstimateGenerationRequest(cache_policy=pb.CachePolicy(bound=bound))

    assert parse_bound(policy_from_proto(request)) == AutoBound(
        max_perplexity_increase=most,
        min_ratio=least,
        min_recall=1.0 if recall is None else recall,
    )


def test_a_limit_of_zero_is_a_limit() -> None:
    request = pb.GenerateRequest(
        cache_policy=pb.CachePolicy(bound=pb.PolicyBound(max_perplexity_increase=0.0))
    )

    assert policy_from_proto(request) == "auto: ppl<=0%"


def test_a_policy_in_text_is_handed_on_as_it_is() -> None:
    assert policy_from_proto(pb.GenerateRequest(policy=" int4 +window")) == " int4 +window"
    assert policy_from_proto(pb.GenerateRequest()) == ""


def test_equal_parts_have_equal_text() -> None:
    """A retry by `request_id` must not differ from the first try by the order of a map."""
    one = pb.PolicyChoice(method="latent")
    other = pb.PolicyChoice(method="latent")
    for choice, names in ((one, ("r", "bits")), (other, ("bits", "r"))):
        for name in names:
            choice.arguments[name].number = 4

    assert text_of(one) == text_of(other) == "latent:bits=4,r=4"


NUMBER = pb.PolicyValue(number=1.0)


def choice(method: str, **arguments: Value) -> pb.PolicyChoice:
    values = {name: value_to_proto(value) for name, value in arguments.items()}
    return pb.PolicyChoice(method=method, arguments=values)


@pytest.mark.parametrize(
    ("choices", "field", "rule"),
    [
        ([choice("int5")], "choices[0].method", "no method is called 'int5'"),
        ([choice("int4"), choice("latent")], "choices[1].method", "'latent' is a second codec"),
        ([choice("window"), choice("auto")], "choices[1].method", "auto stands alone"),
        ([choice("latent", rank=1)], "choices[0].arguments[rank]", "no parameter 'rank' of"),
        (
            [choice("int4"), choice("heavy_hitters", budget=0)],
            "choices[1].arguments[budget]",
            "budget must be over 0 and at most 1, got '0'",
        ),
        (
            [choice("latent", r=0.25, bits=4, what="v"), choice("window")],
            "choices[0].arguments[what]",
            "what must be one of both, k, got 'v'",
        ),
        (
            [choice("latent", bits=4, r=0.25), choice("heavy_hitters", budget=0.5, recent=0.5)],
            "choices[1].arguments[recent]",
            "recent must be a whole number, got '0.5'",
        ),
        ([choice("latent", r=-0.1, bits=5)], "choices[0].arguments[bits]", "bits must be one of"),
    ],
)
def test_a_fault_in_the_text_names_the_part_that_it_came_from(
    choices: list[pb.PolicyChoice], field: str, rule: str
) -> None:
    request = pb.GenerateRequest(cache_policy=pb.CachePolicy(choices=choices))
    with pytest.raises(InvalidField) as info:
        parse_policy(policy_from_proto(request), MENU)

    found = fault_in_parts(info.value.message, request)

    assert found is not None
    assert found[0] == f"cache_policy.{field}"
    assert found[1].startswith(rule)


@pytest.mark.parametrize(
    ("bound", "field"),
    [
        (pb.PolicyBound(max_perplexity_increase=-1), "max_perplexity_increase"),
        (pb.PolicyBound(max_perplexity_increase=0.1, min_ratio=0.5), "min_ratio"),
        (pb.PolicyBound(min_ratio=2, min_recall=7), "min_recall"),
    ],
)
def test_a_fault_in_a_bound_names_its_limit(bound: pb.PolicyBound, field: str) -> None:
    request = pb.EstimateGenerationRequest(cache_policy=pb.CachePolicy(bound=bound))
    with pytest.raises(InvalidField) as info:
        parse_bound(policy_from_proto(request))

    found = fault_in_parts(info.value.message, request)

    assert found is not None
    assert found[0] == f"cache_policy.bound.{field}"


def test_a_fault_of_a_policy_in_text_and_other_faults_stay_as_they_are() -> None:
    in_text = pb.GenerateRequest(policy="int5")
    in_parts = pb.GenerateRequest(cache_policy=pb.CachePolicy(choices=[choice("int4")]))

    assert fault_in_parts("policy: at character 1: no method is called 'int5'", in_text) is None
    assert fault_in_parts("max_output_tokens: want at least 1", in_parts) is None


@pytest.mark.parametrize(
    ("policy", "parts", "field"),
    [
        ("int4", pb.CachePolicy(choices=[pb.PolicyChoice(method="int4")]), "policy"),
        ("int4", pb.CachePolicy(), "policy"),
        ("", pb.CachePolicy(), "cache_policy"),
        (
            "",
            pb.CachePolicy(
                choices=[pb.PolicyChoice(method="int4")], bound=pb.PolicyBound(min_ratio=2)
            ),
            "cache_policy",
        ),
        ("", pb.CachePolicy(bound=pb.PolicyBound()), "cache_policy.bound"),
        ("", pb.CachePolicy(bound=pb.PolicyBound(min_recall=0.9)), "cache_policy.bound"),
        (
            "",
            pb.CachePolicy(bound=pb.PolicyBound(min_ratio=math.nan)),
            "cache_policy.bound.min_ratio",
        ),
        ("", pb.CachePolicy(choices=[pb.PolicyChoice()]), "cache_policy.choices[0].method"),
        (
            "",
            pb.CachePolicy(
                choices=[pb.PolicyChoice(method="a"), pb.PolicyChoice(method="int4 + window")]
            ),
            "cache_policy.choices[1].method",
        ),
        (
            "",
            pb.CachePolicy(choices=[pb.PolicyChoice(method="a", arguments={"r=1,b": NUMBER})]),
            "cache_policy.choices[0].arguments",
        ),
        (
            "",
            pb.CachePolicy(
                choices=[pb.PolicyChoice(method="a", arguments={"r": pb.PolicyValue()})]
            ),
            "cache_policy.choices[0].arguments[r]",
        ),
        (
            "",
            pb.CachePolicy(
                choices=[
                    pb.PolicyChoice(method="a", arguments={"r": pb.PolicyValue(number=math.inf)})
                ]
            ),
            "cache_policy.choices[0].arguments[r]",
        ),
        (
            "",
            pb.CachePolicy(
                choices=[pb.PolicyChoice(method="a", arguments={"r": pb.PolicyValue(word="x+y")})]
            ),
            "cache_policy.choices[0].arguments[r]",
        ),
    ],
)
def test_parts_that_make_no_policy_are_refused_by_name(
    policy: str, parts: pb.CachePolicy, field: str
) -> None:
    with pytest.raises(InvalidField) as info:
        policy_from_proto(pb.GenerateRequest(policy=policy, cache_policy=parts))

    assert info.value.metadata["field"] == field
