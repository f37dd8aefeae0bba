"""Who is calling: the tenant comes from a call's credential and from nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from kvcluster.errors import PermissionDenied
from kvcluster.tenancy.directory import (
    TenantDirectory,
    check_served,
    check_takes_more,
    invalid_credential,
)
from kvcluster.tenancy.limits import NO_LIMITS, TenantLimits
from kvcluster.tenancy.tenant import OPERATORS, KeyRole, Tenant
from kvcluster.types import DEFAULT_TENANT, TenantId

CallMetadata = Iterable[tuple[str, str | bytes]]

_BEARER = "bearer "
_LOCAL = "local"


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who a call's credential speaks for."""

    tenant: TenantId
    principal: str = _LOCAL
    """Name of the API key; `local` for a call without credential, where such are served."""
    key_uid: str = ""
    """Empty: no credential."""
    role: KeyRole = KeyRole.INFERENCE


LOCAL_USER = Caller(tenant=DEFAULT_TENANT)
LOCAL_OPERATOR = Caller(tenant=OPERATORS, role=KeyRole.OPERATOR)


class Authenticator(Protocol):
    """Turns a call's metadata into its caller, and says what that caller may do now."""

    def authenticate(self, metadata: CallMetadata) -> Caller:
        """The caller by the credential in `metadata`. Raises KvClusterError to refuse the call."""
        ...

    def check_served(self, caller: Caller) -> TenantLimits:
        """The limits of the caller's tenant, if its calls are answered now. Raises KvClusterError
        to refuse the call, also one that runs."""
        ...

    def check_takes_more(self, caller: Caller) -> TenantLimits:
        """The same, if its tenant may begin generations now."""
        ...


class InsecureLocal:
    """Everybody is the default tenant. The server binds it to loopback addresses only."""

    def authenticate(self, metadata: CallMetadata) -> Caller:  # noqa: ARG002  protocol
        return LOCAL_USER

    def check_served(self, caller: Caller) -> TenantLimits:  # noqa: ARG002  protocol
        return NO_LIMITS

    def check_takes_more(self, caller: Caller) -> TenantLimits:  # noqa: ARG002  protocol
        return NO_LIMITS


class ApiKeys:
    """Callers by their API keys. Used in one event loop."""

    def __init__(
        self, directory: TenantDirectory, *, roles: Iterable[KeyRole], local: Caller | None = None
    ) -> None:
        """`roles`: of the keys that are taken here. `local`: who calls without a credential; None:
        nobody may. A credential that is there has to be good in either case."""
        self._directory = directory
        self._roles = frozenset(roles)
        self._local = local

    def authenticate(self, metadata: CallMetadata) -> Caller:
        """Raises: CredentialInvalid, PermissionDenied, StoreUnavailable."""
        sent = [value for key, value in metadata if key.lower() == "authorization"]
        if not sent and self._local is not None:
            return self._local
        found = self._directory.credential(_secret_in(sent))
        if found.key.role not in self._roles:
            wanted = ", ".join(sorted(self._roles))
            raise PermissionDenied(
                f"the API key has the role {found.key.role}; this service wants {wanted}"
            )
        return Caller(
            tenant=found.tenant.tenant,
            principal=found.key.name,
            key_uid=found.key.uid,
            role=found.key.role,
        )

    def check_served(self, caller: Caller) -> TenantLimits:
        """Raises: CredentialInvalid, TenantSuspended, StoreUnavailable."""
        return self._limits(caller, takes_more=False)

    def check_takes_more(self, caller: Caller) -> TenantLimits:
        """Raises: as `check_served`, and TenantDraining."""
        return self._limits(caller, takes_more=True)

    def _limits(self, caller: Caller, *, takes_more: bool) -> TenantLimits:
        if not caller.key_uid:
            return NO_LIMITS
        tenant = self._directory.tenant_of(caller.key_uid)
        self._check_state(tenant, takes_more=takes_more)
        return tenant.limits

    def _check_state(self, tenant: Tenant, *, takes_more: bool) -> None:
        if takes_more:
            check_takes_more(tenant)
        else:
            check_served(tenant)


class AdminKeys(ApiKeys):
    """Callers of `TenantService`: a suspended tenant may still read that it is."""

    def _check_state(self, tenant: Tenant, *, takes_more: bool) -> None:
        pass


def inference_keys(directory: TenantDirectory, *, serves_local: bool) -> ApiKeys:
    """For `InferenceService`."""
    local = LOCAL_USER if serves_local else None
    return ApiKeys(directory, roles=(KeyRole.INFERENCE,), local=local)


def admin_keys(directory: TenantDirectory, *, serves_local: bool) -> AdminKeys:
    """For `TenantService`."""
    local = LOCAL_OPERATOR if serves_local else None
    roles = set(KeyRole) - {KeyRole.INFERENCE}
    return AdminKeys(directory, roles=roles, local=local)


def _secret_in(sent: list[str | bytes]) -> str:
    # Of several, each server on the way might take another one.
    if len(sent) != 1 or not isinstance(sent[0], str):
        raise invalid_credential()
    if sent[0][: len(_BEARER)].lower() != _BEARER:
        raise invalid_credential()
    return sent[0][len(_BEARER) :].strip()
