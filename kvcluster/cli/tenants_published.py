"""The verbs of `kvcluster tenants` on published prefixes."""

from pathlib import Path
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
    ask,
    list_all,
    show,
)

PrefixArgument = Annotated[str, typer.Argument(metavar="PREFIX", help="Its id.")]


def publish_prefix(
    prefix: PrefixArgument,
    text: Annotated[
        str | None, typer.Argument(help="What it says; - reads stdin.", show_default=False)
    ] = None,
    *,
    prompt_ids: Annotated[
        Path | None, typer.Option(help="A JSON list of token ids, instead of text.")
    ] = None,
    model: Annotated[str, typer.Option(help="Default: every model that is served.")] = "",
    policy: Annotated[str, typer.Option(help="How it is compressed; default: the model's.")] = "",
    timeout: Annotated[float | None, typer.Option(help="Deadline in seconds.")] = None,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a prefix: prompts of all tenants that begin with it find it computed. Returns when it
    is, which takes as long as a prompt of that length."""
    with exiting(as_json=as_json):
        from kvcluster.cli.generate import prompt_from
        from kvcluster.rpc.v1 import common_pb2
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        source = prompt_from(text, None, prompt_ids)
        if source.token_ids is not None:
            content = common_pb2.TokenInput(ids=common_pb2.TokenIds(ids=source.token_ids))
        else:
            content = common_pb2.TokenInput(text=source.text or "")
        request = pb.PublishPrefixRequest(
            published_prefix_id=prefix,
            published_prefix=pb.PublishedPrefix(model=model, policy=policy),
            content=content,
        )
        show(ask(server, api_key_file, request, timeout_s=timeout), as_json=as_json)


def list_published_prefixes(
    *,
    page_size: PageSizeOption = 0,
    page_token: PageTokenOption = "",
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the published prefixes, by id."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.ListPublishedPrefixesRequest(page_size=page_size, page_token=page_token)
        show(list_all(server, api_key_file, request), as_json=as_json)


def withdraw_prefix(
    prefix: PrefixArgument,
    *,
    server: ServerOption = DEFAULT_ADMIN,
    api_key_file: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a published prefix back; its memory is zeroed when this returns."""
    with exiting(as_json=as_json):
        from kvcluster.rpc.v1 import tenant_service_pb2 as pb

        request = pb.WithdrawPrefixRequest(name=f"publishedPrefixes/{prefix}")
        show(ask(server, api_key_file, request), as_json=as_json)
