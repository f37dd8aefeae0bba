"""The verbs of `kvcluster tenants` on API keys and on the audit log."""

from pathlib import Path
from typing import Annotated

import typer

from kvcluster.cli.exits import ExitCode, exiting
from kvcluster.cli.tenants_asking import (
    DEFAULT_ADMIN,
    ApiKeyOption,
    FilterOption,
    JsonOption,
    NameOption,
    PageSizeOption,
    PageTokenOption,
    RootKeyOption,
    ServerOption,
    TenantArgument,
    ask,
    list_all,
    show,
    tenant_name,
)


def create_api_key(
    tenant: TenantArgument,
    *,
    role: Annotated[
        str, typer.Option(help="inference, tenant_viewer, tenant_admin or operator.")
    ] = "inference",
    api_key_id: Annotated[str, typer.Option(help="Its id; default: one is made up.")] = "",
    display_name: NameOption = None,
    expires_in: Annotated[float | None, typer.Option(help="Days from now; default: never.")] = None,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an API key. Its secret is printed once and cannot be shown again."""
    with exiting(as_json=as_json):
        from kvcluster.cli.tenants_fields import api_key_fields
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.CreateApiKeyRequest(
            parent=tenant_name(tenant),
            api_key_id=api_key_id,
            api_key=api_key_fields(role, display_name, expires_in),
        )
        show(ask(server, api_key_file, request), as_json=as_json)


def list_api_keys(
    tenant: TenantArgument,
    *,
    page_size: PageSizeOption = 0,
    page_token: PageTokenOption = "",
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List a tenant's API keys, without secrets."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.ListApiKeysRequest(
            parent=tenant_name(tenant), page_size=page_size, page_token=page_token
        )
        show(list_all(server, api_key_file, request), as_json=as_json)


def revoke_api_key(
    tenant: TenantArgument,
    api_key: Annotated[str, typer.Argument(help="Id of the key.")],
    *,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """End an API key for good, at every router."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.RevokeApiKeyRequest(name=f"{tenant_name(tenant)}/apiKeys/{api_key}")
        show(ask(server, api_key_file, request), as_json=as_json)


def list_audit_events(
    tenant: Annotated[str, typer.Argument(help="Id of the tenant; - for all.")] = "-",
    *,
    filter_: FilterOption = "",
    page_size: PageSizeOption = 0,
    page_token: PageTokenOption = "",
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what was done to a tenant, oldest first."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.ListAuditEventsRequest(
            parent=tenant_name(tenant),
            filter=filter_,
            page_size=page_size,
            page_token=page_token,
        )
        show(list_all(server, api_key_file, request), as_json=as_json)


def verify_audit_log(
    *,
    database: Annotated[
        Path | None, typer.Option(help="Read this file instead of asking a server.")
    ] = None,
    root_key: RootKeyOption = "",
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that no event of the audit log was changed. Exits with 3 when one was."""
    with exiting(as_json=as_json):
        from kvcluster.cli.tenants_offline import check_audit_log
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        if database is not None:
            answer = check_audit_log(database, root_key)
        else:
            asked = ask(server, api_key_file, pb.VerifyAuditLogRequest())
            assert isinstance(asked, pb.VerifyAuditLogResponse), "the RPC's own answer"
            answer = asked
        show(answer, as_json=as_json)
        if not answer.intact:
            raise typer.Exit(ExitCode.UNAVAILABLE)
