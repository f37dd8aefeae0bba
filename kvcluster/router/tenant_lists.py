"""The lists of `TenantService`: pages and filters over what the store gives in order."""

from kvcluster.errors import InvalidField
from kvcluster.router.paging import Page, page_from
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.filters import conditions_in, matches
from kvcluster.tenancy.store import TenantStore
from kvcluster.tenancy.tenant import ApiKey, AuditEvent, Tenant, TenantState
from kvcluster.types import TenantId

_LABEL = "labels."
_TENANT_FIELDS = ("state", "display_name", _LABEL)
_EVENT_FIELDS = ("method", "principal", "target")
_MAX_NUMBER = 2**63 - 1


def tenants(store: TenantStore, message: pb.ListTenantsRequest) -> Page[Tenant]:
    """By id. Raises: InvalidField, StoreUnavailable."""
    conditions = conditions_in(message.filter, _TENANT_FIELDS)

    def keep(tenant: Tenant) -> bool:
        is_there = message.show_deleted or tenant.state is not TenantState.DELETED
        return is_there and matches(conditions, lambda field: _value_in(tenant, field))

    return page_from(
        store.tenants_after,
        key=lambda tenant: tenant.tenant,
        keep=keep,
        page_size=message.page_size,
        page_token=message.page_token,
    )


def keys(store: TenantStore, tenant: TenantId, message: pb.ListApiKeysRequest) -> Page[ApiKey]:
    """By id. Raises: InvalidField, StoreUnavailable."""
    return page_from(
        lambda after, count: store.keys_after(tenant, after, count),
        key=lambda key: key.key,
        keep=lambda _: True,
        page_size=message.page_size,
        page_token=message.page_token,
    )


def events(
    store: TenantStore, tenant: TenantId | None, message: pb.ListAuditEventsRequest
) -> Page[AuditEvent]:
    """Oldest first; None: of all tenants. Raises: InvalidField, StoreUnavailable."""
    conditions = conditions_in(message.filter, _EVENT_FIELDS)
    return page_from(
        lambda after, count: store.events_after(tenant, _number_in(after), count),
        key=lambda event: str(event.number),
        keep=lambda event: matches(conditions, lambda field: str(getattr(event, field))),
        page_size=message.page_size,
        page_token=message.page_token,
    )


def _value_in(tenant: Tenant, field: str) -> str | None:
    if field == "state":
        return tenant.state.name
    if field == "display_name":
        return tenant.display_name
    return tenant.labels.get(field.removeprefix(_LABEL))


def _number_in(after: str) -> int:
    if after and not (after.isascii() and after.isdecimal() and int(after[:20]) <= _MAX_NUMBER):
        raise InvalidField("page_token", "is none that this server gave: start again")
    return int(after or 0)
