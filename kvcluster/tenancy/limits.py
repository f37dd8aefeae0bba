"""What a tenant may use: its share of cache memory, and its limits on requests.

The router sends a tenant's limits to the engine with each request, so that one record decides and
a change holds from the next request on.
"""

import re
from enum import StrEnum

import msgspec

from kvcluster.errors import InvalidField, PermissionDenied
from kvcluster.types import Policy

UNLIMITED = 2**63 - 1
MAX_WEIGHT = 1000
MAX_PRIORITY = 100
MAX_POLICIES = 32
MAX_POLICY_CHARS = 1000
_METHODS = re.compile(r"[a-z][a-z0-9_]*( \+ [a-z][a-z0-9_]*){0,3}")


class Tier(StrEnum):
    """Where cache is kept. The names are those of the fields of `Partitions`."""

    GPU = "gpu"
    HOST = "host"
    DISK = "disk"


class TierPartition(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant's share of one tier of cache memory, over the whole cluster."""

    floor_bytes: int = 0
    """Nobody can take this much from the tenant."""
    limit_bytes: int = UNLIMITED
    """Most that it holds; what is between the two is borrowed."""


class Partitions(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant's share of every tier."""

    gpu: TierPartition = TierPartition()
    host: TierPartition = TierPartition()
    disk: TierPartition = TierPartition()


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant may use besides memory. 0 means none. Checked by `check_limits`."""

    concurrent_generations: int = 16
    """Generations that hold cache at one time."""
    open_streams: int = 64
    """Calls that stream events, at one router."""
    queued_generations: int = 64
    """Generations that wait because others of the tenant run."""
    input_tokens_per_minute: int = UNLIMITED
    output_tokens_per_minute: int = UNLIMITED
    """A generation reserves its max_output_tokens."""
    max_context_tokens: int = UNLIMITED
    """Of prompt and output together."""
    max_pinned_bytes: int = 0
    weight: int = 1
    """Share of work where tenants compete."""
    max_priority: int = 0
    default_policy: str = ""
    """Of requests that name none, in the policy language."""
    allowed_policies: tuple[str, ...] = ()
    """Combinations of methods that a policy may name, such as `int8 + window`; empty: all."""


NO_LIMITS = TenantLimits(
    concurrent_generations=UNLIMITED,
    open_streams=UNLIMITED,
    queued_generations=UNLIMITED,
    max_pinned_bytes=UNLIMITED,
    max_priority=MAX_PRIORITY,
)
"""Of whoever is served without authentication: the engine's own limits are the only ones."""


def check_limits(limits: TenantLimits) -> None:
    """Raises: InvalidField, naming the field as the proto has it."""
    for field in msgspec.structs.fields(limits):
        value = getattr(limits, field.name)
        if field.type is int and not 0 <= value <= UNLIMITED:
            raise InvalidField(f"limits.{field.name}", f"want 0 to {UNLIMITED}, got {value}")
    if not 1 <= limits.weight <= MAX_WEIGHT:
        raise InvalidField("limits.weight", f"want 1 to {MAX_WEIGHT}, got {limits.weight}")
    if limits.max_priority > MAX_PRIORITY:
        raise InvalidField(
            "limits.max_priority", f"want 0 to {MAX_PRIORITY}, got {limits.max_priority}"
        )
    if len(limits.default_policy) > MAX_POLICY_CHARS:
        raise InvalidField("limits.default_policy", f"want at most {MAX_POLICY_CHARS} characters")
    if len(limits.allowed_policies) > MAX_POLICIES:
        raise InvalidField("limits.allowed_policies", f"want at most {MAX_POLICIES}")
    for text in limits.allowed_policies:
        if not _METHODS.fullmatch(text):
            raise InvalidField(
                "limits.allowed_policies",
                "want names of methods without arguments, such as 'int4' or 'int8 + window'",
            )


def check_partitions(partitions: Partitions) -> None:
    """Raises: InvalidField, naming the field as the proto has it."""
    for tier in ("gpu", "host", "disk"):
        share: TierPartition = getattr(partitions, tier)
        for name, value in msgspec.structs.asdict(share).items():
            if not 0 <= value <= UNLIMITED:
                raise InvalidField(f"partitions.{tier}.{name}", f"want 0 to {UNLIMITED}")
        if share.floor_bytes > share.limit_bytes:
            raise InvalidField(
                f"partitions.{tier}.floor_bytes",
                f"want at most limit_bytes ({share.limit_bytes}), got {share.floor_bytes}",
            )


def allows(limits: TenantLimits, policy: Policy) -> bool:
    """Whether the tenant may use the policy: its methods are those of an allowed combination."""
    if not limits.allowed_policies:
        return True
    return _methods(str(policy)) in map(_methods, limits.allowed_policies)


def check_allowed(limits: TenantLimits, policy: Policy) -> None:
    """Raises: PermissionDenied, with what is allowed."""
    if not allows(limits, policy):
        allowed = ", ".join(limits.allowed_policies)
        raise PermissionDenied(
            f"policy: {policy} is not allowed to this tenant; allowed: {allowed}",
            metadata={"policy": str(policy), "allowed": allowed},
        )


def _methods(text: str) -> frozenset[str]:
    """Without arguments. What leaves everything as it is need not be named beside others."""
    names = {part.partition(":")[0].strip() for part in text.split("+")}
    return frozenset(names - {str(Policy())}) or frozenset({str(Policy())})
