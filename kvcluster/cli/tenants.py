"""`kvcluster tenants VERB`: each verb is an RPC of TenantService, in words with hyphens.

`bootstrap` and `adopt-root-key` have no RPC: they write into the database itself.
"""

from pathlib import Path
from typing import Annotated

import typer

from kvcluster.cli.connection import with_tls
from kvcluster.cli.exits import EXIT_CODES, exiting
from kvcluster.cli.tenants_access import (
    create_api_key,
    list_api_keys,
    list_audit_events,
    revoke_api_key,
    verify_audit_log,
)
from kvcluster.cli.tenants_asking import (
    DEFAULT_ADMIN,
    AllowedOption,
    ApiKeyOption,
    DefaultPolicyOption,
    FilterOption,
    JsonOption,
    LabelOption,
    LimitOption,
    NameOption,
    PageSizeOption,
    PageTokenOption,
    PartitionOption,
    RootKeyOption,
    ServerOption,
    TenantArgument,
    ValidateOption,
    ask,
    list_all,
    show,
    tenant_name,
    watch,
)
from kvcluster.cli.tenants_cache import list_cache_entries, purge_cache_entries
from kvcluster.cli.tenants_published import (
    list_published_prefixes,
    publish_prefix,
    withdraw_prefix,
)

tenants = typer.Typer(
    name="tenants",
    help="Administer tenants, their limits and their API keys.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@tenants.command()
def bootstrap(
    *,
    database: Annotated[Path, typer.Option(help="The server's tenancy.database.")],
    api_key_id: Annotated[str, typer.Option(help="Id of the key.")] = "",
    root_key: RootKeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Make an operator's API key, and the database if there is none. Prints the secret once.

    For the first key, and for when all operators' keys are lost: whoever may write the file may do
    this, with a server running or not.
    """
    with exiting(as_json=as_json):
        from kvcluster.cli.tenants_offline import add_operator_key

        show(add_operator_key(database, api_key_id, root_key), as_json=as_json)


@tenants.command()
def adopt_root_key(
    *,
    database: Annotated[Path, typer.Option(help="The server's tenancy.database.")],
    root_key: RootKeyOption,
    as_json: JsonOption = False,
) -> None:
    """Wrap the data keys of a database that has no root key, and sign its audit log.

    Stop the servers first, and start them with tenancy.root_key set.
    """
    with exiting(as_json=as_json):
        from kvcluster.cli.tenants_offline import adopt

        show(adopt(database, root_key), as_json=as_json)


@tenants.command()
@with_tls
def create_tenant(
    tenant: TenantArgument,
    *,
    display_name: NameOption = None,
    label: LabelOption = None,
    limit: LimitOption = None,
    partition: PartitionOption = None,
    default_policy: DefaultPolicyOption = None,
    allow_policy: AllowedOption = None,
    validate_only: ValidateOption = False,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a tenant, active and without keys."""
    with exiting(as_json=as_json):
        from kvcluster.cli.tenants_fields import tenant_fields
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        given = tenant_fields(
            display_name, label, limit, partition, default_policy, allow_policy
        ).message
        request = pb.CreateTenantRequest(
            tenant_id=tenant, tenant=given, validate_only=validate_only
        )
        show(ask(server, api_key_file, request), as_json=as_json)


@tenants.command()
@with_tls
def get_tenant(
    tenant: TenantArgument,
    *,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one tenant."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.GetTenantRequest(name=tenant_name(tenant))
        show(ask(server, api_key_file, request), as_json=as_json)


@tenants.command()
@with_tls
def list_tenants(
    *,
    filter_: FilterOption = "",
    show_deleted: Annotated[bool, typer.Option("--show-deleted", help="Deleted ones too.")] = False,
    page_size: PageSizeOption = 0,
    page_token: PageTokenOption = "",
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List tenants, by id. All of them, or one page with --page-size."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.ListTenantsRequest(
            filter=filter_, show_deleted=show_deleted, page_size=page_size, page_token=page_token
        )
        show(list_all(server, api_key_file, request), as_json=as_json)


@tenants.command()
@with_tls
def update_tenant(
    tenant: TenantArgument,
    *,
    display_name: NameOption = None,
    label: LabelOption = None,
    limit: LimitOption = None,
    partition: PartitionOption = None,
    default_policy: DefaultPolicyOption = None,
    allow_policy: AllowedOption = None,
    clear: Annotated[
        list[str] | None,
        typer.Option(help="A field to give its default: limits.weight, labels; may be repeated."),
    ] = None,
    etag: Annotated[str, typer.Option(help="Only if the tenant still has this etag.")] = "",
    validate_only: ValidateOption = False,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change what is given, and nothing else."""
    with exiting(as_json=as_json):
        from google.protobuf.field_mask_pb2 import FieldMask

        from kvcluster.cli.tenants_fields import tenant_fields
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        given = tenant_fields(display_name, label, limit, partition, default_policy, allow_policy)
        given.message.name, given.message.etag = tenant_name(tenant), etag
        request = pb.UpdateTenantRequest(
            tenant=given.message,
            update_mask=FieldMask(paths=[*given.paths, *(clear or [])]),
            validate_only=validate_only,
        )
        show(ask(server, api_key_file, request), as_json=as_json)


@tenants.command()
@with_tls
def delete_tenant(
    tenant: TenantArgument,
    *,
    etag: Annotated[str, typer.Option(help="Only if the tenant still has this etag.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Cancel what is unfinished.")] = False,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a tenant: its data key is destroyed at once."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.DeleteTenantRequest(name=tenant_name(tenant), etag=etag, force=force)
        show(ask(server, api_key_file, request), as_json=as_json)


@tenants.command()
@with_tls
def undelete_tenant(
    tenant: TenantArgument,
    *,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a deletion back; what was stored is lost."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.UndeleteTenantRequest(name=tenant_name(tenant))
        show(ask(server, api_key_file, request), as_json=as_json)


@tenants.command()
@with_tls
def suspend_tenant(
    tenant: TenantArgument,
    *,
    reason: Annotated[str, typer.Option(help="Why; the tenant reads it.")] = "",
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Refuse a tenant's calls and cancel its generations."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.SuspendTenantRequest(name=tenant_name(tenant), reason=reason)
        show(ask(server, api_key_file, request), as_json=as_json)


@tenants.command()
@with_tls
def resume_tenant(
    tenant: TenantArgument,
    *,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a suspended or draining tenant again."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.ResumeTenantRequest(name=tenant_name(tenant))
        show(ask(server, api_key_file, request), as_json=as_json)


@tenants.command()
@with_tls
def drain_tenant(
    tenant: TenantArgument,
    *,
    grace_period: Annotated[
        float | None, typer.Option(help="Seconds after which the rest is cancelled.")
    ] = None,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Refuse new generations and let running ones finish."""
    with exiting(as_json=as_json):
        from kvcluster.cli.tenants_fields import duration
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.DrainTenantRequest(
            name=tenant_name(tenant), grace_period=duration("--grace-period", grace_period)
        )
        show(ask(server, api_key_file, request), as_json=as_json)


@tenants.command()
@with_tls
def rotate_tenant_key(
    tenant: TenantArgument,
    *,
    crypto_erase: Annotated[
        bool, typer.Option("--crypto-erase", help="Destroy the earlier keys at once.")
    ] = False,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a tenant a new data key."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.RotateTenantKeyRequest(name=tenant_name(tenant), crypto_erase=crypto_erase)
        show(ask(server, api_key_file, request), as_json=as_json)


@tenants.command()
@with_tls
def get_tenant_usage(
    tenant: TenantArgument,
    *,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a tenant uses now."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.GetTenantUsageRequest(name=f"{tenant_name(tenant)}/usage")
        show(ask(server, api_key_file, request), as_json=as_json)


@tenants.command()
@with_tls
def watch_tenant_usage(
    tenant: TenantArgument,
    *,
    interval: Annotated[float | None, typer.Option(help="Seconds between two answers.")] = None,
    count: Annotated[int, typer.Option(help="Answers to show; 0: until Ctrl-C.")] = 0,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a tenant uses, again and again."""
    with exiting(as_json=as_json):
        from kvcluster.cli.tenants_fields import duration
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.WatchTenantUsageRequest(
            name=f"{tenant_name(tenant)}/usage", interval=duration("--interval", interval)
        )
        watch(server, api_key_file, request, count=count, as_json=as_json)


for command in (
    list_cache_entries,
    purge_cache_entries,
    create_api_key,
    list_api_keys,
    revoke_api_key,
    list_audit_events,
    verify_audit_log,
    publish_prefix,
    list_published_prefixes,
    withdraw_prefix,
):
    tenants.command()(with_tls(command))
