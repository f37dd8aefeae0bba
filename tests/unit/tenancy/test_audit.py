"""The audit log: whatever is done to it afterwards is found."""

import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcluster.tenancy.audit import (
    START,
    ChainHead,
    changed_fields,
    check_chain,
    digest_of,
    sealed,
)
from kvcluster.tenancy.limits import TenantLimits
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.tenant import AuditEvent
from kvcluster.types import TenantId
from tests.unit.tenancy.acting import RED, act, add_key, tenant

NUM_EVENTS = 8


def chain(num_events: int = NUM_EVENTS) -> list[AuditEvent]:
    events: list[AuditEvent] = []
    for number in range(1, num_events + 1):
        event = AuditEvent(
            number=number,
            tenant=TenantId("red"),
            time_s=1e9 + number,
            principal="p",
            method="m",
            target="t",
            peer="",
            change="{}",
            previous=events[-1].digest if events else START,
        )
        events.append(sealed(event))
    return events


def head_of(events: list[AuditEvent]) -> ChainHead:
    return ChainHead(events[-1].number, events[-1].digest)


def test_a_chain_that_nobody_touched_is_whole() -> None:
    events = chain()

    assert check_chain(events, head_of(events)) == (NUM_EVENTS, events[-1].digest, "")
    assert check_chain([], ChainHead()) == (0, START, "")


def test_the_digest_is_sha256_over_every_other_field_in_order() -> None:
    (event,) = chain(1)
    fields = [*msgspec.structs.astuple(event)[:-1]]

    assert digest_of(event) == hashlib.sha256(msgspec.msgpack.encode(fields)).digest()


changes = st.one_of(
    st.tuples(st.sampled_from(("number",)), st.integers(0, 2**40)),
    st.tuples(
        st.sampled_from(("tenant", "principal", "method", "target", "peer", "change")), st.text()
    ),
    st.tuples(st.just("time_s"), st.floats(allow_nan=False)),
    st.tuples(st.sampled_from(("previous", "digest")), st.binary(max_size=40)),
)


@settings(deadline=None, max_examples=300)
@given(at=st.integers(0, NUM_EVENTS - 1), change=changes)
def test_any_single_changed_field_of_any_event_is_found(
    at: int, change: tuple[str, object]
) -> None:
    events = chain()
    head = head_of(events)
    changed = msgspec.structs.replace(events[at], **dict([change]))
    is_same = changed == events[at]
    events[at] = changed

    report = check_chain(events, head)

    assert (report.fault == "") == is_same


@settings(deadline=None, max_examples=100)
@given(order=st.permutations(range(NUM_EVENTS)))
def test_any_other_order_is_found(order: list[int]) -> None:
    events = chain()

    report = check_chain([events[at] for at in order], head_of(events))

    assert (report.fault == "") == (order == list(range(NUM_EVENTS)))


@pytest.mark.parametrize("at", range(NUM_EVENTS))
def test_a_missing_event_is_found_the_last_one_too(at: int) -> None:
    events = chain()
    head = head_of(events)
    del events[at]

    assert check_chain(events, head).fault


@pytest.mark.parametrize("at", range(NUM_EVENTS + 1))
def test_an_added_event_is_found_after_the_last_one_too(at: int) -> None:
    events = chain()
    head = head_of(events)
    before = events[at - 1].digest if at else START
    forged = sealed(msgspec.structs.replace(events[0], number=at + 1, previous=before))
    events.insert(at, forged)

    assert check_chain(events, head).fault


@pytest.mark.parametrize(
    "tamper",
    [
        "UPDATE audit_events SET principal = 'somebody else' WHERE number = 3",
        "UPDATE audit_events SET tenant = 'blue' WHERE number = 1",
        "UPDATE audit_events SET time_s = time_s + 1 WHERE number = 2",
        "UPDATE audit_events SET change = '{}' WHERE number = 2",
        "UPDATE audit_events SET digest = zeroblob(32) WHERE number = 4",
        "UPDATE audit_events SET number = 9 WHERE number = 4",
        "DELETE FROM audit_events WHERE number = 2",
        "DELETE FROM audit_events WHERE number = 4",
        "DELETE FROM audit_events",
        "DELETE FROM audit_head",
        "UPDATE audit_head SET number = 3",
        "INSERT INTO audit_events SELECT 5, tenant, time_s, principal, method, target, peer,"
        " change, previous, digest FROM audit_events WHERE number = 4",
    ],
)
def test_whoever_writes_the_database_behind_our_back_is_found(
    tamper: str, store: SqliteTenantStore, path: Path
) -> None:
    store.create(tenant(), act())
    for key in ("k1", "k2"):
        add_key(store, key=key)
    store.revoke_key(RED, "k1", act())
    assert store.check_audit().fault == ""
    intruder = sqlite3.connect(path)
    with intruder:
        intruder.execute(tamper)
    intruder.close()

    assert store.check_audit().fault


def test_every_act_is_in_the_log_with_who_did_what(store: SqliteTenantStore) -> None:
    steps: list[tuple[str, Callable[[], object]]] = [
        ("CreateTenant", lambda: store.create(tenant(), act("CreateTenant", peer="ipv4:1.2.3.4"))),
        ("CreateApiKey", lambda: add_key(store)),
        ("RevokeApiKey", lambda: store.revoke_key(RED, "k1", act("RevokeApiKey"))),
        (
            "RotateTenantKey",
            lambda: store.rotate_key(RED, act("RotateTenantKey"), erases=True),
        ),
        ("DeleteTenant", lambda: store.delete(RED, act("DeleteTenant"), purge_after_s=1)),
        ("UndeleteTenant", lambda: store.undelete(RED, act("UndeleteTenant"))),
    ]

    for _, step in steps:
        step()

    events = store.events_after(RED, 0, 100)
    assert [event.method for event in events] == [name for name, _ in steps]
    assert {event.principal for event in events} == {act().principal}
    assert events[0].peer == "ipv4:1.2.3.4"
    assert events[1].target == "tenants/red/apiKeys/k1"
    assert '"erases":true' in events[3].change


def test_a_change_is_told_by_its_fields_and_without_digests(store: SqliteTenantStore) -> None:
    store.create(tenant(limits=TenantLimits(weight=2)), act())
    secret = add_key(store)

    store.change(
        RED,
        act(),
        lambda found: msgspec.structs.replace(
            found, labels={"a": "b"}, limits=TenantLimits(weight=3)
        ),
    )

    created, keyed, changed = store.events_after(RED, 0, 10)
    assert changed.change == '{"labels.a":"b","limits.weight":3}'
    assert '"limits.weight":2' in created.change
    assert secret.digest not in keyed.change
    assert secret.text not in keyed.change


def test_a_field_that_is_gone_is_told_as_null() -> None:
    before = tenant(labels={"a": "b", "c": "d"})
    after = msgspec.structs.replace(before, labels={"c": "d"})

    assert changed_fields(before, after) == '{"labels.a":null}'
