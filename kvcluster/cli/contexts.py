"""`kvcluster contexts VERB`: long prompts that are computed once and used many times.

Each verb is an RPC of ContextService; `append` is an upload to a context that is there.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import typer

from kvcluster.cli.api_key import API_KEY_HELP, api_key_from
from kvcluster.cli.connection import Server, parse_server, with_tls
from kvcluster.cli.exits import EXIT_CODES, exiting, print_json
from kvcluster.cli.generate import DEFAULT_SERVER, prompt_from
from kvcluster.engine.context_api import ContextChange, ContextRecord
from kvcluster.types import DEFAULT_TENANT, TenantId

if TYPE_CHECKING:
    from kvcluster.client import Client

T = TypeVar("T")

ContextArgument = Annotated[str, typer.Argument(help="Id of the context.")]
TextArgument = Annotated[str | None, typer.Argument(help="The text; - reads stdin.")]
FileOption = Annotated[Path | None, typer.Option(help="UTF-8 file with the text.")]
IdsOption = Annotated[
    Path | None, typer.Option(help="JSON file with a list of token ids, instead of text.")
]
ServerOption = Annotated[
    Server, typer.Option(help="HOST:PORT of a router.", parser=parse_server, metavar="HOST:PORT")
]
TenantOption = Annotated[str, typer.Option(help="Our own tenant: that of the API key.")]
ApiKeyOption = Annotated[Path | None, typer.Option(help=API_KEY_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="One object on stdout.")]
EtagOption = Annotated[str, typer.Option(help="Refused unless it is the context's of now.")]
TtlOption = Annotated[float | None, typer.Option(help="Deleted so many seconds from now.")]

DurableOption = Annotated[
    bool, typer.Option("--durable", help="Return when it is on disk, where it survives a restart.")
]

contexts = typer.Typer(
    name="contexts",
    help="Upload long prompts once and use them many times.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@contexts.command()
@with_tls
def upload(
    context: ContextArgument,
    text: TextArgument = None,
    *,
    file: FileOption = None,
    prompt_ids: IdsOption = None,
    policy: Annotated[str, typer.Option(help="How its cache is compressed.")] = "",
    model: Annotated[str, typer.Option(help="Default: the one that is served.")] = "",
    display_name: Annotated[str, typer.Option(help="For people.")] = "",
    ttl: TtlOption = None,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Its blocks are never given up for others.")
    ] = False,
    durable: DurableOption = False,
    tenant: TenantOption = DEFAULT_TENANT,
    server: ServerOption = DEFAULT_SERVER,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a context, or go on with an upload that broke. Returns when it is computed."""
    with exiting(as_json=as_json):
        source = prompt_from(text, file, prompt_ids)
        _show(
            _ask(
                server,
                api_key_file,
                lambda client: client.upload_context(
                    context,
                    prompt=source.text,
                    prompt_ids=source.token_ids,
                    policy=policy,
                    model=model,
                    display_name=display_name,
                    ttl_s=ttl,
                    pinned=pinned,
                    durable=durable,
                    tenant=TenantId(tenant),
                ),
            ),
            as_json=as_json,
        )


@contexts.command()
@with_tls
def append(
    context: ContextArgument,
    text: TextArgument = None,
    *,
    file: FileOption = None,
    prompt_ids: IdsOption = None,
    durable: DurableOption = False,
    tenant: TenantOption = DEFAULT_TENANT,
    server: ServerOption = DEFAULT_SERVER,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put more after a context. What it holds already is not computed again."""
    with exiting(as_json=as_json):
        source = prompt_from(text, file, prompt_ids)
        record = _ask(
            server,
            api_key_file,
            lambda client: client.append_context(
                context,
                prompt=source.text,
                prompt_ids=source.token_ids,
                durable=durable,
                tenant=TenantId(tenant),
            ),
        )
        _show(record, as_json=as_json)


@contexts.command()
@with_tls
def get(
    context: ContextArgument,
    *,
    tenant: TenantOption = DEFAULT_TENANT,
    server: ServerOption = DEFAULT_SERVER,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one context."""
    with exiting(as_json=as_json):
        record = _ask(
            server,
            api_key_file,
            lambda client: client.get_context(context, tenant=TenantId(tenant)),
        )
        _show(record, as_json=as_json)


@contexts.command("list")
@with_tls
def list_contexts(
    *,
    filter_text: Annotated[
        str, typer.Option("--filter", help="FIELD=VALUE conditions with AND between.")
    ] = "",
    tenant: TenantOption = DEFAULT_TENANT,
    server: ServerOption = DEFAULT_SERVER,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the contexts, a line for each."""

    async def listed(client: "Client") -> list[ContextRecord]:
        found = client.list_contexts(filter_text=filter_text, tenant=TenantId(tenant))
        return [record async for record in found]

    with exiting(as_json=as_json):
        records = _ask(server, api_key_file, listed)
        if as_json:
            print_json({"contexts": [_fields_of(record) for record in records]})
            return
        for record in records:
            typer.echo(
                f"{record.context_id}  {record.state.name}  {record.token_count:,} tokens  "
                f"{record.kv_bytes / 1024**2:.1f} MiB  {record.policy}  "
                f"{'+'.join(record.tiers) or 'nowhere'}"
                f"{'  pinned' if record.pinned else ''}  {record.display_name}".rstrip()
            )


@contexts.command()
@with_tls
def update(
    context: ContextArgument,
    *,
    display_name: Annotated[str | None, typer.Option(help="For people.")] = None,
    pinned: Annotated[
        bool | None,
        typer.Option("--pinned/--unpinned", help="Whether its blocks are never given up."),
    ] = None,
    ttl: TtlOption = None,
    for_ever: Annotated[bool, typer.Option("--for-ever", help="Take the expiry away.")] = False,
    etag: EtagOption = "",
    tenant: TenantOption = DEFAULT_TENANT,
    server: ServerOption = DEFAULT_SERVER,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change a context's name, expiry, or whether it is pinned."""
    change = ContextChange(
        display_name=display_name, pinned=pinned, ttl_s=ttl, keeps_for_ever=for_ever
    )
    with exiting(as_json=as_json):
        record = _ask(
            server,
            api_key_file,
            lambda client: client.update_context(
                context, change, etag=etag, tenant=TenantId(tenant)
            ),
        )
        _show(record, as_json=as_json)


@contexts.command()
@with_tls
def fork(
    context: ContextArgument,
    new_id: Annotated[str, typer.Argument(help="Id of the new context.")],
    *,
    prefix_tokens: Annotated[int, typer.Option(help="Keep the first tokens only; 0: all.")] = 0,
    tenant: TenantOption = DEFAULT_TENANT,
    server: ServerOption = DEFAULT_SERVER,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a context that begins with another's tokens and shares its blocks."""
    with exiting(as_json=as_json):
        record = _ask(
            server,
            api_key_file,
            lambda client: client.fork_context(
                context, new_id, prefix_tokens=prefix_tokens, tenant=TenantId(tenant)
            ),
        )
        _show(record, as_json=as_json)


@contexts.command()
@with_tls
def delete(
    context: ContextArgument,
    *,
    etag: EtagOption = "",
    tenant: TenantOption = DEFAULT_TENANT,
    server: ServerOption = DEFAULT_SERVER,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a context. Returns when its blocks are zeroed and its files gone."""
    with exiting(as_json=as_json):
        _ask(
            server,
            api_key_file,
            lambda client: client.delete_context(context, etag=etag, tenant=TenantId(tenant)),
        )
        if as_json:
            print_json({"deleted": context})
        else:
            typer.echo(f"deleted: {context}")


def _ask(server: Server, api_key_file: Path | None, call: "Callable[[Client], Awaitable[T]]") -> T:
    """The server's answer. Raises: what the server says, ServerUnavailable."""

    async def asked() -> T:
        # Only here, so that --help comes without waiting for grpc.
        from kvcluster.client import Client

        async with Client(
            server.address, api_key=api_key_from(api_key_file), tls=server.tls
        ) as client:
            return await call(client)

    return asyncio.run(asked())


def _show(record: ContextRecord, *, as_json: bool) -> None:
    fields = _fields_of(record)
    if as_json:
        print_json(fields)
        return
    for name, value in fields.items():
        if value not in ("", None, []):
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            typer.echo(f"{name}: {shown}")


def _fields_of(record: ContextRecord) -> dict[str, object]:
    fields: dict[str, object] = json.loads(msgspec.json.encode(record))
    fields["name"] = fields.pop("context_id")
    return fields
