"""Reads the settings of `config`: a flag wins over the environment, that over the file, that over
the default.

A key is dotted: `cache.block_size` is the flag's key, `block_size` under `[cache]` in TOML, and the
variable `KVCLUSTER_CACHE__BLOCK_SIZE`. Only the CLI calls `load`; nothing below it reads the
environment.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvcluster.config import ClusterConfig
from kvcluster.errors import ConfigError

ENV_PREFIX = "KVCLUSTER_"
API_KEY_VARIABLE = "KVCLUSTER_API_KEY"
"""Read by the commands that call a server; no setting of one."""
_ANY = "*"
"""Stands in a key for a name that is the operator's to choose."""

# Kubernetes sets these in every pod that runs beside a service whose name begins with kvcluster.
_KUBERNETES_NAME = re.compile(
    r"KVCLUSTER_([A-Z0-9]+_)*(SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP)\w*)?)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedConfig:
    """A configuration and where each of its values came from."""

    config: ClusterConfig
    origins: Mapping[str, str]
    """For every key that is not at its default: `flag`, a variable's name, or the file's path."""


class _Given(NamedTuple):
    """One value as a source gave it."""

    value: object
    origin: str
    is_text: bool
    """From the environment or a flag, where everything is text: `64` may mean a number."""


def load(
    *, file: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]
) -> LoadedConfig:
    """Read the settings from every source. `overrides` are flags, by dotted key: `ring.num_ranks`.

    Raises: ConfigError for an unknown key, a value of the wrong type or outside its rule, or a file
    that cannot be read; the message names key, value, rule and source.
    """
    given = _from_file(file) if file is not None else {}
    given |= _from_environ(environ)
    given |= {
        key: _Given(value, "flag", isinstance(value, str)) for key, value in overrides.items()
    }
    values = {key: _typed(key, item) for key, item in given.items()}
    origins = {key: item.origin for key, item in given.items()}
    try:
        return LoadedConfig(config=msgspec.convert(_nest(values), ClusterConfig), origins=origins)
    except ConfigError as error:
        key = error.message.partition(":")[0]
        raise ConfigError(f"{error.message} (from {origins.get(key, 'default')})") from error


def known_keys() -> tuple[str, ...]:
    """Every key that a file, a variable or a flag can set; `*` stands for any name."""
    return tuple(_key_types(ClusterConfig, ""))


def _from_file(file: Path) -> dict[str, _Given]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    return {
        key: _Given(value, str(file), is_text=False)
        for key, value in _flatten(tables, "")
        if not (value == {} and key in _sections())
    }


def _flatten(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _from_environ(environ: Mapping[str, str]) -> dict[str, _Given]:
    return {
        name.removeprefix(ENV_PREFIX).lower().replace("__", "."): _Given(value, name, is_text=True)
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX)
        and name != API_KEY_VARIABLE
        and not _KUBERNETES_NAME.fullmatch(name)
    }


def _typed(key: str, given: _Given) -> object:
    kinds = _key_types(ClusterConfig, "")
    section, dot, _ = key.partition(".")
    kind = kinds.get(key) or (kinds.get(f"{section}.{_ANY}") if dot else None)
    if kind is None:
        raise ConfigError(_unknown_key(key, given.origin))
    try:
        value: object = msgspec.convert(given.value, kind, strict=not given.is_text)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{key}: want {_rule(kind)}, got {given.value!r} (from {given.origin})"
        ) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: want a finite number, got {value} (from {given.origin})")
    return value


def _unknown_key(key: str, origin: str) -> str:
    if key in _sections():
        return f"{key}: want a table of settings (from {origin})"
    candidates = (*known_keys(), *_sections())
    nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)
    return f"{key}: no such setting (from {origin}); the nearest is {nearest[0]}"


def _rule(kind: type) -> str:
    if issubclass(kind, StrEnum):
        return f"one of {', '.join(kind)}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _nest(values: Mapping[str, object]) -> dict[str, object]:
    nested: dict[str, object] = {key: value for key, value in values.items() if "." not in key}
    for section in _sections():
        prefix = f"{section}."
        nested[section] = {
            key.removeprefix(prefix): value
            for key, value in values.items()
            if key.startswith(prefix)
        }
    return nested


def _sections() -> frozenset[str]:
    return frozenset(
        spec.name
        for spec in fields(ClusterConfig)
        if is_dataclass(spec.type) or spec.type == dict[str, str]
    )


def _key_types(kind: type, prefix: str) -> dict[str, type]:
    found: dict[str, type] = {}
    for spec in fields(kind):
        if spec.type == dict[str, str]:
            found[f"{prefix}{spec.name}.{_ANY}"] = str
            continue
        assert isinstance(spec.type, type), "config.py does not postpone its annotations"
        if is_dataclass(spec.type):
            found |= _key_types(spec.type, f"{prefix}{spec.name}.")
        else:
            found[f"{prefix}{spec.name}"] = spec.type
    return found
