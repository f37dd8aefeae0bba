"""The admin port: a listener of its own around `TenantService`, and the watch over what runs."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from kvcluster.config import RouterConfig, TenancyConfig
from kvcluster.engine.api import Backend
from kvcluster.log import get_logger
from kvcluster.router.access import Access
from kvcluster.router.auth import admin_credentials
from kvcluster.router.calls import CallWrapper
from kvcluster.router.listener import bind, host_and_port, reachable, server_options
from kvcluster.router.open_calls import OpenCalls
from kvcluster.router.published import PublishedPrefixes
from kvcluster.router.tenant_watch import TenantWatch
from kvcluster.router.tenants import TenantService
from kvcluster.router.tls import admin_tls
from kvcluster.rpc.v1 import tenant_service_pb2 as pb

ADMIN_SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TenantService"].full_name

_log = get_logger(__name__)


class AdminServer:
    """One listener for administrators. Start and stop it in the event loop that serves it."""

    def __init__(
        self,
        backends: Sequence[Backend],
        router: RouterConfig,
        tenancy: TenancyConfig,
        access: Access,
        open_calls: OpenCalls,
        *,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        """`router`: the limits of messages and connections, and whether callers without a key are
        operators. `open_calls`: of the data port. Raises: ConfigError for an address that strangers
        could reach."""
        self._listen = tenancy.admin_listen
        self._address = reachable(
            "tenancy.admin_listen", router, tenancy.admin_listen, has_tls=access.tls.is_on
        )
        self._tls = admin_tls(access.tls)
        self._config = router
        own_calls = OpenCalls()
        self._watch = TenantWatch(
            access.directory, access.store, backends, (open_calls, own_calls), unix_time=unix_time
        )
        self._service = TenantService(
            access.store,
            self._watch,
            backends,
            open_calls,
            purge_after_s=tenancy.purge_after_s,
            unix_time=unix_time,
        )
        self._published = PublishedPrefixes(access.store, backends)
        self._wrap = CallWrapper(
            admin_credentials(
                access.directory, serves_local=router.insecure_local, tokens=access.tokens
            ),
            own_calls,
            max_message_bytes=router.max_message_bytes,
            max_unary_calls=router.max_unary_calls,
            write_timeout_s=router.write_timeout_s,
        )
        self._health = health.aio.HealthServicer()
        self._server: aio.Server | None = None
        self._watching: asyncio.Task[None] | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._port = 0

    @property
    def address(self) -> str:
        """HOST:PORT as bound. Valid after `start`."""
        return host_and_port(self._address, self._port)

    async def start(self) -> None:
        """Bind and serve. Raises ConfigError when the address cannot be bound."""
        self._server = aio.server(options=server_options(self._config))
        self._server.add_generic_rpc_handlers((self._handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (ADMIN_SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        for name in ("", ADMIN_SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.ServingStatus.SERVING)
        self._port = bind(self._server, "tenancy.admin_listen", self._listen, self._tls)
        await self._server.start()
        self._watching = asyncio.create_task(self._watch.run())
        self._watching.add_done_callback(_log_failure)
        self._publishing = asyncio.create_task(self._published.run())
        self._publishing.add_done_callback(_log_failure)

    async def stop(self, *, grace_s: float) -> None:
        """Take no more calls, give running ones `grace_s` to end, then cancel them."""
        for task in (self._watching, self._publishing):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_s)

    def _handler(self) -> grpc.GenericRpcHandler:
        unary, service = self._wrap.unary, self._service
        return grpc.method_handlers_generic_handler(
            ADMIN_SERVICE_NAME,
            {
                "CreateTenant": unary(pb.CreateTenantRequest, service.create_tenant),
                "GetTenant": unary(pb.GetTenantRequest, service.get_tenant),
                "ListTenants": unary(pb.ListTenantsRequest, service.list_tenants),
                "UpdateTenant": unary(pb.UpdateTenantRequest, service.update_tenant),
                "DeleteTenant": unary(pb.DeleteTenantRequest, service.delete_tenant),
                "UndeleteTenant": unary(pb.UndeleteTenantRequest, service.undelete_tenant),
                "SuspendTenant": unary(pb.SuspendTenantRequest, service.suspend_tenant),
                "ResumeTenant": unary(pb.ResumeTenantRequest, service.resume_tenant),
                "DrainTenant": unary(pb.DrainTenantRequest, service.drain_tenant),
                "RotateTenantKey": unary(pb.RotateTenantKeyRequest, service.rotate_tenant_key),
                "GetTenantUsage": unary(pb.GetTenantUsageRequest, service.get_tenant_usage),
                "WatchTenantUsage": self._wrap.server_stream(
                    pb.WatchTenantUsageRequest, service.watch_tenant_usage
                ),
                "ListCacheEntries": unary(pb.ListCacheEntriesRequest, service.list_cache_entries),
                "PurgeCacheEntries": unary(
                    pb.PurgeCacheEntriesRequest, service.purge_cache_entries
                ),
                "CreateApiKey": unary(pb.CreateApiKeyRequest, service.create_api_key),
                "ListApiKeys": unary(pb.ListApiKeysRequest, service.list_api_keys),
                "RevokeApiKey": unary(pb.RevokeApiKeyRequest, service.revoke_api_key),
                "ListAuditEvents": unary(pb.ListAuditEventsRequest, service.list_audit_events),
                "VerifyAuditLog": unary(pb.VerifyAuditLogRequest, service.verify_audit_log),
                "PublishPrefix": unary(pb.PublishPrefixRequest, self._published.publish),
                "ListPublishedPrefixes": unary(
                    pb.ListPublishedPrefixesRequest, self._published.list_all
                ),
                "WithdrawPrefix": unary(pb.WithdrawPrefixRequest, self._published.withdraw),
            },
        )


def _log_failure(watching: "asyncio.Task[None]") -> None:
    # New calls are still refused as they should be; what runs is looked after no more.
    if not watching.cancelled() and watching.exception() is not None:
        _log.error("tenant_watch_failed", exc_info=watching.exception())
