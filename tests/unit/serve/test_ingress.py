"""What a router tells of its ports when it starts, or why it cannot."""

from pathlib import Path

import pytest

from kvcluster.admin_client import AdminClient
from kvcluster.config import ClusterConfig, RouterConfig, TenancyConfig
from kvcluster.errors import ErrorRecord
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.serve.ingress import Ingress
from tests.unit.router.administering import bootstrap


@pytest.fixture(autouse=True)
def _memory_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router sets the allocator and the garbage collection of its process, which is that of other
    tests here."""
    monkeypatch.setattr("kvcluster.serve.ingress.overwrite_freed_memory", lambda: True)
    monkeypatch.setattr("kvcluster.serve.ingress.exempt_living", lambda: None)


def config(database: str, *, insecure_local: bool) -> ClusterConfig:
    return ClusterConfig(
        router=RouterConfig(listen="127.0.0.1:0", insecure_local=insecure_local),
        tenancy=TenancyConfig(database=database, admin_listen="127.0.0.1:0"),
    )


async def test_with_a_database_there_is_an_admin_port(tmp_path: Path) -> None:
    secret = bootstrap(tmp_path / "tenants.sqlite")
    ingress = Ingress(config(str(tmp_path / "tenants.sqlite"), insecure_local=False))
    address, admin = await ingress.startup(), await ingress.admin_address()
    async with AdminClient(admin, api_key=secret) as client:
        made = await client.ask(pb.CreateTenantRequest(tenant_id="red"))
    await ingress.stop(0)

    assert isinstance(made, pb.Tenant)
    assert made.name == "tenants/red"
    assert isinstance(address, str)
    assert address != admin


async def test_without_one_there_is_none() -> None:
    ingress = Ingress(config("", insecure_local=True))

    assert isinstance(await ingress.startup(), str)
    assert await ingress.admin_address() == ""
    await ingress.stop(0)


async def test_a_database_that_cannot_be_opened_is_told_as_a_value(tmp_path: Path) -> None:
    ingress = Ingress(config(str(tmp_path / "no" / "tenants.sqlite"), insecure_local=False))

    refused = await ingress.startup()

    assert isinstance(refused, ErrorRecord)
    assert refused.message.startswith("tenancy.database: ")
    await ingress.stop(0)
