"""Processes that die while they write tenants' records. Run by `test_crashes`, one job a run.

dying.py statements DATABASE    for each statement of each kind of act, a process that kills
                                itself there; prints what it left, one JSON object a line
dying.py acts DATABASE START    acts until it is killed, and prints each one that is acknowledged
"""

import json
import os
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from kvcluster.errors import ResourceNotFound
from kvcluster.tenancy.api_key import make_secret
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.tenant import Act, ApiKey, KeyRole, Tenant
from kvcluster.types import TenantId

RED = TenantId("red")


def act(method: str) -> Act:
    return Act(principal="p", method=method)


def new_tenant(name: str) -> Tenant:
    return Tenant(tenant=TenantId(name), uid=str(uuid.uuid4()))


def new_key(owner: str, key: str) -> ApiKey:
    secret = make_secret()
    return ApiKey(
        tenant=TenantId(owner),
        key=key,
        uid=secret.uid,
        digest=secret.digest,
        role=KeyRole.INFERENCE,
    )


ACTS: dict[str, Callable[[SqliteTenantStore], object]] = {
    "create": lambda store: store.create(new_tenant("blue"), act("create")),
    "update": lambda store: store.change(
        RED, act("update"), lambda found: msgspec.structs.replace(found, display_name="after")
    ),
    "key": lambda store: store.add_key(new_key(RED, "k2"), act("key")),
    "revoke": lambda store: store.revoke_key(RED, "k1", act("revoke")),
    "rotate": lambda store: store.rotate_key(RED, act("rotate"), erases=True),
    "delete": lambda store: store.delete(RED, act("delete"), purge_after_s=60),
}


def state_of(store: SqliteTenantStore) -> dict[str, bool]:
    """Which of the acts has been done, by what it changed."""
    try:
        has_blue = bool(store.get(TenantId("blue")))
    except ResourceNotFound:
        has_blue = False
    red = store.get(RED)
    keys = {key.key: key for key in store.keys_after(RED, "", 10)}
    return {
        "create": has_blue and 1 in store.data_keys(TenantId("blue")),
        "update": red.display_name == "after",
        "key": "k2" in keys,
        "revoke": keys["k1"].revoke_time_s is not None,
        "rotate": red.last_key_version == 2 and list(store.data_keys(RED)) in ([2], []),
        "delete": red.delete_time_s is not None and not store.data_keys(RED),
    }


def die_at_each_statement(path: Path) -> None:
    for name in ACTS:
        at = 0
        while True:
            for file in path.parent.glob(f"{path.name}*"):
                file.unlink()
            store = SqliteTenantStore(path)
            store.create(new_tenant(RED), act("setup"))
            store.add_key(new_key(RED, "k1"), act("setup"))
            store.close()
            child = os.fork()
            if not child:
                die_at(path, name, at)
            _, status = os.waitpid(child, 0)
            store = SqliteTenantStore(path)
            left = {
                "act": name,
                "at": at,
                "was_killed": os.WIFSIGNALED(status),
                "done": [key for key, is_done in state_of(store).items() if is_done],
                "audited": [event.method for event in store.events_after(None, 2, 10)],
                "fault": store.check_audit().fault,
            }
            store.close()
            sys.stdout.write(json.dumps(left) + "\n")
            if not left["was_killed"]:
                break
            at += 1


def die_at(path: Path, name: str, at: int) -> None:
    """In a process of its own: begin the act, and die before its statement number `at`."""
    store = SqliteTenantStore(path)
    count = 0

    def trace(_: str) -> None:
        nonlocal count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    store._database._writer.set_trace_callback(trace)
    ACTS[name](store)
    os._exit(0)


def act_until_killed(path: Path, start: int) -> None:
    store = SqliteTenantStore(path)
    for number in range(start, start + 100_000):
        name = f"t{number}"
        store.create(new_tenant(name), act(f"create-{name}"))
        sys.stdout.write(f"create {name}\n")
        sys.stdout.flush()
        store.add_key(new_key(name, "k"), act(f"key-{name}"))
        sys.stdout.write(f"key {name}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "statements":
        die_at_each_statement(Path(sys.argv[2]))
    else:
        act_until_killed(Path(sys.argv[2]), int(sys.argv[3]))
