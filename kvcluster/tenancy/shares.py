"""What every engine has to know of all tenants, whether they send anything or not: their floors."""

from collections.abc import Collection, Iterable, Mapping

import msgspec

from kvcluster.errors import InvalidField
from kvcluster.tenancy.limits import UNLIMITED, Partitions, Tier, TierPartition
from kvcluster.tenancy.tenant import OPERATORS, Tenant, TenantState
from kvcluster.types import TenantId


class TenantShare(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant's."""

    tenant: TenantId
    partitions: Partitions
    weight: int = 1
    tenant_uid: str = ""
    data_keys: dict[int, bytes] | None = None
    """By version: what its contexts on disk are sealed under. Stays within the cluster. None: they
    could not be read now."""

    def __repr__(self) -> str:
        return f"TenantShare(tenant={self.tenant!r}, partitions={self.partitions!r})"


class TenantShares(msgspec.Struct, frozen=True, kw_only=True):
    """Those of all tenants at one moment."""

    revision: int = -1
    """Of the store's last change. What is older than what an engine has, it does not take."""
    shares: tuple[TenantShare, ...] = ()
    deleted: tuple[tuple[TenantId, str], ...] = ()
    """Ids and uids of tenants whose data keys were destroyed with them."""


def shares_of(
    tenants: Collection[Tenant],
    *,
    revision: int,
    num_engines: int,
    data_keys: Mapping[TenantId, dict[int, bytes]],
) -> TenantShares:
    """For each of so many engines alike: what a tenant has of the cluster is divided among them."""
    return TenantShares(
        revision=revision,
        deleted=tuple(
            (tenant.tenant, tenant.uid) for tenant in tenants if tenant.state is TenantState.DELETED
        ),
        shares=tuple(
            TenantShare(
                tenant=tenant.tenant,
                partitions=Partitions(
                    gpu=_divided(tenant.partitions.gpu, num_engines),
                    host=_divided(tenant.partitions.host, num_engines),
                    disk=_divided(tenant.partitions.disk, num_engines),
                ),
                weight=tenant.limits.weight,
                tenant_uid=tenant.uid,
                data_keys=data_keys.get(tenant.tenant),
            )
            for tenant in tenants
            if tenant.state is not TenantState.DELETED and tenant.tenant != OPERATORS
        ),
    )


TierBytes = Mapping[Tier, int]
"""Of all engines together, as far as they answer; empty: none did."""


def has_floors(tenant: Tenant) -> bool:
    return any(_floor(tenant, tier) for tier in Tier)


def check_floors(
    tenant: Tenant, before: Tenant | None, others: Collection[Tenant], tiers: TierBytes
) -> None:
    """Whether floors that a change raises can be kept together with those of others. `before`: the
    tenant as it was, None where it had none. Of engines that do not answer nothing is known: then
    nothing is checked.

    Raises: InvalidField, with what is left.
    """
    for tier in Tier if tiers else ():
        if _floor(tenant, tier) > (_floor(before, tier) if before else 0):
            _check_floor(tenant, tier, others, tiers.get(tier, 0))


def _check_floor(tenant: Tenant, tier: Tier, others: Iterable[Tenant], total: int) -> None:
    taken = sum(
        _floor(other, tier)
        for other in others
        if other.tenant != tenant.tenant and other.state is not TenantState.DELETED
    )
    if _floor(tenant, tier) + taken > total:
        raise InvalidField(
            f"partitions.{tier}.floor_bytes",
            f"want at most {max(0, total - taken)}: the tier has {total} bytes, and floors of "
            f"other tenants take {taken} of them",
        )


def _floor(tenant: Tenant, tier: Tier) -> int:
    share: TierPartition = getattr(tenant.partitions, tier.value)
    return share.floor_bytes


def _divided(share: TierPartition, count: int) -> TierPartition:
    limit = share.limit_bytes
    return TierPartition(
        floor_bytes=share.floor_bytes // count,
        limit_bytes=limit if limit == UNLIMITED else limit // count,
    )
