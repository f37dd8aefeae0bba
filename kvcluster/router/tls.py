"""Certificates of a listener: read from their files, checked, and read again when they change.

What is wrong at the start is a ConfigError. What is wrong later, such as a certificate that was
replaced before its key, is logged, and the last good pair goes on being used.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509

from kvcluster.config_access import TlsConfig
from kvcluster.errors import ConfigError
from kvcluster.log import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ListenerTls:
    """The files of one port."""

    certificate: Path
    key: Path
    client_ca: Path | None
    client_ca_setting: str = "tls.client_ca"

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`. Raises: ConfigError for a file that is missing or no PEM, or a key
        that is not the certificate's."""
        return grpc.dynamic_ssl_server_credentials(
            self._read(),
            _Reload(self),  # type: ignore[arg-type]  # None: no change
            require_client_authentication=self.client_ca is not None,
        )

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Changes when any of the files does. Raises: OSError."""
        files = [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]
        return tuple((found.st_mtime_ns, found.st_ino) for found in (file.stat() for file in files))

    def _read(self) -> grpc.ServerCertificateConfiguration:
        certificate = _text("tls.certificate", self.certificate)
        key = _text("tls.key", self.key)
        _check_certificates("tls.certificate", self.certificate, certificate)
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self.certificate, self.key, password=_no_passphrase
            )
        except ssl.SSLError as error:
            raise ConfigError(
                f"tls.key: {self.key} is no PEM key without a passphrase, or not that of "
                f"tls.certificate {self.certificate}"
            ) from error
        roots = None
        if self.client_ca is not None:
            roots = _text(self.client_ca_setting, self.client_ca)
            _check_certificates(self.client_ca_setting, self.client_ca, roots)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], roots)


class _Reload:
    """Called by grpc before each handshake, in a thread of its own choice."""

    def __init__(self, files: ListenerTls) -> None:
        self._files = files
        self._stamp = files.stamp()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """The certificates, if they have changed; None: go on with those in use."""
        try:
            stamp = self._files.stamp()
            if stamp == self._stamp:
                return None
            read = self._files._read()
        except (OSError, ConfigError) as error:
            _log.warning("certificates_not_reloaded", error=type(error).__name__)
            return None
        self._stamp = stamp
        _log.info("certificates_reloaded")
        return read


def data_tls(config: TlsConfig) -> ListenerTls | None:
    """Of the port of clients; None: without TLS."""
    return _listener(config, config.client_ca, "tls.client_ca")


def admin_tls(config: TlsConfig) -> ListenerTls | None:
    """Of the admin port; None: without TLS."""
    return _listener(config, config.admin_client_ca, "tls.admin_client_ca")


def _listener(config: TlsConfig, client_ca: str, setting: str) -> ListenerTls | None:
    if not config.is_on:
        return None
    return ListenerTls(
        Path(config.certificate), Path(config.key), Path(client_ca) if client_ca else None, setting
    )


def _text(setting: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {file} cannot be read: {error.strerror}") from error


def _check_certificates(setting: str, file: Path, text: bytes) -> None:
    try:
        x509.load_pem_x509_certificates(text)
    except ValueError as error:
        raise ConfigError(f"{setting}: {file} has no certificate in PEM") from error


def _no_passphrase() -> str:
    # Without this, OpenSSL would ask on the terminal.
    return ""
