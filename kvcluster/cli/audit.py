"""`kvcluster audit`: attacks a running cluster and says what it withstood."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcluster.cli.api_key import API_KEY_HELP, api_key_from
from kvcluster.cli.connection import Server, parse_server
from kvcluster.cli.exits import ExitCode, exiting, print_json
from kvcluster.cli.generate import DEFAULT_SERVER
from kvcluster.cli.tenants_asking import DEFAULT_ADMIN
from kvcluster.errors import InvalidField

if TYPE_CHECKING:
    from kvcluster.audit.suite import AuditReport, Finding

_MARKS = {"held": "held", "breach": "BREACH", "inconclusive": "?", "skipped": "-"}


def audit(
    *,
    server: Annotated[
        Server, typer.Option(parser=parse_server, metavar="HOST:PORT", help="A router.")
    ] = DEFAULT_SERVER,
    admin_server: Annotated[
        Server, typer.Option(parser=parse_server, metavar="HOST:PORT", help="Its admin port.")
    ] = DEFAULT_ADMIN,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"{API_KEY_HELP} An operator's.")
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Of each arm of a timing attack.", min=8)] = 200,
    prompt_tokens: Annotated[
        int, typer.Option(help="Of the prompts of timing attacks.", min=1)
    ] = 512,
    token_file: Annotated[
        Path | None, typer.Option(help="A good token of the identity provider, to forge from.")
    ] = None,
    jwks_file: Annotated[
        Path | None, typer.Option(help="The provider's public keys, to forge with.")
    ] = None,
    list_attacks: Annotated[
        bool, typer.Option("--list", help="Say what the attacks are, and do nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Attack a running cluster. Exits with 3 when it did not withstand.

    Makes two tenants of its own for it and deletes them afterwards; no other tenant is touched, but
    all share the load of some minutes. Wants an operator's API key.
    """
    with exiting(as_json=as_json):
        # Only here, so that --help comes without waiting for grpc.
        from kvcluster.audit.scene import Target
        from kvcluster.audit.suite import chosen, run_audit

        attacks = chosen(attack or [])
        if list_attacks:
            for each in attacks:
                typer.echo(f"{each.name}\n  tries: {each.tries}\n  a breach: {each.breach}")
            return
        operator = api_key_from(api_key_file)
        if operator is None:
            raise InvalidField("--api-key-file", "an audit wants an operator's API key")
        target = Target(
            address=server.address,
            admin_address=admin_server.address,
            operator=operator,
            tls=server.tls,
            num_samples=samples,
            prompt_tokens=prompt_tokens,
            public_keys=_read(jwks_file, "--jwks-file"),
            token=_read(token_file, "--token-file").decode("ascii", "replace").strip(),
        )
        report = asyncio.run(run_audit(target, attacks, _quiet if as_json else _show))
        if as_json:
            print_json(report)
        else:
            _summarize(report)
        if not report.is_held:
            raise typer.Exit(ExitCode.UNAVAILABLE)


def _read(file: Path | None, flag: str) -> bytes:
    if file is None:
        return b""
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidField(flag, f"{file} cannot be read: {error.strerror}") from error


def _show(finding: "Finding") -> None:
    mark = _MARKS[finding.outcome.verdict]
    measured = ", ".join(f"{name} {value:.3g}" for name, value in finding.outcome.measured.items())
    typer.echo(f"{mark:<7} {finding.attack:<24} {finding.outcome.found}")
    if measured:
        typer.echo(f"{'':<32} {measured}")


def _quiet(_: "Finding") -> None:
    pass


def _summarize(report: "AuditReport") -> None:
    from kvcluster.audit.attack import Verdict

    counts = ", ".join(f"{report.count(verdict)} {verdict}" for verdict in Verdict)
    typer.echo(f"kvcluster: {len(report.findings)} attacks: {counts}", err=True)
