"""Who a secret belongs to: as of now, for every router, and the same answer for all that is no
credential."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kvcluster.errors import CredentialInvalid, StoreUnavailable, TenantDraining, TenantSuspended
from kvcluster.tenancy.api_key import is_secret, make_secret, uid_in
from kvcluster.tenancy.directory import TenantDirectory, check_served, check_takes_more
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.tenant import Tenant, TenantState, moved
from tests.unit.tenancy.acting import BLUE, RED, Clock, act, add_key, tenant


@pytest.fixture
def directory(store: SqliteTenantStore, clock: Clock) -> TenantDirectory:
    store.create(tenant(), act())
    return TenantDirectory(store, unix_time=clock)


@pytest.fixture
def elsewhere(path: Path, directory: TenantDirectory) -> Iterator[SqliteTenantStore]:
    """Another process's way to the same database."""
    other = SqliteTenantStore(path)
    yield other
    other.close()


def test_no_two_secrets_are_alike_and_each_is_found_and_proven_by_its_record() -> None:
    secrets = [make_secret() for _ in range(100)]

    assert len({secret.text for secret in secrets}) == len({s.uid for s in secrets}) == 100
    for secret in secrets:
        assert uid_in(secret.text) == secret.uid
        assert is_secret(secret.text, secret.digest)
        assert not is_secret(secret.text, secrets[0].digest) or secret is secrets[0]
        assert not is_secret(secret.text, None)


def test_a_secret_is_its_tenants(directory: TenantDirectory, store: SqliteTenantStore) -> None:
    secret = add_key(store)

    found = directory.credential(secret.text)

    assert (found.tenant.tenant, found.key.key) == (RED, "k1")


def _revoke(store: SqliteTenantStore, clock: Clock) -> None:
    store.revoke_key(RED, "k1", act())


def _expire(store: SqliteTenantStore, clock: Clock) -> None:
    clock.now += 100


def _delete(store: SqliteTenantStore, clock: Clock) -> None:
    store.delete(RED, act(), purge_after_s=60)


def _replace(store: SqliteTenantStore, clock: Clock) -> None:
    store.delete(RED, act(), purge_after_s=0)
    store.purge(act())
    store.create(tenant(), act())


@pytest.mark.parametrize("end", [_revoke, _expire, _delete, _replace])
def test_a_secret_that_was_good_is_refused_at_the_next_call_after_any_process_ended_it(
    end: Callable[[SqliteTenantStore, Clock], None],
    directory: TenantDirectory,
    elsewhere: SqliteTenantStore,
    clock: Clock,
) -> None:
    elsewhere._unix_time = clock
    secret = add_key(elsewhere, expire_time_s=clock.now + 100)
    assert directory.credential(secret.text)
    uid = directory.credential(secret.text).key.uid

    end(elsewhere, clock)

    with pytest.raises(CredentialInvalid):
        directory.credential(secret.text)
    with pytest.raises(CredentialInvalid):
        directory.tenant_of(uid)


def test_a_key_of_an_undeleted_tenant_works_again(
    directory: TenantDirectory, store: SqliteTenantStore
) -> None:
    secret = add_key(store)
    store.delete(RED, act(), purge_after_s=60)
    store.undelete(RED, act())

    assert directory.credential(secret.text).tenant.state is TenantState.ACTIVE


def test_what_is_no_credential_gets_one_answer(
    directory: TenantDirectory, store: SqliteTenantStore
) -> None:
    secret, revoked = add_key(store), add_key(store, key="k2")
    store.revoke_key(RED, "k2", act())
    last = "A" if secret.text[-1] != "A" else "B"
    wrong = [
        "",
        "kvc_",
        secret.text[:-1],
        secret.text[:-1] + last,
        secret.text + "A",
        make_secret().text,
        revoked.text,
        "kvc_" + "0" * 16 + secret.text[20:],
    ]

    answers = set()
    for text in wrong:
        with pytest.raises(CredentialInvalid) as refused:
            directory.credential(text)
        answers.add(msgspec.json.encode(refused.value.to_record()))

    assert len(answers) == 1


def test_a_store_that_cannot_be_asked_lets_nobody_in(
    directory: TenantDirectory, store: SqliteTenantStore
) -> None:
    secret = add_key(store)
    assert directory.credential(secret.text)
    store.close()

    with pytest.raises(StoreUnavailable):
        directory.credential(secret.text)


def test_what_changed_since_is_told_by_revision(
    directory: TenantDirectory, store: SqliteTenantStore
) -> None:
    before = directory.revision
    store.create(tenant(BLUE), act())

    assert directory.tenants_since(before) == ()
    directory.refresh()

    assert [found.tenant for found in directory.tenants_since(before)] == [BLUE]
    assert {found.tenant for found in directory.tenants_since(0)} == {"operators", RED, BLUE}
    assert directory.tenants_since(directory.revision) == ()


def _in_state(state: TenantState) -> Tenant:
    return moved(tenant(), state, reason="unpaid bills")


def test_a_suspended_tenant_is_not_served_and_told_why() -> None:
    with pytest.raises(TenantSuspended, match="unpaid bills"):
        check_served(_in_state(TenantState.SUSPENDED))


def test_a_draining_tenant_is_served_but_takes_no_more() -> None:
    draining = _in_state(TenantState.DRAINING)

    check_served(draining)
    with pytest.raises(TenantDraining) as refused:
        check_takes_more(draining)
    assert refused.value.retry_after_s
