"""Resource names: tenants/{tenant}, what is below a tenant, and models/{model}."""

import re

from kvcluster.errors import ContextNotFound, GenerationNotFound, InvalidField
from kvcluster.types import GenerationId, TenantId

_GENERATION_NAME = re.compile(r"tenants/([A-Za-z0-9-]{1,63})/generations/([A-Za-z0-9_-]{1,128})")
_CONTEXT_NAME = re.compile(r"tenants/([A-Za-z0-9-]{1,63})/contexts/([a-z0-9-]{1,63})")
_CONTEXT_ID = re.compile(r"[a-z0-9-]{1,63}")
_ENTRY_NAME = re.compile(r"tenants/([A-Za-z0-9-]{1,63})/cacheEntries/([A-Za-z0-9_-]{1,128})")
_PUBLISHED_NAME = re.compile(r"publishedPrefixes/([a-z0-9-]{1,63})")
_TENANT_NAME = re.compile(r"tenants/([A-Za-z0-9-]{1,63})")
_USAGE_NAME = re.compile(r"tenants/([A-Za-z0-9-]{1,63})/usage")
_KEY_NAME = re.compile(r"tenants/([A-Za-z0-9-]{1,63})/apiKeys/([a-z0-9-]{1,63})")


def tenant_name(tenant: TenantId) -> str:
    return f"tenants/{tenant}"


def generation_name(tenant: TenantId, generation: GenerationId) -> str:
    return f"tenants/{tenant}/generations/{generation}"


def model_name(model: str) -> str:
    return f"models/{model}"


def generation_of(name: str, tenant: TenantId) -> GenerationId:
    """The id in `name`, if it is one of `tenant`'s.

    Raises: InvalidField for another form, GenerationNotFound for another tenant.
    """
    match = _GENERATION_NAME.fullmatch(name)
    if match is None:
        raise InvalidField("name", "want tenants/{tenant}/generations/{generation}")
    if match[1] != tenant:
        raise generation_not_found()
    return GenerationId(match[2])


def context_name(tenant: TenantId, context_id: str) -> str:
    return f"tenants/{tenant}/contexts/{context_id}"


def context_of(name: str, tenant: TenantId, *, field: str = "name") -> str:
    """The id in `name`, if it is one of `tenant`'s.

    Raises: InvalidField for another form, ContextNotFound for another tenant.
    """
    match = _match(_CONTEXT_NAME, name, field, "tenants/{tenant}/contexts/{context}")
    if match[1] != tenant:
        raise context_not_found()
    return match[2]


def checked_context_id(context_id: str, field: str) -> str:
    """Raises: InvalidField."""
    if not _CONTEXT_ID.fullmatch(context_id):
        raise InvalidField(field, "want 1 to 63 of the characters a-z 0-9 -")
    return context_id


def context_not_found() -> ContextNotFound:
    """One text for all cases, as the engine's own."""
    return ContextNotFound(
        "no such context: check the name; it never was, is not yours, has expired or was deleted"
    )


def check_parent(name: str, tenant: TenantId) -> None:
    """Raises InvalidField unless `name` is `tenant`'s; the same for all other tenants."""
    match = _TENANT_NAME.fullmatch(name)
    if match is None or match[1] != tenant:
        raise InvalidField("parent", "want tenants/{tenant} with your own tenant")


def tenant_of(name: str, *, field: str = "name") -> TenantId:
    """Raises: InvalidField."""
    return TenantId(_match(_TENANT_NAME, name, field, "tenants/{tenant}")[1])


def usage_of(name: str) -> TenantId:
    """The tenant whose usage it is. Raises: InvalidField."""
    return TenantId(_match(_USAGE_NAME, name, "name", "tenants/{tenant}/usage")[1])


def usage_name(tenant: TenantId) -> str:
    return f"tenants/{tenant}/usage"


def key_of(name: str) -> tuple[TenantId, str]:
    """Tenant and id of an API key. Raises: InvalidField."""
    match = _match(_KEY_NAME, name, "name", "tenants/{tenant}/apiKeys/{api_key}")
    return TenantId(match[1]), match[2]


def cache_entry_of(name: str, tenant: TenantId) -> str:
    """The id of a cache entry, which is to be `tenant`'s. Raises: InvalidField."""
    form = "tenants/{tenant}/cacheEntries/{cache_entry}"
    match = _match(_ENTRY_NAME, name, "names", form)
    if match[1] != tenant:
        raise InvalidField("names", f"want entries of the parent, {tenant_name(tenant)}")
    return match[2]


def cache_entry_name(tenant: TenantId, entry: str) -> str:
    return f"tenants/{tenant}/cacheEntries/{entry}"


def published_of(name: str) -> str:
    """The id of a published prefix. Raises: InvalidField."""
    return _match(_PUBLISHED_NAME, name, "name", "publishedPrefixes/{published_prefix}")[1]


def event_name(tenant: TenantId, number: int) -> str:
    return f"tenants/{tenant}/auditEvents/{number}"


def _match(pattern: re.Pattern[str], name: str, field: str, form: str) -> re.Match[str]:
    match = pattern.fullmatch(name)
    if match is None:
        raise InvalidField(field, f"want {form}")
    return match


def generation_not_found() -> GenerationNotFound:
    """One text for all cases, so that it does not tell whether another tenant has the name."""
    return GenerationNotFound(
        "no such generation: check the name; it never was, is not yours or is no longer kept"
    )
