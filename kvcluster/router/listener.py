"""What the two listeners share: who may be let in where, and how gRPC is set up."""

from grpc import aio

from kvcluster.config import Address, RouterConfig
from kvcluster.errors import ConfigError
from kvcluster.router.tls import ListenerTls

_MAX_METADATA_BYTES = 16 * 1024
_LOOKAHEAD_BYTES = 1024 * 1024
_IDENTITY_ONLY = 1


def checked_address(
    config: RouterConfig, *, has_keys: bool = False, has_tls: bool = False
) -> Address:
    """Where to listen. `has_keys`: callers are asked for an API key.

    Raises: ConfigError when strangers would be let in, or would read keys on their way.
    """
    if not config.insecure_local and not has_keys:
        raise ConfigError(
            "router.insecure_local: there is no authentication without tenancy.database; set that "
            "one, or add --insecure-local to serve whoever can connect to this machine's loopback"
        )
    return reachable("router.listen", config, config.listen, has_tls=has_tls)


def reachable(key: str, config: RouterConfig, listen: str, *, has_tls: bool) -> Address:
    """Where to listen. Raises: ConfigError for an address from which strangers are let in, or on
    the way to which keys are read."""
    address = Address.parse(key, listen)
    if address.is_loopback:
        return address
    wanted = f"{key}: want a loopback address such as 127.0.0.1:{address.port}"
    if config.insecure_local:
        raise ConfigError(
            f"{wanted}, because router.insecure_local serves anyone who can connect; got {listen!r}"
        )
    if not has_tls:
        raise ConfigError(f"{wanted}, or set tls.certificate and tls.key; got {listen!r}")
    return address


def host_and_port(address: Address, port: int) -> str:
    """The address with the port that was bound."""
    return f"[{address.host}]:{port}" if ":" in address.host else f"{address.host}:{port}"


def bind(server: aio.Server, key: str, listen: str, tls: ListenerTls | None) -> int:
    """The port that was bound. Raises: ConfigError, naming `key` or a setting of `tls`."""
    try:
        if tls is not None:
            return server.add_secure_port(listen, tls.credentials())
        return server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ConfigError(f"{key}: {listen} cannot be bound, choose another port") from error


def server_options(config: RouterConfig) -> list[tuple[str, int]]:
    """Limits and timeouts of a listener."""
    keepalive_ms = round(config.keepalive_s * 1000)
    return [
        # Twice our own limit: what is a little too large is then refused by us, with a reason.
        ("grpc.max_receive_message_length", 2 * config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Both, or grpc refuses at random between the two.
        ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", config.max_concurrent_streams),
        # grpc refuses compressed messages with UNIMPLEMENTED, before any code of ours runs.
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
        # A fixed window: grpc's own estimate lets one stalled upload fill tens of megabytes.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _LOOKAHEAD_BYTES),
        # A half-open connection is found by its missing answer to a ping. The keepalive timeout
        # alone does not end it: the ping's own timeout, a minute by default, does.
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms // 2),
        ("grpc.http2.ping_timeout_ms", keepalive_ms // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # The client pings as often as we do.
        ("grpc.http2.min_ping_interval_without_data_ms", keepalive_ms // 2),
        # A second server on the port would silently take half of the connections.
        ("grpc.so_reuseport", 0),
    ]
