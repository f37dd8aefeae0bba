"""What tests of tenants share: records to write, and a clock."""

import uuid
from dataclasses import dataclass

from kvcluster.tenancy.api_key import NewSecret, make_secret
from kvcluster.tenancy.store import TenantStore
from kvcluster.tenancy.tenant import Act, ApiKey, KeyRole, Tenant
from kvcluster.types import TenantId

RED = TenantId("red")
BLUE = TenantId("blue")


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def act(method: str = "Test", **fields: object) -> Act:
    return Act(principal="tenants/operators/apiKeys/root", method=method, **fields)  # type: ignore[arg-type]


def tenant(name: str = RED, **fields: object) -> Tenant:
    return Tenant(tenant=TenantId(name), uid=str(uuid.uuid4()), **fields)  # type: ignore[arg-type]


def add_key(
    store: TenantStore,
    owner: TenantId = RED,
    key: str = "k1",
    role: KeyRole = KeyRole.INFERENCE,
    expire_time_s: float | None = None,
) -> NewSecret:
    secret = make_secret()
    record = ApiKey(
        tenant=owner,
        key=key,
        uid=secret.uid,
        digest=secret.digest,
        role=role,
        expire_time_s=expire_time_s,
    )
    store.add_key(record, act("CreateApiKey"))
    return secret
