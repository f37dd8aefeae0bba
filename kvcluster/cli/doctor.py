"""`kvcluster doctor`: what this machine has, what a server says, and the fix for what fails."""

import asyncio
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvcluster import config_sources
from kvcluster.cli.api_key import API_KEY_HELP, api_key_from
from kvcluster.cli.connection import Server, parse_server
from kvcluster.cli.exits import ExitCode, exiting, print_json
from kvcluster.config import Address
from kvcluster.errors import ConfigError, KvClusterError, ModelNotFound
from kvcluster.model.packages import PACKAGED_MODELS, gguf_parts

_NO_SERVER = Server("")
_PACKAGES = ("kvcluster", "torch", "transformers", "ray", "grpcio", "triton")
# Below this, Ray spills its object store to disk and a few ranks can fill the rest.
_MIN_SHM_BYTES = 2 * 1024**3
_MIN_OPEN_FILES = 4096
_SERVER_TIMEOUT_S = 10.0


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    name: str
    is_ok: bool
    found: str
    fix: str = ""
    """What to do; empty when nothing is wrong."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvcluster doctor --json` prints."""

    is_ok: bool
    checks: tuple[Check, ...]


def doctor(
    *,
    server: Annotated[
        Server,
        typer.Option(parser=parse_server, metavar="HOST:PORT", help="A router to ask as well."),
    ] = _NO_SERVER,
    api_key_file: Annotated[Path | None, typer.Option(help=API_KEY_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Check this machine and, with --server, a running cluster. Exits with 3 when a check fails."""
    with exiting(as_json=as_json):
        # With a server given, its port is of course taken.
        of_server = (
            server_checks(server, api_key_from(api_key_file)) if server.address else [_settings()]
        )
        checks = machine_checks() + of_server
        report = Report(is_ok=all(check.is_ok for check in checks), checks=tuple(checks))
        if as_json:
            print_json(report)
        else:
            _print(report)
        if not report.is_ok:
            raise typer.Exit(ExitCode.UNAVAILABLE)


def machine_checks() -> list[Check]:
    return [
        _python(),
        *(_package(name) for name in _PACKAGES),
        _gpu(),
        *_attention(),
        *(_packaged_model(name) for name in PACKAGED_MODELS),
        _shared_memory(),
        _open_files(),
    ]


def server_checks(server: Server, api_key: str | None = None) -> list[Check]:
    return asyncio.run(_ask(server, api_key))


async def _ask(server: Server, api_key: str | None) -> list[Check]:
    # Only here: the checks of the machine are to work where grpc cannot be imported.
    from kvcluster.client import Client

    name = f"server {server}"
    try:
        async with (
            Client(server.address, api_key=api_key, tls=server.tls) as client,
            asyncio.timeout(_SERVER_TIMEOUT_S),
        ):
            is_ready = await client.health()
            models = await client.models() if is_ready else ()
    except (KvClusterError, TimeoutError) as error:
        found = error.message if isinstance(error, KvClusterError) else "no answer"
        fix = "start it with `kvcluster serve`, or correct --server"
        return [Check(name=name, is_ok=False, found=found, fix=fix)]
    if not is_ready:
        fix = "wait: a token must go through the whole ring first; else its log says why"
        return [Check(name=name, is_ok=False, found="not ready", fix=fix)]
    served = [
        Check(
            name=f"serves {model.name}",
            is_ok=True,
            found=f"up to {model.max_context_tokens:,} tokens, "
            f"{model.kv_bytes_per_token:,} bytes of cache each",
        )
        for model in models
    ]
    policies = [
        Check(
            name=f"policies of {model.name}",
            is_ok=True,
            found=f"{', '.join(model.policy_methods)}; default: {model.default_policy}",
        )
        for model in models
    ]
    return [Check(name=name, is_ok=True, found="ready"), *served, *policies]


def _python() -> Check:
    return Check(
        name="python",
        is_ok=sys.version_info >= (3, 11),
        found=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    )


def _package(name: str) -> Check:
    try:
        return Check(name=name, is_ok=True, found=metadata.version(name))
    except metadata.PackageNotFoundError:
        # Triton exists for Linux only, and a cluster without GPUs runs without it.
        is_optional = name == "triton"
        fix = "" if is_optional else f"pip install {name}, or run `make test` in a clone"
        return Check(name=name, is_ok=is_optional, found="not installed", fix=fix)


def _gpu() -> Check:
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return Check(name="gpu", is_ok=True, found="none: ranks run on the CPU")
    listing = subprocess.run(
        [nvidia_smi, "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if listing.returncode:
        return Check(
            name="gpu",
            is_ok=False,
            found=f"nvidia-smi exits with {listing.returncode}",
            fix="repair the NVIDIA driver; until then ranks cannot use a GPU",
        )
    is_cuda_torch = "+cpu" not in _package("torch").found
    return Check(
        name="gpu",
        is_ok=is_cuda_torch,
        found="; ".join(listing.stdout.split("\n")).rstrip("; "),
        fix="" if is_cuda_torch else "torch is a CPU build: pip install torch with CUDA",
    )


def _attention() -> list[Check]:
    """What serves attention, where there is a choice."""
    if shutil.which("nvidia-smi") is None:
        return [Check(name="attention", is_ok=True, found="torch: kernels are for GPUs")]
    # torch takes seconds, and kernels want Triton.
    import torch

    if not torch.cuda.is_available():
        fix = "without it ranks run on the CPU: repair the driver, or install torch with CUDA"
        return [Check(name="attention", is_ok=False, found="torch sees no GPU", fix=fix)]
    from kvcluster.attention.decode_report import decode_lines
    from kvcluster.attention.kernel_report import prefill_lines
    from kvcluster.attention.selected_report import chosen_lines

    found = {**decode_lines(), **chosen_lines(), **prefill_lines(torch.device("cuda"))}
    return [Check(name=name, is_ok=True, found=line) for name, line in found.items()]


def _packaged_model(name: str) -> Check:
    try:
        gguf_parts(name)
    except ModelNotFound as error:
        # Another model may be served, so its absence is no failure.
        return Check(name=f"model {name}", is_ok=True, found="not installed", fix=error.message)
    return Check(name=f"model {name}", is_ok=True, found="installed")


def _settings() -> Check:
    try:
        loaded = config_sources.load(file=None, environ=os.environ, overrides={})
    except ConfigError as error:
        return Check(
            name="settings",
            is_ok=False,
            found=error.message,
            fix="correct or unset that variable",
        )
    return _port(loaded.config.router.listen)


def _port(listen: str) -> Check:
    name = f"listen {listen}"
    address = Address.parse("router.listen", listen)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return Check(
                name=name,
                is_ok=False,
                found=error.strerror or str(error),
                fix="stop what listens there, or serve with --listen HOST:PORT",
            )
    return Check(name=name, is_ok=True, found="free")


def _shared_memory() -> Check:
    if not Path("/dev/shm").is_dir():
        return Check(name="shared memory", is_ok=True, found="no /dev/shm on this system")
    usage = shutil.disk_usage("/dev/shm")
    is_ok = usage.free >= _MIN_SHM_BYTES
    return Check(
        name="shared memory",
        is_ok=is_ok,
        found=f"{usage.free / 1024**3:.1f} of {usage.total / 1024**3:.1f} GiB free in /dev/shm",
        fix="" if is_ok else "Ray wants 2 GiB: in a container, --shm-size=2g or more",
    )


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_ok = soft >= _MIN_OPEN_FILES
    return Check(
        name="open files",
        is_ok=is_ok,
        found=f"{soft} (hard limit {hard})",
        fix="" if is_ok else f"ulimit -n {_MIN_OPEN_FILES}",
    )


def _print(report: Report) -> None:
    for check in report.checks:
        mark = "ok" if check.is_ok else "FAILS"
        typer.echo(f"{mark:<6} {check.name:<24} {check.found}")
        if check.fix:
            typer.echo(f"{'':<6} {'':<24} -> {check.fix}")
