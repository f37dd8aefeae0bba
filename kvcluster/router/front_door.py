"""All that one router serves: the data port, and with tenants their admin port."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kvcluster.config import RouterConfig, TenancyConfig
from kvcluster.config_access import OidcConfig, TlsConfig, check_together
from kvcluster.engine.api import Backend
from kvcluster.log import get_logger
from kvcluster.router.access import Access
from kvcluster.router.admin_server import AdminServer
from kvcluster.router.auth import inference_credentials
from kvcluster.router.open_calls import OpenCalls
from kvcluster.router.server import RouterServer
from kvcluster.router.tls import data_tls
from kvcluster.router.token_keys import TokenKeys
from kvcluster.tenancy.directory import TenantDirectory
from kvcluster.tenancy.root_key import read_root_key
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.token import TokenVerifier

_log = get_logger(__name__)


class FrontDoor:
    """One or two listeners in front of `backends`. Start and stop it in the event loop that serves
    it."""

    def __init__(
        self,
        backends: Sequence[Backend],
        router: RouterConfig,
        tenancy: TenancyConfig,
        *,
        tls: TlsConfig | None = None,
        oidc: OidcConfig | None = None,
    ) -> None:
        """`tls`, `oidc`: None is their default, off."""
        self._backends = tuple(backends)
        self._config = router
        self._tenancy = tenancy
        self._tls = tls or TlsConfig()
        self._oidc = oidc or OidcConfig()
        self._refreshing: asyncio.Task[None] | None = None
        self._store: SqliteTenantStore | None = None
        self._server: RouterServer | None = None
        self._admin: AdminServer | None = None

    @property
    def address(self) -> str:
        """HOST:PORT of the data port as bound. Valid after `start`."""
        assert self._server is not None, "start has returned"
        return self._server.address

    @property
    def admin_address(self) -> str:
        """HOST:PORT of the admin port as bound; empty: there is none. Valid after `start`."""
        return "" if self._admin is None else self._admin.address

    async def start(self) -> None:
        """Open the database, bind and serve. Raises: ConfigError."""
        check_together(self._tls, self._oidc, has_tenants=bool(self._tenancy.database))
        if not self._tenancy.database:
            self._server = RouterServer(self._backends, self._config, tls=data_tls(self._tls))
            await self._server.start()
            return
        root_key = read_root_key(self._tenancy.root_key)
        self._store = SqliteTenantStore(Path(self._tenancy.database), root_key=root_key)
        open_calls = OpenCalls()
        access = Access(
            store=self._store,
            directory=TenantDirectory(self._store),
            tokens=await self._tokens(),
            tls=self._tls,
        )
        self._server = RouterServer(
            self._backends,
            self._config,
            authenticator=inference_credentials(
                access.directory,
                serves_local=self._config.insecure_local,
                tokens=access.tokens,
            ),
            open_calls=open_calls,
            tls=data_tls(self._tls),
        )
        self._admin = AdminServer(self._backends, self._config, self._tenancy, access, open_calls)
        await self._server.start()
        await self._admin.start()
        _log.info("admin_port_open", listen=self._admin.address)

    async def _tokens(self) -> TokenVerifier | None:
        """Raises: ConfigError."""
        if not self._oidc.is_on:
            return None
        verifier = TokenVerifier(self._oidc)
        keys = TokenKeys(self._oidc, verifier)
        await keys.start()
        self._refreshing = asyncio.create_task(keys.run())
        return verifier

    async def publish_health(self) -> None:
        """Ask the engines now, and say what they answer."""
        assert self._server is not None, "start has returned"
        await self._server.publish_health()

    async def stop(self, *, grace_s: float) -> None:
        """Take no more calls; those that run have `grace_s` to end."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            with suppress(asyncio.CancelledError):
                await self._refreshing
        if self._admin is not None:
            await self._admin.stop(grace_s=0)
        if self._server is not None:
            await self._server.stop(grace_s=grace_s)
        if self._store is not None:
            self._store.close()
