"""How a command reaches a server: `--server`, and with `with_tls` the flags of its certificates."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from kvcluster.client_tls import ClientTls


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is, and how the connection to it is encrypted."""

    address: str
    is_encrypted: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __str__(self) -> str:
        return self.address

    @property
    def tls(self) -> "ClientTls | None":
        # Only here, so that --help comes without waiting for grpc.
        from kvcluster.client_tls import ClientTls

        if not self.is_encrypted:
            return None
        return ClientTls(ca=self.ca, certificate=self.certificate, key=self.key)


def parse_server(given: "str | Server") -> Server:
    """For typer, which has its defaults parsed too."""
    return given if isinstance(given, Server) else Server(given)


class Command(Protocol):
    """A function whose parameters are a command's flags."""

    __name__: str

    def __call__(self, *args: Any, **given: Any) -> None: ...


_TLS_FLAGS = {
    "tls": (bool, False, typer.Option("--tls", help="Encrypt, and trust this machine's CAs.")),
    "tls_ca": (
        Path | None,
        None,
        typer.Option(help="Encrypt, and trust the authorities in this PEM file."),
    ),
    "tls_cert": (
        Path | None,
        None,
        typer.Option(help="PEM file with a client certificate, where the server wants one."),
    ),
    "tls_key": (Path | None, None, typer.Option(help="PEM file with its private key.")),
}


def with_tls(command: Command) -> Callable[..., None]:
    """The command with the flags of certificates, which go into its `server`."""
    signature = inspect.signature(command)

    @wraps(command)
    def run(**given: Any) -> None:
        own = {flag: given.pop(flag) for flag in _TLS_FLAGS}
        given["server"] = _encrypted(given["server"], **own)
        command(**given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    flags = [
        inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, option])
        for name, (kind, default, option) in _TLS_FLAGS.items()
    ]
    parameters = [*signature.parameters.values(), *flags]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _encrypted(
    server: Server, *, tls: bool, tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None
) -> Server:
    files = (tls_ca, tls_cert, tls_key)
    return replace(
        server,
        is_encrypted=tls or any(files),
        ca=tls_ca,
        certificate=tls_cert,
        key=tls_key,
    )
