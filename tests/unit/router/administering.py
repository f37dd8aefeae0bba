"""A router with tenants on two real ports, and those who call it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from grpc import aio

from kvcluster.config import RouterConfig, TenancyConfig
from kvcluster.engine.api import Backend
from kvcluster.router.front_door import FrontDoor
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.rpc.v1.tenant_service_pb2_grpc import TenantServiceStub
from kvcluster.tenancy.api_key import make_secret
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.tenant import OPERATORS, Act, ApiKey, KeyRole

Metadata = tuple[tuple[str, str], ...]
INFERENCE, VIEWER, ADMIN, OPERATOR = (
    pb.ApiKey.ROLE_INFERENCE,
    pb.ApiKey.ROLE_TENANT_VIEWER,
    pb.ApiKey.ROLE_TENANT_ADMIN,
    pb.ApiKey.ROLE_OPERATOR,
)


def bearer(secret: str) -> Metadata:
    return (("authorization", f"Bearer {secret}"),)


def bootstrap(database: Path) -> str:
    """An operator's secret, put into the database as `kvcluster tenants bootstrap` does."""
    secret = make_secret()
    store = SqliteTenantStore(database)
    store.add_key(
        ApiKey(
            tenant=OPERATORS,
            key="root",
            uid=secret.uid,
            digest=secret.digest,
            role=KeyRole.OPERATOR,
        ),
        Act(principal="local:test", method="bootstrap"),
    )
    store.close()
    return secret.text


@dataclass
class Administered:
    """A running router, its admin stub and an operator's credential."""

    door: FrontDoor
    channel: aio.Channel
    stub: TenantServiceStub
    operator: Metadata
    secret: str

    async def create(self, tenant: str, **limits: object) -> pb.Tenant:
        request = pb.CreateTenantRequest(
            tenant_id=tenant,
            tenant=pb.Tenant(limits=pb.TenantLimits(**limits)),  # type: ignore[arg-type]
        )
        return await self.stub.CreateTenant(request, metadata=self.operator)

    async def key(self, tenant: str, role: int = INFERENCE, key: str = "") -> str:
        """The secret of a new key."""
        request = pb.CreateApiKeyRequest(
            parent=f"tenants/{tenant}",
            api_key_id=key,
            api_key=pb.ApiKey(role=role),  # type: ignore[arg-type]
        )
        return (await self.stub.CreateApiKey(request, metadata=self.operator)).secret

    async def get(self, tenant: str) -> pb.Tenant:
        request = pb.GetTenantRequest(name=f"tenants/{tenant}")
        return await self.stub.GetTenant(request, metadata=self.operator)


@asynccontextmanager
async def administered(
    database: Path, *backends: Backend, operator: str = "", **router: object
) -> AsyncIterator[Administered]:
    """`operator`: the secret of one, where the database has one already."""
    secret = operator or bootstrap(database)
    door = FrontDoor(
        backends,
        RouterConfig(listen="127.0.0.1:0", **router),  # type: ignore[arg-type]
        TenancyConfig(database=str(database), admin_listen="127.0.0.1:0"),
    )
    await door.start()
    try:
        async with aio.insecure_channel(door.admin_address) as channel:
            stub = TenantServiceStub(channel)
            yield Administered(door, channel, stub, bearer(secret), secret)
    finally:
        await door.stop(grace_s=0)
