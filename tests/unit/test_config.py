import ast
import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import ModuleType

import pytest

from kvcluster import config as config_module
from kvcluster import config_access
from kvcluster.config import Address, ClusterConfig, LogFormat, RouterConfig, TransportKind
from kvcluster.config_access import OidcConfig, TlsConfig, check_together
from kvcluster.config_sources import LoadedConfig, known_keys, load
from kvcluster.errors import ConfigError

VALID: dict[str, object] = {
    "model": "gemma3-270m",
    "dtype": "bfloat16",
    "weights": "random",
    "calibration": "model.safetensors",
    "ray_address": "auto",
    "default_policy": "int4 + window",
    "tenant_policies.red": "int8",
    "cache.block_size": 32,
    "cache.capacity_tokens": 4096,
    "cache.exact_recent_tokens": 0,
    "cache.prefix_cache": False,
    "cache.commit_at_start": True,
    "engine.prefill_chunk_tokens": 256,
    "engine.shard_min_tokens": 512,
    "engine.max_running": 8,
    "engine.max_waiting": 0,
    "engine.upload_window_chunks": 2,
    "engine.lookahead_steps": 1,
    "engine.step_timeout_s": 5.0,
    "engine.first_token_wait_s": 0.5,
    "engine.tenant_head_start_s": 0.0,
    "engine.retention_s": 0.0,
    "engine.max_retained": 16,
    "engine.history_route": "pass_q",
    "engine.max_pooling_loss": 0.5,
    "engine.admit_unmeasured_pooling": True,
    "ring.num_ranks": 4,
    "ring.placement": "SPREAD",
    "ring.transport": TransportKind.GLOO,
    "ring.threads_per_rank": 2,
    "router.listen": "[::1]:50052",
    "router.insecure_local": True,
    "router.max_message_bytes": 1 << 20,
    "router.upload_idle_timeout_s": 2.5,
    "router.write_timeout_s": 3.5,
    "router.keepalive_s": 4.5,
    "router.max_concurrent_streams": 10,
    "router.max_unary_calls": 11,
    "tenancy.database": "tenants.sqlite",
    "tenancy.admin_listen": "[::1]:50053",
    "tenancy.purge_after_s": 60.0,
    "tenancy.root_key": "root.key",
    "tls.certificate": "server.crt",
    "tls.key": "server.key",
    "tls.client_ca": "clients.pem",
    "tls.admin_client_ca": "admins.pem",
    "oidc.issuer": "https://login.example",
    "oidc.audience": "kvcluster",
    "oidc.jwks": "https://login.example/jwks",
    "oidc.algorithms": "ES256, EdDSA",
    "oidc.tenant_claim": "https://example/tenant",
    "oidc.role_claim": "role",
    "oidc.leeway_s": 0.0,
    "oidc.refresh_s": 60.0,
    "spill.folder": "contexts",
    "spill.capacity_bytes": 10_000,
    "spill.host_capacity_bytes": 10_000,
    "spill.host_folder": "/memory",
    "log.level": "debug",
    "log.format": LogFormat.JSON,
}
"""For every key a value that is not its default."""

REFUSED: list[tuple[str, object, str]] = [
    ("model", "", "want a name"),
    ("dtype", "float8", "want one of auto, float32, bfloat16, float16"),
    ("weights", "zeros", "want one of files, random"),
    ("cache.block_size", 48, "want a power of two"),
    ("cache.block_size", 0, "want a power of two"),
    ("cache.capacity_tokens", 63, "want at least one block"),
    ("cache.exact_recent_tokens", -1, "want at least 0"),
    ("engine.prefill_chunk_tokens", 0, "want at least 1"),
    ("engine.shard_min_tokens", 0, "want at least 1"),
    ("engine.max_running", 0, "want at least 1"),
    ("engine.max_waiting", -1, "want at least 0"),
    ("engine.upload_window_chunks", 0, "want at least 1"),
    ("engine.lookahead_steps", 0, "want at least 1"),
    ("engine.step_timeout_s", 0.0, "want more than 0"),
    ("engine.step_timeout_s", float("nan"), "want a finite number"),
    ("engine.first_token_wait_s", 0.0, "want more than 0"),
    ("engine.tenant_head_start_s", -1.0, "want at least 0"),
    ("engine.retention_s", -1.0, "want at least 0"),
    ("engine.max_pooling_loss", -0.01, "want at least 0"),
    ("engine.max_pooling_loss", float("nan"), "want a finite number"),
    ("engine.max_retained", 0, "want at least 1"),
    ("engine.history_route", "pass_kq", "want one of auto, pass_kv, pass_q, gather"),
    ("ring.num_ranks", 0, "want at least 1"),
    ("ring.placement", "pack", "want one of PACK, SPREAD"),
    ("ring.transport", "mpi", "want one of auto, sockets, gloo, nccl"),
    ("ring.threads_per_rank", -1, "want at least 0"),
    ("router.listen", "50051", "want HOST:PORT"),
    ("router.listen", "localhost:70000", "want HOST:PORT"),
    ("router.listen", "::1:50051", "want an IPv6 host in brackets"),
    ("router.max_message_bytes", 1000, "want at least 65536"),
    ("router.upload_idle_timeout_s", 0.0, "want more than 0"),
    ("router.write_timeout_s", -2.0, "want more than 0"),
    ("router.keepalive_s", float("inf"), "want a finite number"),
    ("router.max_concurrent_streams", 0, "want at least 1"),
    ("router.max_unary_calls", 0, "want at least 1"),
    ("tenancy.admin_listen", "50052", "want HOST:PORT"),
    ("tenancy.purge_after_s", -1.0, "want at least 0"),
    ("oidc.algorithms", "RS256,HS256", "want some of RS256"),
    ("oidc.algorithms", "none", "want some of RS256"),
    ("oidc.algorithms", "", "want some of RS256"),
    ("oidc.jwks", "http://login.example/jwks", "want https"),
    ("oidc.leeway_s", -1.0, "want at least 0"),
    ("oidc.refresh_s", 0.0, "want more than 0"),
    ("spill.capacity_bytes", 0, "want at least 1"),
    ("spill.host_capacity_bytes", -1, "want at least 0"),
    ("log.level", "trace", "want one of debug, info, warning, error"),
    ("log.format", "xml", "want one of auto, console, json"),
]


def loaded(
    overrides: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
    file: Path | None = None,
) -> LoadedConfig:
    return load(file=file, environ=environ or {}, overrides=overrides or {})


def value_of(config: ClusterConfig, key: str) -> object:
    section, _, name = key.rpartition(".")
    owner = getattr(config, section) if section else config
    return owner[name] if isinstance(owner, dict) else getattr(owner, name)


def variable(key: str) -> str:
    return "KVCLUSTER_" + key.upper().replace(".", "__")


def write_toml(path: Path, key: str, value: object) -> Path:
    section, _, name = key.rpartition(".")
    text = json.dumps(value)  # of a number, a boolean or text: the same as in TOML
    file = path / "cluster.toml"
    file.write_text(f"[{section}]\n{name} = {text}\n" if section else f"{name} = {text}\n")
    return file


def test_no_source_gives_the_defaults() -> None:
    assert loaded().config == ClusterConfig()


def test_the_table_of_this_test_covers_every_key() -> None:
    assert {key.replace("policies.red", "policies.*") for key in VALID} == set(known_keys())


@pytest.mark.parametrize("key", VALID)
def test_a_flag_sets_its_key(key: str) -> None:
    assert value_of(loaded({key: VALID[key]}).config, key) == VALID[key]


@pytest.mark.parametrize("key", VALID)
def test_a_variable_sets_its_key(key: str) -> None:
    config = loaded(environ={variable(key): str(VALID[key])}).config

    assert value_of(config, key) == VALID[key]
    assert type(value_of(config, key)) is type(VALID[key])


@pytest.mark.parametrize("key", VALID)
def test_a_file_sets_its_key(key: str, tmp_path: Path) -> None:
    file = write_toml(tmp_path, key, VALID[key])

    assert value_of(loaded(file=file).config, key) == VALID[key]


@pytest.mark.parametrize(("key", "value", "rule"), REFUSED)
def test_a_value_outside_its_rule_is_refused_with_key_value_and_source(
    key: str, value: object, rule: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        loaded({key: value})

    assert refused.value.message.startswith(f"{key}: {rule}")
    assert str(value) in refused.value.message
    assert refused.value.message.endswith("(from flag)")


def test_a_flag_wins_over_a_variable_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text("[engine]\nmax_running = 1\nmax_waiting = 1\nmax_retained = 1\n")

    result = loaded(
        {"engine.max_running": 3},
        {"KVCLUSTER_ENGINE__MAX_RUNNING": "2", "KVCLUSTER_ENGINE__MAX_WAITING": "2"},
        file,
    )

    engine = result.config.engine
    assert (engine.max_running, engine.max_waiting, engine.max_retained) == (3, 2, 1)
    assert result.origins == {
        "engine.max_running": "flag",
        "engine.max_waiting": "KVCLUSTER_ENGINE__MAX_WAITING",
        "engine.max_retained": str(file),
    }


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("cache.blok_size", "cache.block_size"),
        ("mdoel", "model"),
        ("rign.num_ranks", "ring.num_ranks"),
    ],
)
def test_an_unknown_key_is_refused_in_every_source_with_the_nearest_known_one(
    unknown: str, nearest: str, tmp_path: Path
) -> None:
    file = write_toml(tmp_path, unknown, 1)

    for arguments in (
        {"overrides": {unknown: 1}},
        {"environ": {variable(unknown): "1"}},
        {"file": file},
    ):
        with pytest.raises(ConfigError, match=f"^{unknown}: no such setting .* {nearest}$"):
            loaded(**arguments)


@pytest.mark.parametrize("text", ["[cahce]\n", "[cache.deeper]\nblock_size = 64\n"])
def test_an_unknown_table_in_the_file_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(text)

    with pytest.raises(ConfigError, match="no such setting"):
        loaded(file=file)


def test_an_empty_known_table_in_the_file_is_fine(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text("[cache]\n")

    assert loaded(file=file).config == ClusterConfig()


def test_a_tenants_policy_needs_the_tenants_id(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('[tenant_policies]\n"" = "int4"\n')

    with pytest.raises(ConfigError, match=r"^tenant_policies: want the id of a tenant"):
        loaded(file=file)


def test_a_tenants_id_may_have_dots(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('[tenant_policies]\n"red.example" = "int4"\n')

    assert loaded(file=file).config.tenant_policies == {"red.example": "int4"}


@pytest.mark.parametrize("section", ["cache", "tenant_policies"])
def test_a_section_that_is_not_a_table_is_refused(section: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(f"{section} = 3\n")

    with pytest.raises(ConfigError, match=f"^{section}: want a table of settings"):
        loaded(file=file)


@pytest.mark.parametrize("value", ['"64"', "true", "64.0", "[64]"])
def test_a_file_value_of_another_type_is_refused_rather_than_converted(
    value: str, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(f"[cache]\nblock_size = {value}\n")

    with pytest.raises(ConfigError, match=r"^cache\.block_size: want a whole number"):
        loaded(file=file)


@pytest.mark.parametrize(
    ("text", "message"),
    [("model = [", "not valid TOML"), (None, "cannot be read")],
)
def test_a_file_that_cannot_be_used_is_named(
    text: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.toml"
    if text is not None:
        file.write_text(text)

    with pytest.raises(ConfigError, match=f"cluster.toml: {message}"):
        loaded(file=file)


@pytest.mark.parametrize(
    "name",
    [
        "HOME",
        "KVCLUSTER_PORT",
        "KVCLUSTER_SERVICE_HOST",
        "KVCLUSTER_SERVICE_PORT_GRPC",
        "KVCLUSTER_ROUTER_PORT_50051_TCP",
        "KVCLUSTER_ROUTER_PORT_50051_TCP_ADDR",
    ],
)
def test_variables_that_kubernetes_sets_for_services_are_not_settings(name: str) -> None:
    assert loaded(environ={name: "tcp://10.0.0.1:50051"}).config == ClusterConfig()


def test_a_mistyped_port_variable_is_not_taken_for_one_of_kubernetes() -> None:
    with pytest.raises(ConfigError, match=r"^router\.port: no such setting"):
        loaded(environ={"KVCLUSTER_ROUTER__PORT": "1"})


@pytest.mark.parametrize(
    ("tls", "oidc", "key"),
    [
        ({"certificate": "a"}, {}, "tls.key"),
        ({"key": "a"}, {}, "tls.certificate"),
        ({"client_ca": "a"}, {}, "tls.client_ca"),
        ({"admin_client_ca": "a"}, {}, "tls.admin_client_ca"),
        ({}, {"issuer": "a"}, "oidc.audience"),
        ({}, {"issuer": "a", "audience": "b"}, "oidc.jwks"),
        ({}, {"audience": "b", "jwks": "c"}, "oidc.issuer"),
        ({}, {"issuer": "a", "audience": "b", "jwks": "c", "tenant_claim": ""}, "tenant_claim"),
    ],
)
def test_settings_that_go_together_are_asked_for_together(
    tls: dict[str, str], oidc: dict[str, str], key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        check_together(TlsConfig(**tls), OidcConfig(**oidc), has_tenants=True)


def test_tokens_without_tenants_are_refused() -> None:
    oidc = OidcConfig(issuer="a", audience="b", jwks="c")
    check_together(TlsConfig(), oidc, has_tenants=True)
    with pytest.raises(ConfigError, match=r"tenancy\.database"):
        check_together(TlsConfig(), oidc, has_tenants=False)


@pytest.mark.parametrize("module", [config_module, config_access])
def test_every_setting_has_a_docstring(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    bare = []
    for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        if not owner.name.endswith("Config"):
            continue
        for statement, following in zip(owner.body, [*owner.body[1:], None], strict=True):
            is_documented = isinstance(following, ast.Expr)
            is_section = "default_factory" in ast.unparse(statement)
            if isinstance(statement, ast.AnnAssign) and not is_documented and not is_section:
                bare.append(f"{owner.name}.{ast.unparse(statement.target)}")

    assert bare == []


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        ClusterConfig().model = "other"  # type: ignore[misc]


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "10.0.0.1:1", "[::]:1", "example.org:1"])
def test_serving_without_authentication_beyond_loopback_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"^router\.listen: want a loopback address"):
        RouterConfig(listen=listen, insecure_local=True)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:50051", "[::1]:1"])
def test_serving_without_authentication_on_loopback_is_allowed(listen: str) -> None:
    assert RouterConfig(listen=listen, insecure_local=True).listen == listen


def test_an_address_is_split_into_host_and_port() -> None:
    assert Address.parse("router.listen", "[::1]:50051") == Address("::1", 50051)
    assert Address.parse("router.listen", "localhost:0") == Address("localhost", 0)


@pytest.mark.parametrize("name", ["local.toml", "cluster.toml"])
def test_the_configurations_that_we_ship_are_valid(name: str) -> None:
    file = Path(__file__).parents[2] / "deploy" / name

    config = loaded(file=file).config
    assert config.router.insecure_local != bool(config.tenancy.database)
