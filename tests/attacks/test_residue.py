"""Nothing holds a prompt's tokens or its cache after its end: not the memory of the processes, no
file, no shared memory. Each search finds them while they are in use."""

import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from kvcluster.admin_client import AdminClient
from kvcluster.client import Client
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.types import TenantId
from tests.attacks import residue_server
from tests.attacks.residue import canaries_of, found_in_files, found_in_process, random_ids
from tests.unit.router.administering import INFERENCE, bootstrap

ROOT: Final = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="searches /proc"),
]


@dataclass
class Victim:
    """A running server, and the tenant whose canaries are looked for."""

    process: "subprocess.Popen[str]"
    tenant: str
    client: Client
    other: Client
    operator: AdminClient
    folder: Path
    canaries: dict[str, bytes] = field(default_factory=dict)

    async def learn(self, ids: list[int], policy: str) -> None:
        """What to look for. Bytes that are there before the prompt is sent tell nothing."""
        made = await canaries_of(ids, residue_server.CONFIG, policy)
        before = found_in_process(self.process.pid, made)
        self.canaries = {name: made[name] for name, count in before.items() if not count}
        assert len(self.canaries) >= 6

    def found(self) -> Mapping[str, int]:
        counts = found_in_process(self.process.pid, self.canaries)
        return {name: count for name, count in counts.items() if count}

    async def until_nothing_is_found(self) -> None:
        """Buffers of the connection go with it; what others send overwrites the rest."""
        await self.client.close()
        for seed in range(100, 106):
            await drained(self.other, random_ids(seed))
            if not self.found():
                return
        assert self.found() == {}


async def drained(client: Client, ids: list[int], policy: str = "") -> None:
    async for _ in client.generate(prompt_ids=ids, max_output_tokens=2, policy=policy):
        pass


class Server(NamedTuple):
    process: "subprocess.Popen[str]"
    address: str
    admin_address: str
    operator: str
    folder: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For all tests of this file: the last one kills it."""
    folder = tmp_path_factory.mktemp("residue")
    operator = bootstrap(folder / "tenants.sqlite")
    command = [sys.executable, residue_server.__file__, str(folder / "tenants.sqlite")]
    # It imports what the tests do, and leaves its files in the folder that is searched.
    here = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    }
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=folder, env=here
    ) as process:
        assert process.stdout is not None
        try:
            yield Server(process, *process.stdout.readline().split(), operator, folder)
        finally:
            process.kill()


@pytest.fixture
async def victim(server: Server) -> AsyncIterator[Victim]:
    async with AdminClient(server.admin_address, api_key=server.operator) as asking:
        tenants = [f"{name}-{secrets.token_hex(4)}" for name in ("red", "blue")]
        keys = [await key_of(asking, tenant) for tenant in tenants]
        async with (
            Client(server.address, api_key=keys[0]) as client,
            Client(server.address, api_key=keys[1]) as other,
        ):
            yield Victim(server.process, tenants[0], client, other, asking, server.folder)


async def key_of(operator: AdminClient, tenant: str) -> str:
    await operator.ask(pb.CreateTenantRequest(tenant_id=tenant))
    role = pb.ApiKey(role=INFERENCE)
    made = await operator.ask(pb.CreateApiKeyRequest(parent=f"tenants/{tenant}", api_key=role))
    assert isinstance(made, pb.CreateApiKeyResponse)
    return made.secret


async def delete_context(victim: Victim) -> None:
    await victim.client.delete_context("book", tenant=TenantId(victim.tenant))


async def delete_tenant(victim: Victim) -> None:
    await victim.operator.ask(pb.DeleteTenantRequest(name=f"tenants/{victim.tenant}", force=True))


@pytest.mark.parametrize("policy", ["exact", "int4"])
@pytest.mark.parametrize("end", [delete_context], ids=lambda end: end.__name__)
async def test_a_stored_context_is_held_until_its_end_and_not_after(
    policy: str, end: Callable[[Victim], Awaitable[None]], victim: Victim
) -> None:
    ids = random_ids(1)
    await victim.learn(ids, policy)
    await victim.client.upload_context(
        "book", prompt_ids=ids, tenant=TenantId(victim.tenant), policy=policy
    )
    in_use = victim.found()
    await end(victim)
    at_once = victim.found()
    await victim.until_nothing_is_found()

    assert "u32 ids" in in_use
    assert sum(name.startswith("cache") for name in in_use) >= 2
    # The caller is told of the end when the cache is zero; ids may stand in a connection's buffer.
    assert [name for name in at_once if name.startswith("cache")] == []


async def test_a_generation_that_bypasses_the_cache_leaves_nothing(victim: Victim) -> None:
    ids = random_ids(2)
    await victim.learn(ids, "exact")
    events = victim.client.generate(prompt_ids=ids, max_output_tokens=200, cache_mode="bypass")
    for _ in range(20):
        await anext(events)
    in_use = victim.found()
    await events.aclose()
    await victim.until_nothing_is_found()

    assert sum(name.startswith("cache") for name in in_use) >= 2


async def test_a_killed_server_leaves_nothing_in_files_or_shared_memory(victim: Victim) -> None:
    ids = random_ids(3)
    await victim.learn(ids, "exact")
    await victim.client.upload_context("book", prompt_ids=ids, tenant=TenantId(victim.tenant))
    in_use = victim.found()
    # The control of the search itself: one file does hold them.
    (victim.folder / "control").write_bytes(b"before" + victim.canaries["u32 ids"] + b"after")
    victim.process.kill()
    victim.process.wait()
    found = found_in_files([victim.folder, Path("/dev/shm")], victim.canaries)

    assert sum(name.startswith("cache") for name in in_use) >= 2
    assert {name: count for name, count in found.items() if count} == {"u32 ids": 1}


def test_freed_memory_is_overwritten(tmp_path: Path) -> None:
    """With the control that it is not by itself."""
    program = (
        "import ctypes, sys\n"
        "from kvcluster.freed_memory import overwrite_freed_memory\n"
        "if sys.argv[1] == 'on' and not overwrite_freed_memory(): sys.exit('cannot')\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        # Made before: what is made after the memory is free may be made of it.
        "found = (ctypes.c_char * 1024)()\n"
        "at = libc.malloc(ctypes.c_size_t(4096))\n"
        "ctypes.memset(at, 0x42, 4096)\n"
        "libc.free(ctypes.c_void_p(at))\n"
        "ctypes.memmove(found, at + 1024, 1024)\n"
        "print(found.raw.count(b'\\x42'))\n"
    )
    found = [
        int(
            subprocess.run(
                [sys.executable, "-c", program, switch],
                capture_output=True,
                text=True,
                check=True,
                cwd=tmp_path,
            ).stdout
        )
        for switch in ("off", "on")
    ]

    assert found == [1024, 0]
