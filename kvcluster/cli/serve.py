"""`kvcluster serve`: one cluster in the foreground, until SIGTERM or Ctrl-C."""

import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvcluster import config_sources
from kvcluster.cli.exits import exiting, print_json
from kvcluster.config import ClusterConfig, LogFormat
from kvcluster.errors import ConfigError


class _Ready(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints once the cluster serves."""

    listen: str
    admin_listen: str
    """Empty: there are no tenants to administer."""
    model: str
    num_ranks: int


def serve(
    *,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Packaged model's name, directory or GGUF file.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Workers that share each long request.")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = None,
    insecure_local: Annotated[
        bool, typer.Option("--insecure-local", help="Serve without API keys; loopback only.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; default: start one here.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, as in the file."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One object on stdout once the cluster serves.")
    ] = False,
) -> None:
    """Serve a model; says when it is ready, drains on SIGTERM.

    Every setting has one name: cache.block_size is [cache] block_size in the file,
    KVCLUSTER_CACHE__BLOCK_SIZE in the environment, --set cache.block_size=64 here. A flag wins over
    the environment, the environment over the file.
    """
    with exiting(as_json=as_json):
        flags = {
            "model": model,
            "ring.num_ranks": ranks,
            "router.listen": listen,
            "router.insecure_local": insecure_local or None,
            "dtype": dtype,
            "ray_address": ray_address,
        }
        overrides = {key: value for key, value in flags.items() if value is not None}
        loaded = config_sources.load(
            file=config, environ=os.environ, overrides=_parsed(settings or []) | overrides
        )
        if not loaded.config.router.insecure_local and not loaded.config.tenancy.database:
            raise ConfigError(
                "router.insecure_local: there is no authentication without tenancy.database; set "
                "that one, or add --insecure-local to serve whoever can connect to this machine's "
                "loopback"
            )
        _run(_with_root_key(loaded.config), as_json=as_json)


def _parsed(settings: list[str]) -> dict[str, object]:
    parsed: dict[str, object] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set: want KEY=VALUE, got {setting!r}")
        parsed[key] = value
    return parsed


def _with_root_key(config: ClusterConfig) -> ClusterConfig:
    from kvcluster.tenancy.root_key import with_variable

    root_key = with_variable(config.tenancy.root_key, os.environ)
    return replace(config, tenancy=replace(config.tenancy, root_key=root_key))


def _run(config: ClusterConfig, *, as_json: bool) -> None:
    # Only here, so that every other command starts without torch and Ray.
    import kvcluster.serve.app as app
    from kvcluster import log

    is_for_reader = config.log.format is LogFormat.CONSOLE or (
        config.log.format is LogFormat.AUTO and sys.stderr.isatty()
    )
    log.configure(level=config.log.level, as_json=not is_for_reader)

    stdout = sys.stdout

    def on_ready(running: app.RunningApp) -> None:
        ready = _Ready(
            listen=running.address,
            admin_listen=running.admin_address,
            model=config.model,
            num_ranks=config.ring.num_ranks,
        )
        admin = f", tenants on {ready.admin_listen}" if ready.admin_listen else ""
        if as_json:
            print_json(ready, stdout)
        else:
            typer.echo(
                f"kvcluster: serving {ready.model} on {ready.listen} with {ready.num_ranks} "
                f"rank(s){admin}; Ctrl-C drains and stops",
                err=True,
            )

    # Ray repeats what its workers print, and stdout is for our one object.
    with redirect_stdout(sys.stderr):
        app.run(config, on_ready)
