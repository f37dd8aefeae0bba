"""What the verbs of `kvcluster tenants` share: flags, one question to a server, its answer."""

import asyncio
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcluster.cli.api_key import API_KEY_HELP, api_key_from
from kvcluster.cli.connection import Server, parse_server
from kvcluster.cli.exits import print_json
from kvcluster.errors import InvalidField

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from kvcluster.rpc.v1 import tenant_service_pb2 as pb

DEFAULT_ADMIN = Server("localhost:50052")
_TIMEOUT_S = 60.0
_TENANT = re.compile(r"(tenants/)?([a-z0-9-]{1,63})")

TenantArgument = Annotated[str, typer.Argument(help="Id of the tenant.")]
ServerOption = Annotated[
    Server,
    typer.Option(parser=parse_server, metavar="HOST:PORT", help="Admin port of a router."),
]
ApiKeyOption = Annotated[Path | None, typer.Option(help=API_KEY_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="One object on stdout.")]
NameOption = Annotated[str | None, typer.Option(help="For people.")]
LabelOption = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="For filters; may be repeated.")
]
LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=NUMBER",
        help="concurrent_generations=4, input_tokens_per_minute=2M ...; may be repeated.",
    ),
]
PartitionOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TIER.NAME=BYTES",
        help="gpu.floor_bytes=8GiB, host.limit_bytes=64GiB ...; may be repeated.",
    ),
]
DefaultPolicyOption = Annotated[str | None, typer.Option(help="Policy of requests that name none.")]
AllowedOption = Annotated[
    list[str] | None,
    typer.Option(help="Methods that a policy may combine: int4, 'int8 + window'; repeatable."),
]
ValidateOption = Annotated[
    bool, typer.Option("--validate-only", help="Only say what would be answered.")
]
FilterOption = Annotated[
    str, typer.Option("--filter", help="FIELD=VALUE conditions with AND between.")
]
PageSizeOption = Annotated[int, typer.Option(help="One page of so many; 0: all pages.")]
RootKeyOption = Annotated[
    str, typer.Option(metavar="FILE|env:NAME", help="The server's tenancy.root_key.")
]
PageTokenOption = Annotated[str, typer.Option(help="next_page_token of the page before.")]


def tenant_name(text: str) -> str:
    """`red` and `tenants/red` as the resource's name. Raises: InvalidField."""
    found = _TENANT.fullmatch(text)
    if found is None:
        raise InvalidField("TENANT", f"want the id of a tenant, got {text!r}")
    return f"tenants/{found[2]}"


def ask(
    server: Server,
    api_key_file: Path | None,
    request: "Message",
    *,
    timeout_s: float | None = _TIMEOUT_S,
) -> "Message":
    """The server's answer. `timeout_s` None: however long it takes. Raises: what the server says,
    ServerUnavailable."""
    return asyncio.run(_ask(server, api_key_from(api_key_file), request, timeout_s))


def list_all(server: Server, api_key_file: Path | None, request: Any) -> "Message":
    """All pages as one answer; one page where the request has a page's size."""
    return asyncio.run(_list_all(server, api_key_from(api_key_file), request))


def watch(
    server: Server,
    api_key_file: Path | None,
    request: "pb.WatchTenantUsageRequest",
    *,
    count: int,
    as_json: bool,
) -> None:
    """Show so many answers; 0: until interrupted."""
    asyncio.run(_watch(server, api_key_from(api_key_file), request, count, as_json=as_json))


def show(answer: "Message", *, as_json: bool) -> None:
    """Print an answer: as one object, or a line for each field."""
    fields = _fields_of(answer)
    if as_json:
        print_json(fields)
        return
    for line in _lines(fields):
        typer.echo(line)
    if "secret" in fields:
        typer.echo("kvcluster: keep the secret now, it cannot be shown again", err=True)


async def _ask(
    server: Server, api_key: str | None, request: "Message", timeout_s: float | None
) -> "Message":
    from kvcluster.admin_client import AdminClient

    async with AdminClient(server.address, api_key=api_key, tls=server.tls) as client:
        return await client.ask(request, timeout_s=timeout_s)


async def _list_all(server: Server, api_key: str | None, request: Any) -> "Message":
    from kvcluster.admin_client import AdminClient

    async with AdminClient(server.address, api_key=api_key, tls=server.tls) as client:
        answer: Any = await client.ask(request, timeout_s=_TIMEOUT_S)
        while answer.next_page_token and not request.page_size:
            request.page_token, answer.next_page_token = answer.next_page_token, ""
            answer.MergeFrom(await client.ask(request, timeout_s=_TIMEOUT_S))
    found: Message = answer
    return found


async def _watch(
    server: Server,
    api_key: str | None,
    request: "pb.WatchTenantUsageRequest",
    count: int,
    *,
    as_json: bool,
) -> None:
    from kvcluster.admin_client import AdminClient

    num_shown = 0
    async with AdminClient(server.address, api_key=api_key, tls=server.tls) as client:
        async for usage in client.watch_usage(request):
            show(usage, as_json=as_json)
            num_shown += 1
            if num_shown == count:
                return


def _fields_of(answer: "Message") -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    fields: dict[str, Any] = MessageToDict(
        answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields


def _lines(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for item in value:
                yield from _lines(item)
                yield ""
        elif value not in ("", []):
            yield f"{prefix}{name}: {', '.join(value) if isinstance(value, list) else value}"
