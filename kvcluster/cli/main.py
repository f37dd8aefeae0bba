"""The `kvcluster` command: parses, calls, prints. Nothing heavy is imported before it is needed."""

from importlib import metadata
from typing import Annotated

import typer

from kvcluster.cli.audit import audit
from kvcluster.cli.bench import bench
from kvcluster.cli.calibrate import calibrate
from kvcluster.cli.connection import with_tls
from kvcluster.cli.contexts import contexts
from kvcluster.cli.doctor import doctor
from kvcluster.cli.exits import EXIT_CODES
from kvcluster.cli.generate import generate
from kvcluster.cli.serve import serve
from kvcluster.cli.tenants import tenants

app = typer.Typer(
    name="kvcluster",
    help="Serves language-model requests whose context is too long for one GPU.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (serve, with_tls(generate), with_tls(doctor), with_tls(audit), calibrate, bench):
    app.command(epilog=EXIT_CODES)(command)
app.add_typer(contexts)
app.add_typer(tenants)


def _print_version(is_asked: bool) -> None:  # noqa: FBT001  # typer calls it so
    if is_asked:
        typer.echo(f"kvcluster {metadata.version('kvcluster')}")
        raise typer.Exit


@app.callback()
def _main(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None: ...


def main() -> None:
    app()
