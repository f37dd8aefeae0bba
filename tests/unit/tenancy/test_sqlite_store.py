"""The store in a SQLite file: what is written is there, once, for every process, or not at all."""

import os
import resource
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from kvcluster.errors import (
    ConfigError,
    EtagMismatch,
    ResourceExists,
    ResourceNotFound,
    StateConflict,
    StoreUnavailable,
)
from kvcluster.tenancy import sqlite_database
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.tenant import OPERATORS, Tenant, TenantState, moved
from kvcluster.types import TenantId
from tests.unit.tenancy.acting import BLUE, RED, Clock, act, add_key, tenant


def renamed(name: str) -> Callable[[Tenant], Tenant]:
    return lambda found: msgspec.structs.replace(found, display_name=name)


def test_a_tenant_comes_back_as_it_was_written(store: SqliteTenantStore, clock: Clock) -> None:
    made = store.create(tenant(labels={"team": "search"}), act())

    assert store.get(RED) == made
    assert (made.key_version, made.create_time_s, made.update_time_s) == (1, clock.now, clock.now)


def test_what_was_written_is_there_after_a_restart(store: SqliteTenantStore, path: Path) -> None:
    made = store.create(tenant(), act())
    store.close()

    again = SqliteTenantStore(path)

    assert again.get(RED) == made
    again.close()


def test_the_operators_are_there_from_the_start_and_stay_as_they_are(
    store: SqliteTenantStore,
) -> None:
    assert [found.tenant for found in store.tenants_after("", 10)] == [OPERATORS]
    with pytest.raises(StateConflict):
        store.change(OPERATORS, act(), renamed("x"))
    with pytest.raises(StateConflict):
        store.delete(OPERATORS, act(), purge_after_s=1)


def test_an_id_is_given_once(store: SqliteTenantStore) -> None:
    store.create(tenant(), act())

    with pytest.raises(ResourceExists):
        store.create(tenant(), act())


def test_what_is_not_there_is_not_found(store: SqliteTenantStore) -> None:
    with pytest.raises(ResourceNotFound):
        store.get(BLUE)
    with pytest.raises(ResourceNotFound):
        store.change(BLUE, act(), renamed("x"))
    with pytest.raises(ResourceNotFound):
        add_key(store, BLUE)
    with pytest.raises(ResourceNotFound):
        store.revoke_key(BLUE, "k1", act())


def test_every_change_changes_the_etag_and_an_old_one_is_refused(store: SqliteTenantStore) -> None:
    first = store.create(tenant(), act())
    second = store.change(RED, act(), renamed("one"), etag=first.etag)

    with pytest.raises(EtagMismatch):
        store.change(RED, act(), renamed("two"), etag=first.etag)

    assert second.etag != first.etag
    assert store.get(RED).display_name == "one"


def test_of_two_writers_with_one_etag_exactly_one_wins(
    store: SqliteTenantStore, path: Path
) -> None:
    etag = store.create(tenant(), act()).etag
    stores = [SqliteTenantStore(path) for _ in range(4)]
    outcomes: list[str] = []

    def write(name: str, own: SqliteTenantStore) -> None:
        try:
            store_result = own.change(RED, act(), renamed(name), etag=etag)
            outcomes.append(store_result.display_name)
        except EtagMismatch:
            outcomes.append("refused")

    threads = [threading.Thread(target=write, args=(f"w{i}", own)) for i, own in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in stores:
        own.close()

    assert outcomes.count("refused") == 3
    assert store.get(RED).display_name in outcomes


def test_an_act_that_only_validates_leaves_no_trace(store: SqliteTenantStore) -> None:
    store.create(tenant(), act())
    before = (store.get(RED), store.check_audit(), store.data_keys(RED))

    answer = store.change(RED, act(validates_only=True), renamed("x"))
    store.create(tenant(BLUE), act(validates_only=True))

    assert answer.display_name == "x"
    assert (store.get(RED), store.check_audit(), store.data_keys(RED)) == before
    with pytest.raises(ResourceNotFound):
        store.get(BLUE)


def test_a_change_that_raises_leaves_no_trace(store: SqliteTenantStore) -> None:
    store.create(tenant(), act())
    events = store.events_after(None, 0, 10)

    with pytest.raises(StateConflict):
        store.change(RED, act(), lambda found: moved(found, TenantState.ACTIVE))

    assert store.events_after(None, 0, 10) == events


def test_another_connection_sees_a_change_at_once(store: SqliteTenantStore, path: Path) -> None:
    other = SqliteTenantStore(path)
    version, revision = other.version(), other.changes_since(0).revision

    made = store.create(tenant(), act())
    secret = add_key(store)

    assert other.version() != version
    changes = other.changes_since(revision)
    assert [found.tenant for found in changes.tenants] == [made.tenant]
    assert [key.uid for key in changes.keys] == [secret.uid]
    assert not other.changes_since(changes.revision).tenants
    other.close()


def test_another_process_sees_a_change_at_once(store: SqliteTenantStore, path: Path) -> None:
    version = store.version()
    script = (
        "from pathlib import Path\n"
        "from kvcluster.tenancy.sqlite_store import SqliteTenantStore\n"
        "from tests.unit.tenancy.acting import act, tenant\n"
        f"SqliteTenantStore(Path({str(path)!r})).create(tenant('blue'), act())\n"
    )

    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])

    assert store.version() != version
    assert store.get(BLUE).key_version == 1


def test_no_two_data_keys_are_alike_and_old_ones_stay_until_they_are_erased(
    store: SqliteTenantStore,
) -> None:
    store.create(tenant(), act())
    (first,) = store.data_keys(RED).values()

    rotated = store.rotate_key(RED, act(), erases=False)
    both = store.data_keys(RED)
    erased = store.rotate_key(RED, act(), erases=True)

    assert both[1] == first
    assert len(set(both.values())) == 2
    assert (rotated.key_version, erased.key_version) == (2, 3)
    assert list(store.data_keys(RED)) == [3]
    assert store.data_keys(RED)[3] not in both.values()


@pytest.mark.parametrize("how", ["rotate", "delete", "purge"])
def test_an_erased_data_key_is_in_none_of_the_files(
    how: str, store: SqliteTenantStore, path: Path, clock: Clock
) -> None:
    store.create(tenant(), act())
    (key,) = store.data_keys(RED).values()
    assert any(key in file.read_bytes() for file in path.parent.iterdir())

    if how == "rotate":
        store.rotate_key(RED, act(), erases=True)
    else:
        store.delete(RED, act(), purge_after_s=1)
    if how == "purge":
        clock.now += 2
        store.purge(act())

    assert not any(key in file.read_bytes() for file in path.parent.iterdir())


def test_a_deleted_tenant_has_no_data_key_and_another_one_when_it_is_undeleted(
    store: SqliteTenantStore, clock: Clock
) -> None:
    store.create(tenant(), act())
    (old,) = store.data_keys(RED).values()

    deleted = store.delete(RED, act(), purge_after_s=60)
    assert (deleted.state, deleted.key_version) == (TenantState.DELETED, 0)
    assert (deleted.delete_time_s, deleted.purge_time_s) == (clock.now, clock.now + 60)
    assert store.data_keys(RED) == {}
    with pytest.raises(StateConflict):
        store.rotate_key(RED, act(), erases=False)
    with pytest.raises(StateConflict):
        add_key(store)
    undeleted = store.undelete(RED, act())

    assert (undeleted.state, undeleted.purge_time_s) == (TenantState.ACTIVE, None)
    assert list(store.data_keys(RED)) == [undeleted.key_version] == [2]
    assert old not in store.data_keys(RED).values()


def test_a_deleted_tenant_is_purged_when_its_time_has_come_and_its_history_stays(
    store: SqliteTenantStore, clock: Clock
) -> None:
    store.create(tenant(), act())
    add_key(store)
    store.delete(RED, act(), purge_after_s=60)

    clock.now += 59
    assert store.purge(act()) == []
    clock.now += 1
    assert store.purge(act("PurgeTenant")) == [RED]

    with pytest.raises(ResourceNotFound):
        store.get(RED)
    assert store.keys_after(RED, "", 10) == []
    assert [event.method for event in store.events_after(RED, 0, 10)][-1] == "PurgeTenant"
    assert store.check_audit().fault == ""


def test_a_key_is_revoked_once_and_for_good(store: SqliteTenantStore, clock: Clock) -> None:
    store.create(tenant(), act())
    add_key(store)

    revoked = store.revoke_key(RED, "k1", act())
    clock.now += 10
    again = store.revoke_key(RED, "k1", act())

    assert revoked == again == store.key(RED, "k1")
    assert len(store.events_after(RED, 0, 10)) == 3


def test_lists_come_in_order_and_in_parts(store: SqliteTenantStore) -> None:
    for name in ("c", "a", "b"):
        store.create(tenant(name), act())
        add_key(store, TenantId(name), key=f"k-{name}")

    assert [found.tenant for found in store.tenants_after("a", 2)] == ["b", "c"]
    assert [key.key for key in store.keys_after(TenantId("b"), "", 5)] == ["k-b"]
    assert [event.number for event in store.events_after(None, 2, 3)] == [3, 4, 5]


def test_the_secret_of_a_key_is_nowhere_in_the_files(store: SqliteTenantStore, path: Path) -> None:
    store.create(tenant(), act())
    secret = add_key(store)

    contents = b"".join(file.read_bytes() for file in path.parent.iterdir())

    assert secret.uid.encode() in contents
    assert secret.text.split("_", 2)[2].encode() not in contents


def test_only_its_owner_may_read_the_files(store: SqliteTenantStore, path: Path) -> None:
    store.create(tenant(), act())

    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_a_file_of_another_program_is_not_touched(path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE theirs (x)")
    other.close()

    with pytest.raises(ConfigError, match="another program"):
        SqliteTenantStore(path)


def test_a_file_that_is_no_database_is_not_touched(path: Path) -> None:
    path.write_bytes(b"these are somebody's notes" * 100)

    with pytest.raises(ConfigError, match="cannot be opened"):
        SqliteTenantStore(path)
    assert path.read_bytes().startswith(b"these are")


def test_a_file_of_a_later_version_is_refused(path: Path) -> None:
    SqliteTenantStore(path).close()
    later = sqlite3.connect(path)
    later.execute("PRAGMA user_version = 99")
    later.close()

    with pytest.raises(ConfigError, match="later version"):
        SqliteTenantStore(path)


def test_a_database_of_an_earlier_version_is_brought_to_this_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SqliteTenantStore(path)
    made = first.create(tenant(), act())
    first.close()

    def add_column(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE tenants ADD COLUMN note TEXT")

    steps = (*sqlite_database.MIGRATIONS, add_column)
    monkeypatch.setattr(sqlite_database, "MIGRATIONS", steps)
    second = SqliteTenantStore(path)

    assert second.get(RED) == made
    assert ("note",) in second._database.read("SELECT name FROM pragma_table_info('tenants')")
    second.close()


def test_a_migration_that_fails_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SqliteTenantStore(path).close()

    def fails(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE tenants ADD COLUMN note TEXT")
        connection.execute("SELECT nonsense FROM nowhere")

    steps = (*sqlite_database.MIGRATIONS, fails)
    with monkeypatch.context() as patched:
        patched.setattr(sqlite_database, "MIGRATIONS", steps)
        with pytest.raises(ConfigError):
            SqliteTenantStore(path)

    store = SqliteTenantStore(path)
    assert ("note",) not in store._database.read("SELECT name FROM pragma_table_info('tenants')")
    store.close()


def test_many_processes_may_make_the_database_at_the_same_time(path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from kvcluster.tenancy.sqlite_store import SqliteTenantStore\n"
        f"SqliteTenantStore(Path({str(path)!r})).close()\n"
    )
    root = Path(__file__).parents[3]
    started = [subprocess.Popen([sys.executable, "-c", script], cwd=root) for _ in range(4)]

    assert [process.wait(timeout=60) for process in started] == [0] * 4


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """No file of this process can grow beyond what those of the store have now."""
    largest = max(file.stat().st_size for file in path.parent.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_an_act_is_refused_and_undone_and_reading_goes_on(
    store: SqliteTenantStore, path: Path
) -> None:
    store.create(tenant(), act())
    kept = [store.get(RED)]

    def write_until_refused() -> None:
        for number in range(1000):
            kept.append(store.change(RED, act(), renamed(f"{number:0200}")))

    with full_disk(path), pytest.raises(StoreUnavailable, match="cannot be written now"):
        write_until_refused()

    assert store.get(RED) == kept[-1]
    assert store.check_audit() == (len(kept), store.check_audit().digest, "")
    assert store.change(RED, act(), renamed("again")).display_name == "again"


def test_in_a_read_only_database_an_act_is_refused_and_reading_goes_on(
    store: SqliteTenantStore,
) -> None:
    store.create(tenant(), act())
    store._database._writer.execute("PRAGMA query_only = ON")

    with pytest.raises(StoreUnavailable, match="readonly") as refused:
        store.change(RED, act(), renamed("x"))

    assert refused.value.retry_after_s
    assert store.get(RED).display_name == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write any file")
def test_a_file_that_may_not_be_written_is_a_wrong_setting(path: Path) -> None:
    SqliteTenantStore(path).close()
    path.chmod(0o400)

    with pytest.raises(ConfigError, match="cannot be opened"):
        SqliteTenantStore(path)


def test_a_database_that_another_process_holds_is_unavailable_after_the_timeout(
    store: SqliteTenantStore, path: Path
) -> None:
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreUnavailable, match="locked"):
        store.create(tenant(), act())

    holder.execute("ROLLBACK")
    holder.close()
    assert store.create(tenant(), act()).tenant == RED


def test_a_closed_store_is_unavailable(path: Path) -> None:
    store = SqliteTenantStore(path)
    store.close()

    with pytest.raises(StoreUnavailable):
        store.version()
