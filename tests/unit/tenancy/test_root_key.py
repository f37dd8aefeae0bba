"""With a root key: what the database alone shows, and what its rewriter cannot forge."""

import sqlite3
from pathlib import Path

import msgspec
import pytest

from kvcluster.errors import ConfigError, StoreUnavailable
from kvcluster.tenancy.audit import START, head_of, sealed
from kvcluster.tenancy.root_key import RootKey, read_root_key, with_variable
from kvcluster.tenancy.sqlite_root_key import adopt_root_key
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from tests.unit.tenancy.acting import BLUE, RED, act, add_key, tenant

ROOT = RootKey(bytes(range(32)))
OTHER = RootKey(bytes(32))


def contents(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir())


def write(path: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    """As somebody who has the file, and not the root key."""
    intruder = sqlite3.connect(path)
    with intruder:
        for statement, values in statements:
            intruder.execute(statement, values)
    intruder.close()


@pytest.fixture
def rooted(path: Path) -> SqliteTenantStore:
    store = SqliteTenantStore(path, root_key=ROOT)
    store.create(tenant(), act())
    store.create(tenant(BLUE), act())
    return store


def test_data_keys_are_read_with_the_root_key_and_are_nowhere_in_the_files(
    rooted: SqliteTenantStore, path: Path
) -> None:
    first = rooted.data_keys(RED)[1]
    rooted.rotate_key(RED, act(), erases=False)
    keys = rooted.data_keys(RED)

    assert (len(keys), keys[1], len(keys[2])) == (2, first, 32)
    assert all(key not in contents(path.parent) for key in keys.values())
    reopened = SqliteTenantStore(path, root_key=ROOT)
    assert reopened.data_keys(RED) == keys


def test_a_database_without_root_key_does_have_its_data_keys_in_the_file(
    store: SqliteTenantStore, path: Path
) -> None:
    store.create(tenant(), act())

    assert store.data_keys(RED)[1] in contents(path.parent)


@pytest.mark.parametrize(
    "swap",
    [
        "UPDATE data_keys SET key = (SELECT key FROM data_keys WHERE tenant = 'blue')",
        "UPDATE data_keys SET version = 2 WHERE tenant = 'red'",
        "UPDATE data_keys SET key = zeroblob(60) WHERE tenant = 'red'",
        "UPDATE data_keys SET key = x'00' WHERE tenant = 'red'",
    ],
)
def test_a_data_key_in_another_place_is_refused(
    swap: str, rooted: SqliteTenantStore, path: Path
) -> None:
    write(path, (swap, ()))

    with pytest.raises(StoreUnavailable, match="of tenant red was changed"):
        rooted.data_keys(RED)


def test_a_database_is_opened_with_its_own_root_key_alone(
    rooted: SqliteTenantStore, path: Path
) -> None:
    for wrong, message in ((None, "was written with one"), (OTHER, "another root key")):
        with pytest.raises(ConfigError, match=message):
            SqliteTenantStore(path, root_key=wrong)
    write(path, ("DELETE FROM root_key", ()))
    with pytest.raises(ConfigError, match="without one"):
        SqliteTenantStore(path, root_key=OTHER)


def test_whoever_rewrites_the_whole_log_without_the_root_key_is_found(
    rooted: SqliteTenantStore, path: Path
) -> None:
    assert rooted.check_audit() == (2, rooted.check_audit().digest, "")
    first, second = rooted.events_after(None, 0, 10)
    forged = sealed(msgspec.structs.replace(first, principal="somebody else"))
    after = sealed(msgspec.structs.replace(second, previous=forged.digest))
    update = "UPDATE audit_events SET principal = ?, previous = ?, digest = ? WHERE number = ?"
    head = head_of(after)
    write(
        path,
        (update, (forged.principal, START, forged.digest, 1)),
        (update, (after.principal, after.previous, after.digest, 2)),
        ("UPDATE audit_head SET number = ?, digest = ?, mac = ?", head),
    )

    assert "root key" in rooted.check_audit().fault


def test_whoever_cuts_the_log_short_is_found(rooted: SqliteTenantStore, path: Path) -> None:
    """The digest of the event that is then last is right, and known to whoever reads the file."""
    first, _ = rooted.events_after(None, 0, 10)
    write(
        path,
        ("DELETE FROM audit_events WHERE number = 2", ()),
        ("UPDATE audit_head SET number = 1, digest = ?", (first.digest,)),
    )

    assert "root key" in rooted.check_audit().fault


def test_without_root_key_a_log_that_is_cut_short_so_is_not_found(
    store: SqliteTenantStore, path: Path
) -> None:
    """Why there is a root key."""
    store.create(tenant(), act())
    store.create(tenant(BLUE), act())
    first, _ = store.events_after(None, 0, 10)
    write(
        path,
        ("DELETE FROM audit_events WHERE number = 2", ()),
        ("UPDATE audit_head SET number = 1, digest = ?", (first.digest,)),
    )

    assert store.check_audit().fault == ""


def test_a_database_that_was_begun_without_a_root_key_adopts_one(
    store: SqliteTenantStore, path: Path
) -> None:
    store.create(tenant(), act())
    secret = add_key(store)
    keys, before = store.data_keys(RED), store.check_audit()
    store.close()
    with pytest.raises(ConfigError, match="adopt-root-key"):
        SqliteTenantStore(path, root_key=ROOT)

    assert adopt_root_key(path, ROOT, act("adopt-root-key"), now=5.0) == 3

    adopted = SqliteTenantStore(path, root_key=ROOT)
    assert adopted.data_keys(RED) == keys
    assert keys[1] not in contents(path.parent)
    assert (adopted.check_audit().num_events, adopted.check_audit().fault) == (3, "")
    last = adopted.events_after(None, 2, 1)[0]
    assert before.digest.hex() in last.change
    assert adopted.changes_since(0).keys[0].uid == secret.uid
    with pytest.raises(ConfigError, match="has one"):
        adopt_root_key(path, OTHER, act(), now=6.0)


def test_a_log_that_was_changed_is_not_signed(store: SqliteTenantStore, path: Path) -> None:
    store.create(tenant(), act())
    keys = store.data_keys(RED)
    store.close()
    write(path, ("UPDATE audit_events SET principal = 'x'", ()))

    with pytest.raises(ConfigError, match="was changed"):
        adopt_root_key(path, ROOT, act(), now=5.0)

    assert SqliteTenantStore(path).data_keys(RED) == keys


def test_a_root_key_is_64_digits_in_a_file_or_variable(tmp_path: Path) -> None:
    file = tmp_path / "root.key"
    file.write_text(f"{bytes(range(32)).hex()}\n")
    environ = {"ROOT": bytes(32).hex()}

    for setting, expected in ((str(file), ROOT), ("env:ROOT", OTHER)):
        found = read_root_key(with_variable(setting, environ))
        assert found is not None
        assert found.fingerprint == expected.fingerprint
    assert read_root_key(with_variable("", environ)) is None
    file.write_text("abc")
    for setting in (str(file), str(tmp_path / "none"), "env:NONE"):
        with pytest.raises(ConfigError, match=r"^tenancy\.root_key: "):
            read_root_key(with_variable(setting, environ))
