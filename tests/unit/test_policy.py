import pytest

from kvcluster.errors import InvalidField
from kvcluster.policy import parse_policy
from kvcluster.types import Policy

CODECS = ("exact", "int4")
RETENTIONS = ("full", "window")


def parse(text: str) -> Policy:
    return parse_policy(text, codecs=CODECS, retentions=RETENTIONS)


@pytest.mark.parametrize("text", ["", "  ", "exact", "full", "exact + full", "full+exact"])
def test_the_default_is_exact_storage_of_every_token(text: str) -> None:
    assert parse(text) == Policy(codec="exact", retention="full")


def test_words_may_come_in_any_order() -> None:
    assert (
        parse("window + int4") == parse("int4+window") == Policy(codec="int4", retention="window")
    )


def test_what_is_written_parses_to_what_was_meant() -> None:
    policy = Policy(codec="int4", retention="window")

    assert parse(str(policy)) == policy


@pytest.mark.parametrize("text", ["int3", "exact + int3", "exact +", "exact, full", "EXACT"])
def test_an_unknown_word_is_refused_with_what_exists(text: str) -> None:
    with pytest.raises(InvalidField, match="codecs: exact, int4; retentions: full, window") as info:
        parse(text)

    assert info.value.metadata["field"] == "policy"


@pytest.mark.parametrize("text", ["exact + int4", "exact + exact", "full + window"])
def test_two_words_of_one_kind_are_refused(text: str) -> None:
    with pytest.raises(InvalidField, match="two of one kind"):
        parse(text)
