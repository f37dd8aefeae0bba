"""Who is calling: the tenant comes from a call's credential and from nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from kvcluster.errors import PermissionDenied
from kvcluster.tenancy.api_key import uid_in
from kvcluster.tenancy.directory import (
    TenantDirectory,
    check_served,
    check_takes_more,
    invalid_credential,
)
from kvcluster.tenancy.limits import NO_LIMITS, TenantLimits
from kvcluster.tenancy.tenant import OPERATORS, KeyRole, Tenant
from kvcluster.tenancy.token import TokenVerifier
from kvcluster.types import DEFAULT_TENANT, TenantId

CallMetadata = Iterable[tuple[str, str | bytes]]

_BEARER = "bearer "
_LOCAL = "local"


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who a call's credential speaks for."""

    tenant: TenantId
    principal: str = _LOCAL
    """Name of the API key, or `oidc:SUBJECT` of a token; `local` for a call without credential,
    where such are served."""
    key_uid: str = ""
    """Of the API key; empty: another credential, or none."""
    tenant_uid: str = ""
    """Of the tenant that a token spoke for; empty: no token."""
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


class Credentials:
    """Callers by their API keys and tokens. Used in one event loop."""

    def __init__(
        self,
        directory: TenantDirectory,
        *,
        roles: Iterable[KeyRole],
        local: Caller | None = None,
        tokens: TokenVerifier | None = None,
    ) -> None:
        """`roles`: of the credentials that are taken here. `local`: who calls without one; None:
        nobody may. A credential that is there has to be good in either case. `tokens`: None takes
        API keys alone."""
        self._directory = directory
        self._roles = frozenset(roles)
        self._local = local
        self._tokens = tokens

    def authenticate(self, metadata: CallMetadata) -> Caller:
        """Raises: CredentialInvalid, PermissionDenied, StoreUnavailable."""
        sent = [value for key, value in metadata if key.lower() == "authorization"]
        if not sent and self._local is not None:
            return self._local
        caller = self._caller(_secret_in(sent))
        if caller.role not in self._roles:
            wanted = ", ".join(sorted(self._roles))
            raise PermissionDenied(
                f"the credential has the role {caller.role}; this service wants {wanted}"
            )
        return caller

    def _caller(self, secret: str) -> Caller:
        if self._tokens is not None and uid_in(secret) is None:
            holder = self._tokens.holder(secret)
            tenant = self._directory.tenant_named(holder.tenant)
            return Caller(
                tenant=tenant.tenant,
                principal=f"oidc:{holder.subject}",
                tenant_uid=tenant.uid,
                role=holder.role,
            )
        found = self._directory.credential(secret)
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
        if caller.key_uid:
            tenant = self._directory.tenant_of(caller.key_uid)
        elif caller.tenant_uid:
            # Tokens live for minutes and generations for longer: what a good one began goes on for
            # as long as its tenant is served.
            tenant = self._directory.tenant_named(caller.tenant, uid=caller.tenant_uid)
        else:
            return NO_LIMITS
        self._check_state(tenant, takes_more=takes_more)
        return tenant.limits

    def _check_state(self, tenant: Tenant, *, takes_more: bool) -> None:
        if takes_more:
            check_takes_more(tenant)
        else:
            check_served(tenant)


class AdminCredentials(Credentials):
    """Callers of `TenantService`: a suspended tenant may still read that it is."""

    def _check_state(self, tenant: Tenant, *, takes_more: bool) -> None:
        pass


def inference_credentials(
    directory: TenantDirectory, *, serves_local: bool, tokens: TokenVerifier | None = None
) -> Credentials:
    """For `InferenceService`."""
    local = LOCAL_USER if serves_local else None
    return Credentials(directory, roles=(KeyRole.INFERENCE,), local=local, tokens=tokens)


def admin_credentials(
    directory: TenantDirectory, *, serves_local: bool, tokens: TokenVerifier | None = None
) -> AdminCredentials:
    """For `TenantService`."""
    local = LOCAL_OPERATOR if serves_local else None
    roles = set(KeyRole) - {KeyRole.INFERENCE}
    return AdminCredentials(directory, roles=roles, local=local, tokens=tokens)


def _secret_in(sent: list[str | bytes]) -> str:
    # Of several, each server on the way might take another one.
    if len(sent) != 1 or not isinstance(sent[0], str):
        raise invalid_credential()
    if sent[0][: len(_BEARER)].lower() != _BEARER:
        raise invalid_credential()
    return sent[0][len(_BEARER) :].strip()
