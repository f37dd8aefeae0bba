"""`TenantService`: every RPC as one coroutine from message to message. Knows no gRPC.

Whoever may do a thing is decided first. A tenant's key gets one answer for what is another tenant's
and for what is not there; only an operator is told that something does not exist.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from kvcluster.engine.api import Backend, TenantLoad
from kvcluster.errors import InvalidField, PermissionDenied, StateConflict
from kvcluster.log import get_logger
from kvcluster.router import cache_entries, names, tenant_lists
from kvcluster.router.calls import Call
from kvcluster.router.open_calls import OpenCalls
from kvcluster.router.tenant_policies import PolicyTexts
from kvcluster.router.tenant_records import (
    event_to_proto,
    expiry_from_proto,
    key_to_proto,
    masked,
    report_to_proto,
    role_from_proto,
    seconds_in,
    tenant_to_proto,
    tenant_with,
    usage_to_proto,
)
from kvcluster.router.tenant_watch import TenantWatch
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.api_key import make_secret
from kvcluster.tenancy.shares import TierBytes, has_floors
from kvcluster.tenancy.store import TenantStore
from kvcluster.tenancy.tenant import (
    OPERATORS,
    Act,
    ApiKey,
    KeyRole,
    Tenant,
    TenantState,
    check_id,
    check_text,
    moved,
)
from kvcluster.types import DEFAULT_TENANT, TenantId

ALL_TENANTS = "tenants/-"
_VIEWERS = frozenset({KeyRole.TENANT_VIEWER, KeyRole.TENANT_ADMIN})
_ADMINS = frozenset({KeyRole.TENANT_ADMIN})
_MAX_INTERVAL_S = 3600.0
_MIN_INTERVAL_S = 0.1
_MAX_GRACE_S = 30 * 24 * 3600.0
_DENIED = (
    "permission denied, or it does not exist: use a key whose tenant and role may do this, and "
    "check the name"
)

ResultT = TypeVar("ResultT")
_log = get_logger(__name__)


class TenantService:
    """Serves the tenants of `store`. Holds nothing: they live in the store."""

    def __init__(
        self,
        store: TenantStore,
        watch: TenantWatch,
        backends: Sequence[Backend],
        open_calls: OpenCalls,
        *,
        purge_after_s: float,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        """`open_calls`: of the data port, for usage."""
        self._store = store
        self._watch = watch
        self._backends = tuple(backends)
        self._policies = PolicyTexts(backends)
        self._open_calls = open_calls
        self._purge_after_s = purge_after_s
        self._unix_time = unix_time

    async def create_tenant(self, message: pb.CreateTenantRequest, call: Call) -> pb.Tenant:
        _check_operator(call)
        check_id("tenant_id", message.tenant_id)
        if message.tenant_id == DEFAULT_TENANT:
            raise InvalidField("tenant_id", f"{DEFAULT_TENANT} is whoever calls without a key")
        tenant = tenant_with(
            Tenant(tenant=TenantId(message.tenant_id), uid=str(uuid.uuid4())), message.tenant
        )
        await self._policies.check(tenant.limits)
        act = _act(call, "CreateTenant", validates_only=message.validate_only)
        tiers = await self._tiers_for(tenant)
        made = await _in_thread(lambda: self._store.create(tenant, act, tiers=tiers))
        await self._watch.look()
        return self._done(act, made)

    async def get_tenant(self, message: pb.GetTenantRequest, call: Call) -> pb.Tenant:
        tenant = names.tenant_of(message.name)
        _check_own(call, tenant, _VIEWERS)
        return tenant_to_proto(await self._get(tenant))

    async def list_tenants(
        self, message: pb.ListTenantsRequest, call: Call
    ) -> pb.ListTenantsResponse:
        _check_operator(call)
        page = await _in_thread(lambda: tenant_lists.tenants(self._store, message))
        return pb.ListTenantsResponse(
            tenants=map(tenant_to_proto, page.items), next_page_token=page.next_token
        )

    async def update_tenant(self, message: pb.UpdateTenantRequest, call: Call) -> pb.Tenant:
        _check_operator(call)
        tenant = names.tenant_of(message.tenant.name, field="tenant.name")
        mask = message.update_mask if message.HasField("update_mask") else None

        def update(before: Tenant) -> Tenant:
            if before.state is TenantState.DELETED:
                raise StateConflict("the tenant is deleted: undelete it first")
            return tenant_with(before, masked(tenant_to_proto(before), message.tenant, mask))

        # Also outside the transaction, because engines say what policies and floors are held to.
        wanted = update(await self._get(tenant))
        await self._policies.check(wanted.limits)
        tiers = await self._tiers_for(wanted)
        act = _act(call, "UpdateTenant", validates_only=message.validate_only)
        etag = message.tenant.etag
        changed = await _in_thread(
            lambda: self._store.change(tenant, act, update, etag=etag, tiers=tiers)
        )
        # When it returns, the engines that answer have the tenant's new share.
        await self._watch.look()
        return self._done(act, changed)

    async def delete_tenant(self, message: pb.DeleteTenantRequest, call: Call) -> pb.Tenant:
        _check_operator(call)
        tenant = names.tenant_of(message.name)
        found = await self._get(tenant)
        if not message.force:
            loads = await self._loads(found)
            unfinished = sum(load.num_running + load.num_waiting for load in loads)
            if unfinished:
                raise StateConflict(
                    f"{unfinished} generations of the tenant are unfinished: drain it first, or "
                    "use force to cancel them",
                    metadata={"unfinished_generations": str(unfinished)},
                )
        act = _act(call, "DeleteTenant")
        changed = await _in_thread(
            lambda: self._store.delete(
                tenant, act, purge_after_s=self._purge_after_s, etag=message.etag
            )
        )
        await self._watch.look()
        return self._done(act, changed)

    async def undelete_tenant(self, message: pb.UndeleteTenantRequest, call: Call) -> pb.Tenant:
        _check_operator(call)
        tenant, act = names.tenant_of(message.name), _act(call, "UndeleteTenant")
        tiers = await self._tiers_for(await self._get(tenant))
        undeleted = await _in_thread(lambda: self._store.undelete(tenant, act, tiers=tiers))
        return self._done(act, undeleted)

    async def suspend_tenant(self, message: pb.SuspendTenantRequest, call: Call) -> pb.Tenant:
        _check_operator(call)
        check_text("reason", message.reason)
        return await self._move(
            names.tenant_of(message.name),
            _act(call, "SuspendTenant"),
            lambda found: moved(found, TenantState.SUSPENDED, reason=message.reason),
        )

    async def resume_tenant(self, message: pb.ResumeTenantRequest, call: Call) -> pb.Tenant:
        _check_operator(call)
        return await self._move(
            names.tenant_of(message.name),
            _act(call, "ResumeTenant"),
            lambda found: moved(found, TenantState.ACTIVE),
        )

    async def drain_tenant(self, message: pb.DrainTenantRequest, call: Call) -> pb.Tenant:
        _check_operator(call)
        end_s: float | None = None
        if message.HasField("grace_period"):
            grace_s = seconds_in("grace_period", message.grace_period, least=0, most=_MAX_GRACE_S)
            end_s = self._unix_time() + grace_s
        return await self._move(
            names.tenant_of(message.name),
            _act(call, "DrainTenant"),
            lambda found: msgspec.structs.replace(
                moved(found, TenantState.DRAINING), drain_end_s=end_s
            ),
        )

    async def rotate_tenant_key(self, message: pb.RotateTenantKeyRequest, call: Call) -> pb.Tenant:
        tenant = names.tenant_of(message.name)
        _check_own(call, tenant, _ADMINS)
        act = _act(call, "RotateTenantKey")
        changed = await _in_thread(
            lambda: self._store.rotate_key(tenant, act, erases=message.crypto_erase)
        )
        # The engines that answer have destroyed what the erased keys sealed.
        await self._watch.look()
        return self._done(act, changed)

    async def _tiers_for(self, tenant: Tenant) -> TierBytes | None:
        """Engines are asked only for a tenant with floors."""
        return await self._watch.tiers() if has_floors(tenant) else None

    async def get_tenant_usage(
        self, message: pb.GetTenantUsageRequest, call: Call
    ) -> pb.TenantUsage:
        tenant = names.usage_of(message.name)
        _check_own(call, tenant, _VIEWERS)
        return await self._usage(tenant)

    async def watch_tenant_usage(self, message: pb.WatchTenantUsageRequest, call: Call) -> None:
        tenant = names.usage_of(message.name)
        _check_own(call, tenant, _VIEWERS)
        interval_s = 1.0
        if message.HasField("interval"):
            interval_s = seconds_in(
                "interval", message.interval, least=_MIN_INTERVAL_S, most=_MAX_INTERVAL_S
            )
        while True:
            await call.send(await self._usage(tenant))
            await asyncio.sleep(interval_s)

    async def list_cache_entries(
        self, message: pb.ListCacheEntriesRequest, call: Call
    ) -> pb.ListCacheEntriesResponse:
        tenant = names.tenant_of(message.parent, field="parent")
        _check_own(call, tenant, _VIEWERS)
        await self._get(tenant)
        return await cache_entries.page(self._backends, tenant, message)

    async def purge_cache_entries(
        self, message: pb.PurgeCacheEntriesRequest, call: Call
    ) -> pb.PurgeCacheEntriesResponse:
        tenant = names.tenant_of(message.parent, field="parent")
        _check_own(call, tenant, _ADMINS)
        wanted = cache_entries.wanted_in(message, tenant)
        await self._get(tenant)
        await cache_entries.check_found(self._backends, tenant, wanted)
        act = _act(call, "PurgeCacheEntries", validates_only=wanted.validates_only)
        # Before the act: what engines have given up cannot be taken back.
        await _in_thread(lambda: self._store.note(tenant, act, cache_entries.said(wanted)))
        purged = await cache_entries.purge(self._backends, tenant, wanted)
        if not act.validates_only:
            _log.info("admin_act", method=act.method, tenant=tenant)
        return purged

    async def create_api_key(
        self, message: pb.CreateApiKeyRequest, call: Call
    ) -> pb.CreateApiKeyResponse:
        tenant = names.tenant_of(message.parent, field="parent")
        _check_own(call, tenant, _ADMINS)
        role = role_from_proto(message.api_key)
        if (role is KeyRole.OPERATOR) != (tenant == OPERATORS):
            raise InvalidField(
                "api_key.role", f"keys of tenants/{OPERATORS} are OPERATOR's, and no others are"
            )
        check_text("api_key.display_name", message.api_key.display_name)
        secret = make_secret()
        # The uid is public: it is part of what a key's owner sends, and finds its record.
        key_id = message.api_key_id or f"k{secret.uid}"
        check_id("api_key_id", key_id)
        key = ApiKey(
            tenant=tenant,
            key=key_id,
            uid=secret.uid,
            digest=secret.digest,
            role=role,
            display_name=message.api_key.display_name,
            expire_time_s=expiry_from_proto(message.api_key, now=self._unix_time()),
        )
        act = _act(call, "CreateApiKey")
        made = await _in_thread(lambda: self._store.add_key(key, act))
        _log.info("admin_act", method=act.method, tenant=tenant)
        return pb.CreateApiKeyResponse(api_key=key_to_proto(made), secret=secret.text)

    async def list_api_keys(
        self, message: pb.ListApiKeysRequest, call: Call
    ) -> pb.ListApiKeysResponse:
        tenant = names.tenant_of(message.parent, field="parent")
        _check_own(call, tenant, _VIEWERS)
        await self._get(tenant)
        page = await _in_thread(lambda: tenant_lists.keys(self._store, tenant, message))
        return pb.ListApiKeysResponse(
            api_keys=map(key_to_proto, page.items), next_page_token=page.next_token
        )

    async def revoke_api_key(self, message: pb.RevokeApiKeyRequest, call: Call) -> pb.ApiKey:
        tenant, key = names.key_of(message.name)
        _check_own(call, tenant, _ADMINS)
        act = _act(call, "RevokeApiKey")
        revoked = await _in_thread(lambda: self._store.revoke_key(tenant, key, act))
        _log.info("admin_act", method=act.method, tenant=tenant)
        await self._watch.look()
        return key_to_proto(revoked)

    async def list_audit_events(
        self, message: pb.ListAuditEventsRequest, call: Call
    ) -> pb.ListAuditEventsResponse:
        tenant: TenantId | None = None
        if message.parent == ALL_TENANTS:
            _check_operator(call)
        else:
            tenant = names.tenant_of(message.parent, field="parent")
            _check_own(call, tenant, _VIEWERS)
        page = await _in_thread(lambda: tenant_lists.events(self._store, tenant, message))
        return pb.ListAuditEventsResponse(
            audit_events=map(event_to_proto, page.items), next_page_token=page.next_token
        )

    async def verify_audit_log(
        self, _message: pb.VerifyAuditLogRequest, call: Call
    ) -> pb.VerifyAuditLogResponse:
        _check_operator(call)
        return report_to_proto(await _in_thread(self._store.check_audit))

    async def _move(
        self, tenant: TenantId, act: Act, change: Callable[[Tenant], Tenant]
    ) -> pb.Tenant:
        changed = await _in_thread(lambda: self._store.change(tenant, act, change))
        await self._watch.look()
        return self._done(act, changed)

    async def _get(self, tenant: TenantId) -> Tenant:
        return await _in_thread(lambda: self._store.get(tenant))

    async def _usage(self, tenant: TenantId) -> pb.TenantUsage:
        found = await self._get(tenant)
        return usage_to_proto(
            found,
            await self._loads(found),
            num_open=self._open_calls.count(tenant),
            now=self._unix_time(),
        )

    async def _loads(self, tenant: Tenant) -> list[TenantLoad]:
        loads = (backend.tenant_load(tenant.tenant, tenant.limits) for backend in self._backends)
        return await asyncio.gather(*loads)

    def _done(self, act: Act, tenant: Tenant) -> pb.Tenant:
        if not act.validates_only:
            _log.info("admin_act", method=act.method, tenant=tenant.tenant)
        return tenant_to_proto(tenant)


def _check_operator(call: Call) -> None:
    if call.caller.role is not KeyRole.OPERATOR:
        raise PermissionDenied(_DENIED)


def _check_own(call: Call, tenant: TenantId, roles: Iterable[KeyRole]) -> None:
    """Raises: PermissionDenied, unless an operator asks, or the tenant itself by one of `roles`."""
    caller = call.caller
    if caller.role is KeyRole.OPERATOR or (caller.tenant == tenant and caller.role in roles):
        return
    raise PermissionDenied(_DENIED)


def _act(call: Call, method: str, *, validates_only: bool = False) -> Act:
    return Act(
        principal=call.caller.principal,
        method=method,
        peer=call.peer,
        validates_only=validates_only,
    )


async def _in_thread(act: Callable[[], ResultT]) -> ResultT:
    """What blocks on the store, without holding up the event loop."""
    return await asyncio.to_thread(act)
