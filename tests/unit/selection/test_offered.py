"""The policy language names the selections that exist, and those that blocks can have."""

from dataclasses import MISSING, fields

import pytest

from kvcluster.errors import InvalidField
from kvcluster.policy import Menu, parse_choice, parse_policy
from kvcluster.selection.block_sparse import BlockSparse
from kvcluster.selection.estimated import Estimated
from kvcluster.selection.offered import SELECTION_METHODS
from kvcluster.selection.quest import Quest
from kvcluster.selection.registry import METHODS, build_selection

OFFERED = {method.name: method for method in SELECTION_METHODS}


def test_every_method_is_offered_with_all_its_parameters() -> None:
    assert OFFERED.keys() == {"all", *METHODS}
    for found in (BlockSparse, Estimated, Quest):
        parameters = {parameter.name: parameter for parameter in OFFERED[found.name].parameters}
        own = {field.name: field for field in fields(found) if field.name != "block_size"}
        assert parameters.keys() == own.keys()
        for name, field in own.items():
            assert field.default in (MISSING, parameters[name].default)


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_are_a_selection(name: str) -> None:
    selection = build_selection(name, block_size=64)

    assert selection is not None
    assert (selection.name, selection.block_size) == (name, 64)


def test_arguments_arrive() -> None:
    assert build_selection("all", 16) is None
    assert build_selection("quest:tokens=96,sinks=0", 16) == Quest(
        tokens=96, sinks=0, block_size=16
    )
    assert build_selection("estimated:share=12.5%,by=bound", 16) == Estimated(
        share=0.125, by="bound", block_size=16
    )
    assert build_selection("block_sparse:local=3,stride=4,random=2,seed=7", 8) == BlockSparse(
        local=3, stride=4, random=2, seed=7, block_size=8
    )


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("quest:tokens=0", "tokens must be at least 1"),
        ("quest:token=64", r"did you mean tokens\?"),
        ("quest:local=0", "local must be at least 1"),
        ("estimated:share=0", "share must be over 0 and at most 1"),
        ("estimated:share=101%", "share must be over 0 and at most 1"),
        ("estimated:by=median", "by must be one of mean, bound"),
        ("block_sparse:random=-1", "random must be at least 0"),
        ("block_sparse:stride=1.5", "stride must be a whole number"),
        ("quest + estimated", "a second selection"),
    ],
)
def test_text_that_names_no_selection_is_refused(text: str, rule: str) -> None:
    with pytest.raises(InvalidField, match=rule):
        parse_policy(text, Menu(SELECTION_METHODS))


@pytest.mark.parametrize("tokens", [40, 32])
def test_a_budget_that_is_no_whole_blocks_or_too_few_is_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"give 48 or more, not {tokens}"):
        build_selection(f"quest:tokens={tokens}", 16)


def test_canonical_text_leaves_defaults_out() -> None:
    assert str(parse_choice("quest: tokens=2048, local=3", SELECTION_METHODS)) == "quest:local=3"
