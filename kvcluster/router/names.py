"""Resource names: tenants/{tenant}/generations/{generation} and models/{model}."""

import re

from kvcluster.errors import GenerationNotFound, InvalidField
from kvcluster.types import GenerationId, TenantId

_GENERATION_NAME = re.compile(r"tenants/([A-Za-z0-9-]{1,63})/generations/([A-Za-z0-9_-]{1,128})")
_TENANT_NAME = re.compile(r"tenants/([A-Za-z0-9-]{1,63})")


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


def check_parent(name: str, tenant: TenantId) -> None:
    """Raises InvalidField unless `name` is `tenant`'s; the same for all other tenants."""
    match = _TENANT_NAME.fullmatch(name)
    if match is None or match[1] != tenant:
        raise InvalidField("parent", "want tenants/{tenant} with your own tenant")


def generation_not_found() -> GenerationNotFound:
    """One text for all cases, so that it does not tell whether another tenant has the name."""
    return GenerationNotFound(
        "no such generation: check the name; it never was, is not yours or is no longer kept"
    )
