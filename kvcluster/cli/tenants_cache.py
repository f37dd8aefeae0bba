"""The verbs of `kvcluster tenants` on what a tenant keeps in the prefix cache."""

from typing import Annotated

import typer

from kvcluster.cli.exits import exiting
from kvcluster.cli.tenants_asking import (
    DEFAULT_ADMIN,
    ApiKeyOption,
    JsonOption,
    PageSizeOption,
    PageTokenOption,
    ServerOption,
    TenantArgument,
    ValidateOption,
    ask,
    list_all,
    show,
    tenant_name,
)


def list_cache_entries(
    tenant: TenantArgument,
    *,
    page_size: PageSizeOption = 0,
    page_token: PageTokenOption = "",
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what a tenant keeps in the prefix cache, by id."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.ListCacheEntriesRequest(
            parent=tenant_name(tenant), page_size=page_size, page_token=page_token
        )
        show(list_all(server, api_key_file, request), as_json=as_json)


def purge_cache_entries(
    tenant: TenantArgument,
    entry: Annotated[
        list[str] | None,
        typer.Argument(help="Ids; each goes with what follows it. None: all.", show_default=False),
    ] = None,
    *,
    namespace: Annotated[
        str | None, typer.Option(help="Only what is in this cache namespace; default: in any.")
    ] = None,
    validate_only: ValidateOption = False,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give up what a tenant keeps and nobody uses; it is zeroed when this returns."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        parent = tenant_name(tenant)
        request = pb.PurgeCacheEntriesRequest(
            parent=parent,
            names=[
                each if each.startswith("tenants/") else f"{parent}/cacheEntries/{each}"
                for each in entry or ()
            ],
            cache_namespace=namespace,
            validate_only=validate_only,
        )
        show(ask(server, api_key_file, request), as_json=as_json)
