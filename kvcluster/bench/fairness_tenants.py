"""The tenants of `kvcluster bench fairness`, put into a database before the cluster starts."""

import uuid
from pathlib import Path
from typing import NamedTuple

from kvcluster.tenancy.api_key import make_secret
from kvcluster.tenancy.limits import Partitions, TenantLimits, TierPartition
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.tenant import OPERATORS, Act, ApiKey, KeyRole, Tenant
from kvcluster.types import TenantId

RED, BLUE = TenantId("red"), TenantId("blue")
_ACT = Act(principal="local:bench", method="bootstrap")


class Secrets(NamedTuple):
    """Of an operator's key, and of one key of each tenant."""

    operator: str
    red: str
    blue: str


def make_tenants(database: Path, *, floor_bytes: int) -> Secrets:
    """Red and blue, of equal weight, of whom blue has a floor of GPU memory."""
    store = SqliteTenantStore(database)
    try:
        for tenant, floor in ((RED, 0), (BLUE, floor_bytes)):
            gpu = TierPartition(floor_bytes=floor)
            record = Tenant(
                tenant=tenant,
                uid=str(uuid.uuid4()),
                partitions=Partitions(gpu=gpu),
                limits=TenantLimits(),
            )
            store.create(record, _ACT)
        return Secrets(
            _secret(store, OPERATORS, KeyRole.OPERATOR),
            _secret(store, RED, KeyRole.INFERENCE),
            _secret(store, BLUE, KeyRole.INFERENCE),
        )
    finally:
        store.close()


def _secret(store: SqliteTenantStore, tenant: TenantId, role: KeyRole) -> str:
    secret = make_secret()
    key = ApiKey(tenant=tenant, key="bench", uid=secret.uid, digest=secret.digest, role=role)
    store.add_key(key, _ACT)
    return secret.text
