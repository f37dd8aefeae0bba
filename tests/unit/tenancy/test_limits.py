"""Limits and filters as an operator may set them, and what a policy list allows."""

import msgspec
import pytest

from kvcluster.errors import InvalidField, PermissionDenied, StateConflict
from kvcluster.tenancy.filters import conditions_in, matches
from kvcluster.tenancy.limits import (
    NO_LIMITS,
    UNLIMITED,
    Partitions,
    TenantLimits,
    TierPartition,
    allows,
    check_allowed,
    check_limits,
    check_partitions,
)
from kvcluster.tenancy.tenant import TenantState, check_id, check_tenant, moved, undeleted
from kvcluster.types import Policy
from tests.unit.tenancy.acting import tenant


@pytest.mark.parametrize("limits", [TenantLimits(), NO_LIMITS])
def test_the_limits_that_we_give_keep_to_the_rules(limits: TenantLimits) -> None:
    check_limits(limits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("concurrent_generations", -1),
        ("open_streams", UNLIMITED + 1),
        ("weight", 0),
        ("weight", 1001),
        ("max_priority", 101),
        ("default_policy", "x" * 1001),
        ("allowed_policies", ("int4",) * 33),
        ("allowed_policies", ("int4:bits=2",)),
        ("allowed_policies", ("INT4",)),
        ("allowed_policies", ("int4+window",)),
    ],
)
def test_a_limit_outside_its_rule_is_named(field: str, value: object) -> None:
    limits = msgspec.structs.replace(TenantLimits(), **{field: value})

    with pytest.raises(InvalidField) as refused:
        check_limits(limits)
    assert refused.value.metadata["field"] == f"limits.{field}"


def test_a_floor_is_not_above_its_limit() -> None:
    check_partitions(Partitions(gpu=TierPartition(floor_bytes=5, limit_bytes=5)))
    with pytest.raises(InvalidField, match=r"partitions\.host\.floor_bytes"):
        check_partitions(Partitions(host=TierPartition(floor_bytes=6, limit_bytes=5)))
    with pytest.raises(InvalidField, match=r"partitions\.disk\.limit_bytes"):
        check_partitions(Partitions(disk=TierPartition(limit_bytes=-1)))


@pytest.mark.parametrize(
    ("allowed", "policy", "is_allowed"),
    [
        ((), Policy(codec="int4"), True),
        (("int4",), Policy(codec="int4"), True),
        (("int4",), Policy(codec="int4:group=64"), True),
        (("int4",), Policy(), False),
        (("exact", "int4"), Policy(), True),
        (("int4",), Policy(codec="int4", retention="window"), False),
        (("window + int4",), Policy(codec="int4", retention="window:size=9"), True),
        (("window",), Policy(retention="window"), True),
        (("exact + window",), Policy(retention="window"), True),
        (("int8",), Policy(codec="int4"), False),
    ],
)
def test_a_policy_is_allowed_by_the_methods_that_it_combines(
    allowed: tuple[str, ...], policy: Policy, *, is_allowed: bool
) -> None:
    limits = TenantLimits(allowed_policies=allowed)
    check_limits(limits)

    assert allows(limits, policy) == is_allowed
    if not is_allowed:
        with pytest.raises(PermissionDenied, match="allowed:"):
            check_allowed(limits, policy)


@pytest.mark.parametrize("text", ["", "Red", "1red", "red-", "r_d", "r" * 64, "réd", "a/b", "-"])
def test_an_id_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InvalidField):
        check_id("tenant_id", text)


@pytest.mark.parametrize("text", ["r", "red-2", "r" * 63])
def test_an_id_of_this_form_is_taken(text: str) -> None:
    check_id("tenant_id", text)


@pytest.mark.parametrize(
    "fields",
    [
        {"display_name": "x" * 201},
        {"display_name": "two\nlines"},
        {"labels": {str(number): "" for number in range(65)}},
        {"labels": {"k": "v" * 64}},
    ],
)
def test_texts_of_a_tenant_are_short_and_of_one_line(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidField):
        check_tenant(tenant(**fields))


def test_states_follow_each_other_as_they_are_drawn() -> None:
    states = list(TenantState)
    possible = set()
    for before in states:
        for after in states:
            try:
                moved(msgspec.structs.replace(tenant(), state=before), after)
            except StateConflict:
                continue
            possible.add((str(before), str(after)))

    assert possible == {
        ("suspended", "active"),
        ("draining", "active"),
        ("active", "suspended"),
        ("draining", "suspended"),
        ("suspended", "suspended"),
        ("active", "draining"),
        ("draining", "draining"),
        ("active", "deleted"),
        ("suspended", "deleted"),
        ("draining", "deleted"),
    }
    with pytest.raises(StateConflict):
        undeleted(tenant())


FIELDS = ("state", "labels.", "display_name")


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("", ()),
        ("  ", ()),
        ("state=ACTIVE", (("state", "ACTIVE"),)),
        (" state = ACTIVE ", (("state", "ACTIVE"),)),
        ('display_name="a b"', (("display_name", "a b"),)),
        ("state=A AND labels.team=red", (("state", "A"), ("labels.team", "red"))),
    ],
)
def test_a_filter_is_read(text: str, conditions: tuple[tuple[str, str], ...]) -> None:
    assert conditions_in(text, FIELDS) == conditions


@pytest.mark.parametrize(
    "text",
    [
        *("state", "state=", "=x", "age=3", "state>3", "state=A OR state=B", "labels=x"),
        *("state.x=1", "state=A AND", "x" * 1001, 'display_name="'),
    ],
)
def test_another_filter_is_refused(text: str) -> None:
    with pytest.raises(InvalidField, match="filter"):
        conditions_in(text, FIELDS)


def test_every_condition_has_to_hold() -> None:
    conditions = conditions_in("state=A AND labels.team=red", FIELDS)

    assert matches(conditions, {"state": "A", "labels.team": "red"}.get)
    assert not matches(conditions, {"state": "A"}.get)
