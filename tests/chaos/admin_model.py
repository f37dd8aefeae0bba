"""What administrators have done, as a plain dictionary: the definition the store is held to."""

import random
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.tenant import OPERATORS
from kvcluster.types import TenantId
from tests.unit.router.administering import INFERENCE


@dataclass
class TenantModel:
    state: str = "active"
    weight: int = 1
    data_keys: list[int] = field(default_factory=lambda: [1])
    """Versions that are there."""
    last_version: int = 1
    keys: dict[str, bool] = field(default_factory=dict)
    """Whether each is revoked."""


Model = dict[str, TenantModel]


class Act(NamedTuple):
    """An RPC, what it audits, and what is so afterwards."""

    request: Message
    method: str
    target: str
    after: Model


def next_act(model: Model, chance: random.Random) -> Act:
    """One that is allowed now and changes something."""
    after = deepcopy(model)
    name = chance.choice([*model, f"t{len(model)}"]) if len(model) < 40 else chance.choice([*model])
    if name not in model:
        after[name] = TenantModel()
        return Act(pb.CreateTenantRequest(tenant_id=name), "CreateTenant", f"tenants/{name}", after)
    tenant, target = after[name], f"tenants/{name}"
    if tenant.state == "deleted":
        tenant.state, tenant.last_version = "active", tenant.last_version + 1
        tenant.data_keys = [tenant.last_version]
        return Act(pb.UndeleteTenantRequest(name=target), "UndeleteTenant", target, after)
    return chance.choice([_update, _toggle, _rotate, _delete, _add_key, _revoke_key])(
        tenant, target, after, chance
    )


def _update(tenant: TenantModel, target: str, after: Model, chance: random.Random) -> Act:
    tenant.weight = tenant.weight % 1000 + 1
    given = pb.Tenant(name=target, limits=pb.TenantLimits(weight=tenant.weight))
    mask = FieldMask(paths=["limits.weight"])
    request = pb.UpdateTenantRequest(tenant=given, update_mask=mask)
    return Act(request, "UpdateTenant", target, after)


def _toggle(tenant: TenantModel, target: str, after: Model, chance: random.Random) -> Act:
    if tenant.state == "active":
        tenant.state = "suspended"
        return Act(pb.SuspendTenantRequest(name=target), "SuspendTenant", target, after)
    tenant.state = "active"
    return Act(pb.ResumeTenantRequest(name=target), "ResumeTenant", target, after)


def _rotate(tenant: TenantModel, target: str, after: Model, chance: random.Random) -> Act:
    erases = chance.random() < 0.5
    tenant.last_version += 1
    tenant.data_keys = [*([] if erases else tenant.data_keys), tenant.last_version]
    request = pb.RotateTenantKeyRequest(name=target, crypto_erase=erases)
    return Act(request, "RotateTenantKey", target, after)


def _delete(tenant: TenantModel, target: str, after: Model, chance: random.Random) -> Act:
    tenant.state, tenant.data_keys = "deleted", []
    return Act(pb.DeleteTenantRequest(name=target, force=True), "DeleteTenant", target, after)


def _add_key(tenant: TenantModel, target: str, after: Model, chance: random.Random) -> Act:
    key = f"k{len(tenant.keys)}"
    tenant.keys[key] = False
    request = pb.CreateApiKeyRequest(
        parent=target, api_key_id=key, api_key=pb.ApiKey(role=INFERENCE)
    )
    return Act(request, "CreateApiKey", f"{target}/apiKeys/{key}", after)


def _revoke_key(tenant: TenantModel, target: str, after: Model, chance: random.Random) -> Act:
    good = [key for key, is_revoked in tenant.keys.items() if not is_revoked]
    if not good:
        return _add_key(tenant, target, after, chance)
    key = chance.choice(good)
    tenant.keys[key] = True
    name = f"{target}/apiKeys/{key}"
    return Act(pb.RevokeApiKeyRequest(name=name), "RevokeApiKey", name, after)


def read_model(store: SqliteTenantStore) -> Model:
    """What the store says, in the same words."""
    found = {}
    for tenant in store.tenants_after("", 10_000):
        if tenant.tenant == OPERATORS:
            continue
        versions = [*store.data_keys(TenantId(tenant.tenant))]
        assert tenant.key_version == (max(versions) if versions else 0)
        found[str(tenant.tenant)] = TenantModel(
            state=str(tenant.state),
            weight=tenant.limits.weight,
            data_keys=versions,
            last_version=tenant.last_key_version,
            keys={
                key.key: key.revoke_time_s is not None
                for key in store.keys_after(tenant.tenant, "", 10_000)
            },
        )
    return found
