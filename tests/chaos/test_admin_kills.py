"""Kill -9 of the router at random points of 500 acts of administrators, whatever they do."""

import asyncio
import multiprocessing
import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from kvcluster.admin_client import AdminClient
from kvcluster.errors import KvClusterError
from kvcluster.router.front_door import FrontDoor
from kvcluster.tenancy.api_key import make_secret
from kvcluster.tenancy.root_key import RootKey
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.tenant import OPERATORS, Act, ApiKey, KeyRole
from tests.chaos import killed_router
from tests.chaos.admin_model import Act as AdminAct
from tests.chaos.admin_model import Model, next_act, read_model

NUM_ACTS = 500
KILLED = 0.5
"""Share of the acts during which the router is killed."""
SECRET = bytes(range(32))
ROOT = RootKey(SECRET)


class Cluster:
    """One database, and routers in front of it that are killed."""

    def __init__(self, folder: Path) -> None:
        self.database, self._root_key = folder / "tenants.sqlite", folder / "root.key"
        self._root_key.write_text(SECRET.hex())
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([killed_router.__name__, FrontDoor.__module__])
        self.operator = self._bootstrap()

    def start(self) -> tuple[BaseProcess, str]:
        reading, writing = self._processes.Pipe(duplex=False)
        process = self._processes.Process(
            target=killed_router.serve, args=(self.database, self._root_key, writing)
        )
        process.start()
        writing.close()
        address: str = reading.recv()
        reading.close()
        return process, address

    @contextmanager
    def store(self) -> Iterator[SqliteTenantStore]:
        store = SqliteTenantStore(self.database, root_key=ROOT)
        try:
            yield store
        finally:
            store.close()

    def _bootstrap(self) -> str:
        secret = make_secret()
        key = ApiKey(
            tenant=OPERATORS,
            key="root",
            uid=secret.uid,
            digest=secret.digest,
            role=KeyRole.OPERATOR,
        )
        with self.store() as store:
            store.add_key(key, Act(principal="local:test", method="bootstrap"))
        return secret.text


def audited_in(store: SqliteTenantStore) -> list[tuple[str, str]]:
    """Method and target of all events but the operator's own."""
    events, number = [], 0
    while page := store.events_after(None, number, 1000):
        events += [(event.method, event.target) for event in page]
        number = page[-1].number
    return events[1:]


@dataclass
class History:
    """What was told to administrators, and what a look at the database found."""

    model: Model = field(default_factory=dict)
    audited: list[tuple[str, str]] = field(default_factory=list)
    num_kills: int = 0
    num_done_unacknowledged: int = 0

    def note(self, act: AdminAct) -> None:
        self.model = act.after
        self.audited = [*self.audited, (act.method, act.target)]

    def check(self, store: SqliteTenantStore) -> None:
        """Between two acts."""
        report = store.check_audit()
        assert (report.num_events, report.fault) == (len(self.audited) + 1, "")
        assert audited_in(store) == self.audited
        assert read_model(store) == self.model

    def check_killed(
        self, act: AdminAct, store: SqliteTenantStore, *, is_acknowledged: bool
    ) -> None:
        """All of the act is there, or nothing of it: its record and its effect, together."""
        is_done = read_model(store) == act.after
        assert is_done or not is_acknowledged
        if is_done:
            self.note(act)
        self.check(store)
        self.num_kills += 1
        self.num_done_unacknowledged += is_done and not is_acknowledged


async def killed_during(client: AdminClient, act: AdminAct, process: BaseProcess) -> bool:
    """Whether the act was acknowledged before the router died."""
    asking = asyncio.ensure_future(client.ask(act.request))
    await asyncio.sleep(secrets.randbelow(12_000) / 1e6)
    process.kill()
    await asyncio.wait({asking})
    await asyncio.to_thread(process.join)
    if asking.exception() is not None:
        assert isinstance(asking.exception(), KvClusterError)
    return asking.exception() is None


@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_of_500_acts_nothing_acknowledged_is_lost_and_nothing_half_done_is_visible(
    tmp_path: Path,
) -> None:
    chance = random.Random(7)
    cluster, history = Cluster(tmp_path), History()
    num_acts = 0
    while num_acts < NUM_ACTS:
        process, address = await asyncio.to_thread(cluster.start)
        async with AdminClient(address, api_key=cluster.operator) as client:
            while chance.random() >= KILLED and num_acts < NUM_ACTS - 1:
                act = next_act(history.model, chance)
                await client.ask(act.request)
                history.note(act)
                num_acts += 1
            act = next_act(history.model, chance)
            is_acknowledged = await killed_during(client, act, process)
            num_acts += 1
        with cluster.store() as store:
            history.check_killed(act, store, is_acknowledged=is_acknowledged)

    # The kills did fall on both sides of the commit, or nothing was tried.
    assert history.num_kills > NUM_ACTS * KILLED / 2
    assert 0 < history.num_done_unacknowledged < history.num_kills
