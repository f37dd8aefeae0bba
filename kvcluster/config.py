"""Every setting of a cluster, typed and frozen. A flag, an environment variable and a TOML key of
one setting have the same name; an unknown key is an error (`config_sources.load`).
"""

import ipaddress
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from kvcluster.config_access import OidcConfig, TlsConfig
from kvcluster.errors import ConfigError


class TransportKind(StrEnum):
    AUTO = "auto"
    """`nccl` where every rank has a GPU; else `sockets` on one machine, `gloo` across machines."""
    SOCKETS = "sockets"
    """Unix sockets between CPU ranks of one machine: a fifth of Gloo's latency there."""
    GLOO = "gloo"
    NCCL = "nccl"


class LogFormat(StrEnum):
    AUTO = "auto"
    """`console` on a terminal, `json` elsewhere."""
    CONSOLE = "console"
    JSON = "json"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """How every rank stores KV."""

    block_size: int = 64
    """Tokens per block: the unit of allocation, hashing and eviction."""

    capacity_tokens: int = 16_384
    """Tokens that one rank can hold in layers without a window."""

    exact_recent_tokens: int = 256
    """Latest tokens that a query reads exact whatever the codec: most of its attention goes there.
    Rounded up to whole blocks."""

    prefix_cache: bool = True
    """Keep the blocks of ended requests until their memory is wanted, so that a tenant's next
    request with the same beginning does not compute it again."""

    commit_at_start: bool = False
    """Write all of the cache's memory before serving, instead of each page when it is first used:
    a CPU then needs all of it from the start, and the first use of a page does not wait for the
    machine to find memory. On GPUs it is always so."""

    @property
    def exact_recent_blocks(self) -> int:
        """Blocks before its own that a query reads exact."""
        return -(-self.exact_recent_tokens // self.block_size)

    def __post_init__(self) -> None:
        if self.exact_recent_tokens < 0:
            raise ConfigError(
                f"cache.exact_recent_tokens: want at least 0, got {self.exact_recent_tokens}"
            )
        if self.block_size < 1 or self.block_size.bit_count() != 1:
            raise ConfigError(f"cache.block_size: want a power of two, got {self.block_size}")
        if self.capacity_tokens < self.block_size:
            raise ConfigError(
                f"cache.capacity_tokens: want at least one block ({self.block_size} tokens), "
                f"got {self.capacity_tokens}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How requests are admitted and scheduled."""

    prefill_chunk_tokens: int = 1024
    """Most prompt tokens that one step computes, over all requests and ranks together."""

    shard_min_tokens: int = 1024
    """A request with at least this many prompt tokens is spread over all ranks; a shorter one
    stays on one rank."""

    max_running: int = 64
    """Most requests that hold blocks at one time."""

    max_waiting: int = 256
    """How many unfinished requests there may be beyond `max_running`; one more is refused with
    retry advice."""

    upload_window_chunks: int = 4
    """Prefill chunks that a client may be ahead of the prefill before it is held back."""

    lookahead_steps: int = 2
    """Most steps in flight: 2 plans step k+1 while step k runs. Where several tenants are about, it
    does so shortly before step k is done."""

    step_timeout_s: float = 120.0
    """A step that takes longer means a lost rank."""

    first_token_wait_s: float = 0.2
    """Longest wait for the steps in flight when another tenant sends something: where several
    tenants are about, steps are cut to half of it, and planned shortly before they can begin.
    Shorter steps use the hardware less well."""

    tenant_head_start_s: float = 2.0
    """Seconds of work by which a tenant that used less than its share may run ahead of it, so that
    short requests now and then are served at once."""

    retention_s: float = 600.0
    """How long the events of an ended generation can be replayed."""

    max_retained: int = 1024
    """Ended generations whose events are kept; one more takes the place of the oldest of the tenant
    that has most."""

    history_route: str = "auto"
    """`auto` chooses by bytes on the wire; `pass_kv`, `pass_q` or `gather` forces one."""

    max_pooling_loss: float = 0.01
    """Largest increase of perplexity (0.01 is 1 %), measured in the calibration file, at which a
    policy that pools KV heads is admitted."""

    admit_unmeasured_pooling: bool = False
    """Admit policies that pool KV heads though their cost was not measured; most models that were
    not trained with pooled heads are ruined by them."""

    def __post_init__(self) -> None:
        _want_at_least(1, "engine", self, "prefill_chunk_tokens", "shard_min_tokens", "max_running")
        _want_at_least(1, "engine", self, "upload_window_chunks", "lookahead_steps", "max_retained")
        _want_at_least(0, "engine", self, "max_waiting", "retention_s", "max_pooling_loss")
        _want_at_least(0, "engine", self, "tenant_head_start_s")
        _want_above_zero("engine", self, "step_timeout_s", "first_token_wait_s")
        _want_one_of(
            ("auto", "pass_kv", "pass_q", "gather"), "engine.history_route", self.history_route
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RingConfig:
    """Where the ranks run and how they talk."""

    num_ranks: int = 1
    """Workers in the ring group; each holds the whole model and its own share of the cache."""

    placement: str = "PACK"
    """Ray placement strategy: PACK (few nodes) or SPREAD (many)."""

    transport: TransportKind = TransportKind.AUTO
    """How ranks exchange tensors."""

    threads_per_rank: int = 0
    """CPU threads of each rank; 0: the rank's share of its machine's cores."""

    def __post_init__(self) -> None:
        _want_at_least(1, "ring", self, "num_ranks")
        _want_at_least(0, "ring", self, "threads_per_rank")
        _want_one_of(("PACK", "SPREAD"), "ring.placement", self.placement)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """The gRPC front door."""

    listen: str = "127.0.0.1:50051"
    """HOST:PORT; port 0 takes a free one."""

    insecure_local: bool = False
    """Serve callers without a credential, on loopback only. Required where there is no
    `tenancy.database`."""

    max_message_bytes: int = 4 * 1024 * 1024
    """Largest gRPC message, in either direction; longer prompts come in chunks."""

    upload_idle_timeout_s: float = 60.0
    """Longest wait for the next prompt chunk."""

    write_timeout_s: float = 60.0
    """Longest wait for a client to read an event."""

    keepalive_s: float = 20.0
    """A connection that does not answer a ping within half of this is dead."""

    max_concurrent_streams: int = 1024
    """Most calls that one connection may have open."""

    max_unary_calls: int = 64
    """Most calls of a tenant at one time that are answered once, such as CountTokens."""

    def __post_init__(self) -> None:
        address = Address.parse("router.listen", self.listen)
        if self.insecure_local and not address.is_loopback:
            raise ConfigError(
                "router.listen: want a loopback address (127.0.0.1, ::1 or localhost) because "
                f"router.insecure_local serves anyone who can connect, got {self.listen!r}"
            )
        _want_at_least(1, "router", self, "max_concurrent_streams", "max_unary_calls")
        _want_at_least(64 * 1024, "router", self, "max_message_bytes")
        _want_above_zero("router", self, "upload_idle_timeout_s", "write_timeout_s", "keepalive_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class TenancyConfig:
    """Who may use the cluster."""

    database: str = ""
    """SQLite file of tenants, API keys and the audit log, on a disk of the router's machine. Empty:
    no tenants, and nobody to authenticate."""

    admin_listen: str = "127.0.0.1:50052"
    """HOST:PORT of TenantService, where there is a database; port 0 takes a free one."""

    purge_after_s: float = 30 * 24 * 3600.0
    """How long a deleted tenant can be undeleted."""

    root_key: str = field(default="", repr=False)
    """File with 64 hexadecimal digits, or `env:NAME` of a variable with them: wraps the tenants'
    data keys and signs the audit log. Empty: whoever reads the database reads the data keys."""

    def __post_init__(self) -> None:
        Address.parse("tenancy.admin_listen", self.admin_listen)
        _want_at_least(0, "tenancy", self, "purge_after_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpillConfig:
    """Contexts off the GPUs, sealed: in the host's memory, and on disk."""

    folder: str = ""
    """Where they are: of this cluster alone, and every machine with a rank sees it at this path.
    Empty: contexts end with the engine."""

    capacity_bytes: int = 64 * 1024**3
    """Most bytes of all tenants' contexts there."""

    host_capacity_bytes: int = 0
    """Most bytes of all tenants' contexts in the host's memory. They go there before they go to
    disk, and end with the engine. 0: none do."""

    host_folder: str = "/dev/shm"
    """Where the machine has files in memory (tmpfs). Engine and ranks are all on that machine;
    contexts of others go to disk."""

    def __post_init__(self) -> None:
        _want_at_least(1, "spill", self, "capacity_bytes")
        _want_at_least(0, "spill", self, "host_capacity_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What every process of the cluster writes to its standard error."""

    level: str = "info"
    """Least severe level written: debug, info, warning or error."""

    format: LogFormat = LogFormat.AUTO
    """One JSON object a line, or columns for a reader."""

    def __post_init__(self) -> None:
        _want_one_of(("debug", "info", "warning", "error"), "log.level", self.level)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """All settings of one `kvcluster serve`."""

    model: str = "smollm2-135m"
    """Short name of a packaged model, a directory, or a GGUF file."""

    dtype: str = "auto"
    """Weights and cache: float32, bfloat16, float16; auto: float32 on CPU, the model's on GPU."""

    weights: str = "files"
    """`files`: the model's own; `random`: random numbers of its shape, of which only config.json is
    read. For measuring speed: what such a model says means nothing."""

    calibration: str = ""
    """File that `kvcluster calibrate` wrote for the model: latent codecs and `auto` need it."""

    ray_address: str = ""
    """Address of a running Ray cluster; empty: start one on this machine."""

    default_policy: str = ""
    """How the cache of a request that names no policy is compressed, in the policy language; empty:
    not at all."""

    tenant_policies: dict[str, str] = field(default_factory=dict)
    """Likewise by tenant id, for that tenant's requests: `tenant_policies.red = "int4"`. A variable
    sets it for ids in lower case."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ring: RingConfig = field(default_factory=RingConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    tenancy: TenancyConfig = field(default_factory=TenancyConfig)
    spill: SpillConfig = field(default_factory=SpillConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    oidc: OidcConfig = field(default_factory=OidcConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model: want a name, a directory or a GGUF file, got nothing")
        _want_one_of(("auto", "float32", "bfloat16", "float16"), "dtype", self.dtype)
        _want_one_of(("files", "random"), "weights", self.weights)
        if "" in self.tenant_policies:
            raise ConfigError("tenant_policies: want the id of a tenant, got nothing")


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, key: str, text: str) -> "Address":
        """Read HOST:PORT, an IPv6 host in brackets. Raises ConfigError, naming `key`."""
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ConfigError(f"{key}: want an IPv6 host in brackets, [::1]:50051, got {text!r}")
        if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65_535:
            raise ConfigError(f"{key}: want HOST:PORT with a port of 0 to 65535, got {text!r}")
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _want_at_least(minimum: int, section: str, config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < minimum:
            raise ConfigError(
                f"{section}.{name}: want at least {minimum}, got {getattr(config, name)}"
            )


def _want_above_zero(section: str, config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"{section}.{name}: want more than 0, got {getattr(config, name)}")


def _want_one_of(members: tuple[str, ...], key: str, value: str) -> None:
    if value not in members:
        raise ConfigError(f"{key}: want one of {', '.join(members)}, got {value!r}")
