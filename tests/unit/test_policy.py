"""The policy language: what is read, what is written, and where a mistake is pointed at."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvcluster.errors import InvalidField
from kvcluster.policy import (
    Menu,
    Method,
    Parameter,
    PlugPoint,
    Value,
    choice_text,
    parse_choice,
    parse_policy,
    value_text,
)
from kvcluster.policy_bounds import parse_bound
from kvcluster.types import Policy

LATENT = Method(
    plug_point=PlugPoint.CODEC,
    name="latent",
    meaning="projections",
    parameters=(
        Parameter(name="r", meaning="rank", default=0.5, lowest=0, highest=1, is_lowest_open=True),
        Parameter(name="bits", meaning="of a latent", default=8, choices=(3, 4, 8)),
        Parameter(name="what", meaning="what is projected", default="both", choices=("both", "k")),
        Parameter(name="bias", meaning="any number", default=0.0),
    ),
)
HITTERS = Method(
    plug_point=PlugPoint.RETENTION,
    name="heavy_hitters",
    meaning="what is attended to",
    parameters=(
        Parameter(
            name="budget", meaning="share", default=0.5, lowest=0, highest=1, is_lowest_open=True
        ),
        Parameter(name="recent", meaning="tokens", default=64, lowest=1),
        Parameter(name="label", meaning="any word", default="a"),
    ),
)
MENU = Menu(
    (
        LATENT,
        Method(plug_point=PlugPoint.CODEC, name="int4", meaning="4 bits"),
        HITTERS,
        Method(plug_point=PlugPoint.RETENTION, name="window", meaning="the last"),
        Method(plug_point=PlugPoint.SELECTION, name="top_blocks", meaning="few blocks"),
        Method(plug_point=PlugPoint.SHARING, name="pooled", meaning="grouped heads"),
    )
)


def parse(text: str) -> Policy:
    return parse_policy(text, MENU)


def fault(text: str) -> InvalidField:
    with pytest.raises(InvalidField) as info:
        parse(text)
    assert info.value.metadata["field"] == "policy"
    return info.value


def values(parameter: Parameter) -> st.SearchStrategy[Value]:
    if parameter.choices:
        return st.sampled_from(parameter.choices)
    if isinstance(parameter.default, str):
        return st.from_regex(r"[A-Za-z0-9_.-]{1,20}", fullmatch=True)
    if isinstance(parameter.default, int):
        return st.integers(int(parameter.lowest or 0), 2**53)
    bound = 2.0**53 if parameter.highest is None else parameter.highest
    least = -bound if parameter.lowest is None else parameter.lowest
    return st.floats(least, bound, exclude_min=parameter.is_lowest_open, allow_subnormal=False)


def choices(method: Method) -> st.SearchStrategy[str]:
    given_values = {parameter.name: values(parameter) for parameter in method.parameters}
    return st.fixed_dictionaries({}, optional=given_values).map(
        lambda arguments: str(method.choose(**arguments))
    )


POLICIES = st.builds(
    Policy,
    **{plug_point.value: st.one_of(*map(choices, MENU.at(plug_point))) for plug_point in PlugPoint},
)


@pytest.mark.parametrize("text", ["", "  ", "exact", "full", "exact + full", "all+own", "\n"])
def test_the_default_is_exact_storage_of_every_token(text: str) -> None:
    assert parse(text) == Policy(codec="exact", retention="full")
    assert str(parse(text)) == "exact"


@given(POLICIES)
@example(Policy(codec="latent:bias=1e-07"))
def test_what_is_written_parses_to_what_was_meant(policy: Policy) -> None:
    assert parse(str(policy)) == policy
    assert str(parse(str(policy))) == str(policy)


@given(POLICIES, st.randoms())
def test_order_and_white_space_are_free(policy: Policy, random) -> None:
    parts = str(policy).split(" + ")
    random.shuffle(parts)
    spaced = "+".join(re.sub(r"([:,=])", r" \1  ", part) for part in parts)

    assert parse(f"  {spaced}\n") == policy


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("latent:r=0.50,bits=8", "latent"),
        ("latent:bits=4,r=.25", "latent:r=0.25,bits=4"),
        ("latent:r=25%", "latent:r=0.25"),
        ("latent:r=0.7 %", "latent:r=0.007"),
        ("latent:r=1.", "latent:r=1"),
        ("latent:r=2.5e-1", "latent:r=0.25"),
        ("latent:bits=4.0", "latent:bits=4"),
        ("latent:bias=-0", "latent"),
        ("latent:what=k", "latent:what=k"),
        ("heavy_hitters:recent=0128", "exact + heavy_hitters:recent=128"),
        ("top_blocks + window + int4 + pooled", "pooled + int4 + window + top_blocks"),
    ],
)
def test_one_policy_has_one_canonical_text(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "position", "sentence"),
    [
        ("latent:rank=0.25", 8, "no parameter 'rank' of latent; it has r, bits, what, bias"),
        ("latent:bit=4", 8, "no parameter 'bit' of latent (did you mean bits?); it has r, bits"),
        ("int4:bits=4", 6, "no parameter 'bits' of int4; it has none"),
        ("int4 + heavy_hiters", 8, "no method is called 'heavy_hiters' (did you mean heavy_hitte"),
        ("INT4", 1, "no method is called 'INT4' (did you mean int4?); sharing: own, pooled; codec"),
        ("int8192", 1, "codec: exact, latent, int4; retention: full, heavy_hitters, window; sel"),
        ("exact, full", 1, "no method is called 'exact, full'"),
        ("int4 + latent:r=0.3", 8, "'latent:r=0.3' is a second codec beside int4: name one"),
        ("window + window", 10, "'window' is a second retention beside window: name one"),
        ("latent:r=0.1,bits=4, r=0.2", 22, "r of latent is given twice"),
        ("int4 +", 7, "a method is missing: '+' stands between two"),
        ("+ int4", 1, "a method is missing: '+' stands between two"),
        ("int4 + + window", 8, "a method is missing: '+' stands between two"),
        (":r=1", 1, "a method is missing"),
        ("latent:", 8, "want NAME=VALUE for latent, got ''"),
        ("latent:r", 8, "want NAME=VALUE for latent, got 'r'"),
        ("latent:r=0.1,,bits=4", 14, "want NAME=VALUE for latent, got ''"),
        ("latent:=3", 8, "want NAME=VALUE for latent, got '=3'"),
        ("latent:r=", 10, "r must be a number, got ''"),
        ("latent:r=0.1=0.2", 10, "r must be a number, got '0.1=0.2'"),
        ("heavy_hitters:budget=0", 22, "budget must be over 0 and at most 1, got '0'"),
        ("heavy_hitters:budget=120%", 22, "budget must be over 0 and at most 1, got '120%'"),
        ("heavy_hitters:budget=-0.1", 22, "budget must be over 0 and at most 1, got '-0.1'"),
        ("heavy_hitters:budget=1e-999", 22, "budget must be over 0 and at most 1"),
        ("heavy_hitters:budget=nan", 22, "budget must be a number, got 'nan'"),
        ("heavy_hitters:budget=inf", 22, "budget must be a number, got 'inf'"),
        ("heavy_hitters:budget=\N{ARABIC-INDIC DIGIT ONE}", 22, "budget must be a number"),
        ("heavy_hitters:budget=0x1", 22, "budget must be a number"),
        ("heavy_hitters:recent=0", 22, "recent must be at least 1, got '0'"),
        ("heavy_hitters:recent=2.5", 22, "recent must be a whole number, got '2.5'"),
        ("heavy_hitters:recent=200%", 22, "recent must be a whole number, got '200%'"),
        ("heavy_hitters:recent=1e99", 22, "recent is too large: '1e99'"),
        ("latent:bias=-1e999", 13, "bias is too large"),
        ("heavy_hitters:label=a b", 21, "label must be a word of A-Z a-z 0-9 _ . -, got 'a b'"),
        ("latent:bits=5", 13, "bits must be one of 3, 4, 8, got '5'"),
        ("latent:what=v", 13, "what must be one of both, k, got 'v'"),
        ("window + auto: ppl<=1%", 10, "auto stands alone: it chooses every method"),
    ],
)
def test_a_mistake_is_quoted_with_its_place_and_what_is_offered(
    text: str, position: int, sentence: str
) -> None:
    error = fault(text)

    assert sentence in error.message
    assert error.message.startswith(f"policy: at character {position}: ")
    assert error.metadata["position"] == str(position)


def test_a_text_that_is_too_long_is_refused_unread() -> None:
    for reader in (parse, parse_bound):
        with pytest.raises(InvalidField, match="at most 1000 characters, got 1001"):
            reader("int4" + " " * 997)
    assert parse("int4" + " " * 996) == Policy(codec="int4")


def test_a_long_part_is_quoted_in_short() -> None:
    assert len(fault("x" * 900).message) < 250


@given(st.text(max_size=60) | st.text("latenbixr=:,+.%0123456789 ", max_size=60))
def test_any_text_is_a_policy_or_a_fault_within_the_text(text: str) -> None:
    position, policy = 1, Policy()
    try:
        policy = parse(text)
    except InvalidField as error:
        position = int(error.metadata["position"])

    assert 1 <= position <= len(text) + 2
    assert parse(str(policy)) == policy


def test_a_choice_has_every_argument() -> None:
    choice = parse_choice("latent: bits=4, r=0.5", [LATENT])

    assert choice.name == "latent"
    assert choice.arguments == {"r": 0.5, "bits": 4, "what": "both", "bias": 0.0}
    assert str(choice) == "latent:bits=4"
    assert choice == LATENT.choose(bits=4) == LATENT.choose(bits=4.0, r=0.5)


def test_arguments_keep_the_type_of_their_parameter() -> None:
    arguments = parse_choice("heavy_hitters:budget=1,recent=4", [HITTERS]).arguments

    assert [type(value) for value in arguments.values()] == [float, int, str]


def test_a_method_is_written_with_its_defaults() -> None:
    assert str(LATENT) == "latent:r=0.5,bits=8,what=both,bias=0"


def test_text_in_an_argument_cannot_add_a_method() -> None:
    with pytest.raises(InvalidField):
        HITTERS.choose(label="a + int4")


@given(st.floats(-(2.0**53), 2.0**53))
def test_a_number_is_read_back_to_the_bit(number: float) -> None:
    assert LATENT.choose(bias=number).arguments["bias"] == number
    assert "+" not in value_text(number)


def test_a_menu_always_has_what_leaves_the_cache_as_it_is() -> None:
    names = [method.name for plug_point in PlugPoint for method in Menu().at(plug_point)]

    assert names == ["own", "exact", "full", "all"]


@pytest.mark.parametrize("name", ["latent", "auto"])
def test_a_name_has_one_meaning(name: str) -> None:
    second = Method(plug_point=PlugPoint.SELECTION, name=name, meaning="another")

    with pytest.raises(ValueError, match="one meaning"):
        Menu((LATENT, second))


@pytest.mark.parametrize("default", [0, 1.5, "a b"])
def test_a_parameter_allows_its_default(default: Value) -> None:
    with pytest.raises(ValueError, match="the default of r must be"):
        Parameter(name="r", meaning="", default=default, lowest=0, highest=1, is_lowest_open=True)


def test_a_method_without_arguments_is_its_name() -> None:
    assert choice_text("int4", {}) == "int4"
