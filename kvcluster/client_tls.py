"""How a client encrypts its connection: whom it trusts, and with which certificate it comes."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc import aio

from kvcluster.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientTls:
    """Files in PEM. All left out: TLS with the authorities that this machine trusts."""

    ca: Path | None = None
    """Authorities that the server's certificate has to come from; None: those of this machine."""

    certificate: Path | None = None
    """The client's own, where the server asks for one."""

    key: Path | None = None
    """Of the certificate, without a passphrase."""

    server_name: str = ""
    """Name in the server's certificate, where that is not the host of its address."""


ChannelOptions = tuple[tuple[str, int | str], ...]


def open_channel(address: str, tls: ClientTls | None, options: ChannelOptions = ()) -> aio.Channel:
    """A channel that connects at its first call; `tls` None: unencrypted. Raises: ConfigError for a
    file that is missing, no PEM, or does not belong to the other."""
    if tls is None:
        return aio.insecure_channel(address, options=options)
    if (tls.certificate is None) != (tls.key is None):
        raise ConfigError("tls: a client certificate and its key are given together")
    if tls.certificate is not None and tls.key is not None:
        _check_pair(tls.certificate, tls.key)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_authorities(tls.ca),
        private_key=_read(tls.key),
        certificate_chain=_read(tls.certificate),
    )
    if tls.server_name:
        options = (*options, ("grpc.ssl_target_name_override", tls.server_name))
    return aio.secure_channel(address, credentials, options=options)


def _authorities(file: Path | None) -> bytes | None:
    text = _read(file)
    if text is not None and b"-----BEGIN CERTIFICATE-----" not in text:
        raise ConfigError(f"tls: {file} has no certificate in PEM")
    return text


def _check_pair(certificate: Path, key: Path) -> None:
    _read(certificate), _read(key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, lambda: "")
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls: {key} is no PEM key without a passphrase, or not that of {certificate}"
        ) from error


def _read(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"tls: {file} cannot be read: {error.strerror}") from error
