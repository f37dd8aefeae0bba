"""Flags of `kvcluster tenants` as fields of requests."""

import re
import time
from collections.abc import Iterator
from typing import NamedTuple

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from kvcluster.errors import InvalidField
from kvcluster.rpc.v1 import tenant_service_pb2 as pb

_NUMBER = re.compile(r"([0-9]{1,19})(k|M|G|T|Ki|Mi|Gi|Ti|)B?")
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_FACTORS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_MAX_NUMBER = 2**63 - 1
_MAX_DAYS = 36_500.0
_DAY_S = 86_400


class TenantFields(NamedTuple):
    """The fields that were given, and their paths."""

    message: pb.Tenant
    paths: list[str]


def tenant_fields(
    display_name: str | None,
    labels: list[str] | None,
    limits: list[str] | None,
    partitions: list[str] | None,
    default_policy: str | None,
    allowed_policies: list[str] | None,
) -> TenantFields:
    """Raises: InvalidField, naming the flag."""
    message, paths = pb.Tenant(), list[str]()
    if display_name is not None:
        message.display_name = display_name
        paths.append("display_name")
    for key, value in _pairs("--label", labels):
        message.labels[key] = value
        paths = [*paths, "labels"] if "labels" not in paths else paths
    for name, text in _pairs("--limit", limits):
        _set_number(message.limits, "--limit", name, text)
        paths.append(f"limits.{name}")
    for name, text in _pairs("--partition", partitions):
        tier, _, field = name.partition(".")
        if tier not in message.partitions.DESCRIPTOR.fields_by_name:
            raise InvalidField("--partition", f"want gpu, host or disk before a dot, got {name!r}")
        _set_number(getattr(message.partitions, tier), "--partition", field, text)
        paths.append(f"partitions.{name}")
    if default_policy is not None:
        message.limits.default_policy = default_policy
        paths.append("limits.default_policy")
    if allowed_policies:
        message.limits.allowed_policies.extend(allowed_policies)
        paths.append("limits.allowed_policies")
    return TenantFields(message, paths)


def api_key_fields(role: str, display_name: str | None, expires_in_days: float | None) -> pb.ApiKey:
    """Raises: InvalidField, naming the flag."""
    roles = {name.removeprefix("ROLE_").lower(): number for name, number in pb.ApiKey.Role.items()}
    if role not in roles:
        raise InvalidField("--role", f"want one of {', '.join(list(roles)[1:])}, got {role!r}")
    message = pb.ApiKey(role=roles[role], display_name=display_name or "")
    if expires_in_days is not None:
        if not 0 < expires_in_days <= _MAX_DAYS:
            raise InvalidField("--expires-in", f"want more than 0, at most {_MAX_DAYS:g} days")
        seconds = int(time.time() + expires_in_days * _DAY_S)
        message.expire_time.CopyFrom(Timestamp(seconds=seconds))
    return message


def duration(flag: str, seconds: float | None) -> Duration | None:
    """Raises: InvalidField."""
    if seconds is None:
        return None
    if not 0 <= seconds <= _MAX_DAYS * _DAY_S:
        raise InvalidField(flag, f"want seconds, 0 or more, got {seconds}")
    message = Duration()
    message.FromMilliseconds(round(seconds * 1000))
    return message


def _pairs(flag: str, settings: list[str] | None) -> Iterator[tuple[str, str]]:
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InvalidField(flag, f"want NAME=VALUE, got {setting!r}")
        yield name, value


def _set_number(message: Message, flag: str, name: str, text: str) -> None:
    """Set a numeric field; 40G and 40GiB are numbers too."""
    field = message.DESCRIPTOR.fields_by_name.get(name)
    numbers = [each.name for each in message.DESCRIPTOR.fields if each.type == each.TYPE_UINT64]
    if field is None or name not in numbers:
        raise InvalidField(flag, f"there is no {name!r}; there are {', '.join(numbers)}")
    found = _NUMBER.fullmatch(text)
    value = int(found[1]) * _FACTORS[found[2]] if found else -1
    if not 0 <= value <= _MAX_NUMBER:
        raise InvalidField(flag, f"{name}: want a whole number such as 8, 500k or 40GiB")
    setattr(message, name, value)
