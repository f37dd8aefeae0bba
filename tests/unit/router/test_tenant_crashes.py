"""Kill -9 of a router while administrators act: what they were told is there afterwards."""

import asyncio
import random
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from kvcluster.admin_client import AdminClient
from kvcluster.errors import KvClusterError, ResourceExists
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from tests.unit.router.administering import INFERENCE, Administered, administered, bootstrap
from tests.unit.router.fake_backend import FakeBackend

ROOT = Path(__file__).parents[3]
NUM_KILLS = 6
NUM_ACTS = 500


async def started(database: Path) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.unit.router.dying_router",
        str(database),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    return process, (await process.stdout.readline()).decode().strip()


def acts(number: int) -> list[tuple[str, object]]:
    name = f"tenants/t{number}"
    key = pb.ApiKey(role=INFERENCE)
    return [
        ("CreateTenant", pb.CreateTenantRequest(tenant_id=f"t{number}")),
        ("CreateApiKey", pb.CreateApiKeyRequest(parent=name, api_key_id="k", api_key=key)),
        ("SuspendTenant", pb.SuspendTenantRequest(name=name)),
        ("RevokeApiKey", pb.RevokeApiKeyRequest(name=f"{name}/apiKeys/k")),
        ("RotateTenantKey", pb.RotateTenantKeyRequest(name=name, crypto_erase=True)),
    ]


async def audited_in(admin: Administered) -> list[tuple[str, str]]:
    """Method and target of every audit event."""
    audited: list[tuple[str, str]] = []
    request = pb.ListAuditEventsRequest(parent="tenants/-", page_size=1000)
    while True:
        page = await admin.stub.ListAuditEvents(request, metadata=admin.operator)
        audited += [(event.method, event.target) for event in page.audit_events]
        request.page_token = page.next_page_token
        if not request.page_token:
            return audited


@pytest.mark.slow
async def test_of_500_acts_with_kills_in_between_nothing_that_was_acknowledged_is_lost(
    tmp_path: Path,
) -> None:
    database = tmp_path / "tenants.sqlite"
    secret = bootstrap(database)
    chance = random.Random(7)
    kills = sorted(chance.sample(range(1, NUM_ACTS), NUM_KILLS))
    todo = [act for number in range(NUM_ACTS // 5) for act in acts(number)]
    acknowledged: list[tuple[str, str]] = []
    done = 0
    for until in [*kills, NUM_ACTS]:
        process, address = await started(database)
        async with AdminClient(address, api_key=secret) as client:
            while done < until:
                method, request = todo[done]
                # It may have been done, and the process killed before it could say so.
                with suppress(ResourceExists):
                    await client.ask(request)
                acknowledged.append((method, _target(request)))
                done += 1
            if until < NUM_ACTS:
                # In the middle of the next act: it may be done or not, but not in half.
                asking = asyncio.ensure_future(client.ask(todo[done][1]))
                await asyncio.sleep(chance.random() * 0.003)
                process.kill()
                await asyncio.wait({asking})
                if asking.exception() is None:
                    acknowledged.append((todo[done][0], _target(todo[done][1])))
                else:
                    assert isinstance(asking.exception(), KvClusterError)
        if process.returncode is None:
            process.kill()
        await process.wait()

    async with administered(database, FakeBackend(), operator=secret) as admin:
        report = await admin.stub.VerifyAuditLog(
            pb.VerifyAuditLogRequest(), metadata=admin.operator
        )
        audited = await audited_in(admin)
        last = await admin.get(f"t{NUM_ACTS // 5 - 1}")

    assert set(acknowledged) <= set(audited)
    assert (report.intact, report.events) == (True, len(audited))
    assert (last.state, last.key_version) == (pb.Tenant.STATE_SUSPENDED, 2)


def _target(request: object) -> str:
    match request:
        case pb.CreateTenantRequest():
            return f"tenants/{request.tenant_id}"
        case pb.CreateApiKeyRequest():
            return f"{request.parent}/apiKeys/{request.api_key_id}"
    assert isinstance(
        request, pb.SuspendTenantRequest | pb.RevokeApiKeyRequest | pb.RotateTenantKeyRequest
    )
    return request.name
