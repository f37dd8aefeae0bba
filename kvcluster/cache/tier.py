"""Who holds what of one tier of cache memory: floors that nobody else takes, limits, and what is
borrowed in between.

One ledger a tier, in the engine process. It counts in the tier's own units, by group: blocks of
each KV group on the GPUs, bytes in one group in host memory and on disk. Σ tenants + free = total
holds after every call (`check`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from operator import le
from typing import Protocol

from kvcluster.tenancy.limits import UNLIMITED
from kvcluster.types import TenantId


@dataclass(frozen=True, kw_only=True, slots=True)
class TierShare:
    """What a tenant may have of a tier. Without one: no floor, no limit, weight 1."""

    floor_bytes: int = 0
    """Kept free for the tenant while it does not use it. It is cut from all groups alike."""
    limit_bytes: int = UNLIMITED
    """Most that it holds, over all groups."""
    weight: int = 1
    """Borrowed memory is reclaimed first from who borrows most for its weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TierUse:
    """What one tenant has of a tier now."""

    share: TierShare
    used_bytes: int
    """As stored, over all ranks, what is counted beside the units included."""
    borrowed_bytes: int
    """The part that is not covered by the floor, group by group."""
    idle_bytes: int
    """The part that eviction could free: nobody is using it."""


class Reclaimable(Protocol):
    """What one tenant keeps in a tier for later use and could do without, such as cached blocks.

    It takes its units from the ledger and gives them back like anyone else.
    """

    def idle_units(self) -> Sequence[int]:
        """Per group, the units that `evict` would free at once. Fewer than there are is safe."""
        ...

    def evict(self, group: int, count: int) -> None:
        """Give so many units of the group back, the least useful first; units of other groups may
        come free with them. Takes nothing."""
        ...


@dataclass(slots=True)
class _Account:
    """Mutable: one tenant, by group."""

    used: list[int]
    beside: list[int]
    floors: list[int]
    share: TierShare = TierShare()
    cache: Reclaimable | None = None

    def unfilled(self, group: int) -> int:
        return max(0, self.floors[group] - self.used[group])

    def borrowed(self, group: int) -> int:
        return max(0, self.used[group] - self.floors[group])

    def idle(self, group: int) -> int:
        return 0 if self.cache is None else self.cache.idle_units()[group]


@dataclass(slots=True)
class _Group:
    """Mutable: one group of units, and what all floors still claim, in units and in chunks."""

    total: int
    unit_bytes: int
    free: int = field(init=False)
    unfilled: int = 0
    unfilled_chunks: int = 0

    def __post_init__(self) -> None:
        self.free = self.total


class TierLedger:
    """The only counter of a tier. Owners of the memory ask before they take, and tell."""

    def __init__(
        self,
        totals: Sequence[int],
        *,
        unit_bytes: Sequence[int],
        chunk: int = 1,
        whole_free: Callable[[int], int] | None = None,
    ) -> None:
        """`totals`: units per group, of `unit_bytes` each. `chunk`: units that some users need
        together, so floors are kept free in whole chunks; `whole_free(group)` counts the units in
        chunks that are free throughout."""
        self._groups = [_Group(*sizes) for sizes in zip(totals, unit_bytes, strict=True)]
        self._accounts: dict[TenantId, _Account] = {}
        self._chunk = chunk
        self._whole_free = whole_free or (lambda group: self._groups[group].free)

    @property
    def total_bytes(self) -> int:
        return sum(group.total * group.unit_bytes for group in self._groups)

    @property
    def tenants(self) -> tuple[TenantId, ...]:
        """Those that have a share, or had memory."""
        return tuple(self._accounts)

    def apply(self, shares: Mapping[TenantId, TierShare]) -> None:
        """These shares hold from now on; a tenant that is not named has none. What is above a
        limit and idle is evicted; what is in use stays until it is given back or reclaimed.
        Accounts of unused tenants without a share go."""
        for tenant in {*self._accounts, *shares}:
            account = self._account(tenant)
            self._count_floors(account, -1)
            account.share = shares.get(tenant, TierShare())
            account.floors = self._floors(account.share)
            self._count_floors(account, +1)
            in_use = any(account.used) or any(account.beside) or account.cache is not None
            if not in_use and tenant not in shares:
                del self._accounts[tenant]
        for tenant in tuple(self._accounts):
            self._evict_above_limit(tenant)

    def share(self, tenant: TenantId) -> TierShare:
        account = self._accounts.get(tenant)
        return TierShare() if account is None else account.share

    def plug(self, tenant: TenantId, cache: Reclaimable) -> None:
        """From now on `cache` gives back what the tenant could do without."""
        self._account(tenant).cache = cache

    def used(self, tenant: TenantId) -> tuple[int, ...]:
        """Units per group, without what is counted beside them."""
        account = self._accounts.get(tenant)
        return (0,) * len(self._groups) if account is None else tuple(account.used)

    def beside(self, tenant: TenantId) -> tuple[int, ...]:
        """Units per group that are counted beside those of the tier."""
        account = self._accounts.get(tenant)
        return (0,) * len(self._groups) if account is None else tuple(account.beside)

    def available(self, tenant: TenantId) -> tuple[int, ...]:
        """Units per group that the tenant could take now, one group at a time."""
        return tuple(self.available_in(tenant, group) for group in range(len(self._groups)))

    def available_in(self, tenant: TenantId, group: int) -> int:
        """The same of one group."""
        room = min(self._unclaimed(tenant, group), self._below_limit(tenant, group))
        return max(0, min(room, self._not_held(tenant, group)))

    def spare_chunks(self, tenant: TenantId, group: int) -> int | None:
        """Chunks, now free throughout, that the tenant may break; None: as many as it likes."""
        claimed = self._chunks_of_others(tenant, group)
        return None if claimed <= 0 else self._whole_free(group) // self._chunk - claimed

    def obtainable(self, tenant: TenantId) -> tuple[int, ...]:
        """Units per group that the tenant could take after eviction of all that may be evicted for
        it."""
        own = self._accounts.get(tenant)
        counts = []
        for index in range(len(self._groups)):
            idle = 0 if own is None else own.idle(index)
            others = sum(
                min(account.idle(index), account.borrowed(index))
                for name, account in self._accounts.items()
                if name != tenant
            )
            unclaimed = self._unclaimed(tenant, index) + idle + others
            own_room = min(self._below_limit(tenant, index), self._not_held(tenant, index))
            counts.append(max(0, min(unclaimed, own_room + idle)))
        return tuple(counts)

    def has_room(self, tenant: TenantId, counts: Sequence[int]) -> bool:
        """Whether the tenant could take so many units of each group, all of them, after eviction
        of all that may be evicted for it."""
        if not self.is_below_limit(tenant, counts):
            return False
        # Caches are asked, which takes time, only where what is free does not do.
        ways = (self.available, self.obtainable)
        return any(all(map(le, counts, way(tenant))) for way in ways)

    def is_below_limit(self, tenant: TenantId, counts: Sequence[int]) -> bool:
        """Whether so many more units of each group are within the tenant's limit, once all that is
        idle of its own is evicted."""
        account = self._accounts.get(tenant)
        if account is None or account.share.limit_bytes == UNLIMITED:
            return True
        held = self._bytes(account.used) + self._bytes(account.beside) + self._bytes(counts)
        if held <= account.share.limit_bytes:
            return True
        idle = map(account.idle, range(len(self._groups)))
        return held - self._bytes(idle) <= account.share.limit_bytes

    def capacity(self, tenant: TenantId) -> tuple[int, ...]:
        """Most units per group that the tenant could ever hold under the shares of now."""
        limit, own = self.share(tenant).limit_bytes, self._accounts.get(tenant)
        counts = []
        for index, group in enumerate(self._groups):
            floors = [a.floors[index] for name, a in self._accounts.items() if name != tenant]
            # What is claimed in whole chunks can be almost a chunk more than the floor.
            left = group.total - sum(floor + self._chunk - 1 for floor in floors if floor)
            covered = 0 if own is None else min(own.floors[index], group.total - sum(floors))
            counts.append(max(0, min(max(left, covered), limit // max(1, group.unit_bytes))))
        return tuple(counts)

    def floor_left(self, tenant: TenantId) -> tuple[int, ...]:
        """Units per group that the tenant's floor still claims."""
        account = self._accounts.get(tenant)
        groups = range(len(self._groups))
        return tuple(0 if account is None else account.unfilled(group) for group in groups)

    def is_at_limit(self, tenant: TenantId) -> bool:
        """Whether the limit leaves no unit of some group."""
        return any(self._below_limit(tenant, group) < 1 for group in range(len(self._groups)))

    def take(self, tenant: TenantId, group: int, count: int) -> bool:
        """Count so many more as the tenant's. False, and nothing changed: not without eviction."""
        if count > self.available_in(tenant, group):
            return False
        self._move(tenant, group, count)
        return True

    def give_back(self, tenant: TenantId, group: int, count: int) -> None:
        """Raises: ValueError when the tenant does not hold so many."""
        if not 0 <= count <= self.used(tenant)[group]:
            raise ValueError(f"{tenant} gives back {count} units of {self.used(tenant)[group]}")
        self._move(tenant, group, -count)

    def take_beside(self, tenant: TenantId, group: int, count: int) -> bool:
        """Count units' worth of memory that is beside the tier's own: against the limit, and never
        more than the tier has. False, and nothing changed: it is too much. Negative: give back."""
        room = min(self._not_held(tenant, group), self._below_limit(tenant, group))
        if count > 0 and count > room:
            return False
        account = self._account(tenant)
        if account.beside[group] + count < 0:
            raise ValueError(f"{tenant} gives back {-count} of {account.beside[group]} beside")
        account.beside[group] += count
        return True

    def reclaim(self, tenant: TenantId, group: int, count: int) -> int:
        """Evict up to `count` idle units so that the tenant may take more; returns how many came
        free, 0 when nothing may be evicted.

        Evicted is what is its own, and of others what is above their floors: always from who
        borrows most for its weight, until the next one borrows as much. At its limit only its own.
        """
        is_at_limit = self._below_limit(tenant, group) < count
        eligible = {tenant} if is_at_limit else set(self._accounts)
        freed = 0
        while freed < count:
            victims = self._victims(tenant, group, count - freed, eligible)
            if not victims:
                break
            level, _, name = victims[0]
            account, next_level = self._accounts[name], victims[1][0] if victims[1:] else 0.0
            most = self._evictable(account, group, is_own=name == tenant)
            until_level = max(1, int((level - next_level) * account.share.weight))
            before = self._groups[group].free
            if account.cache is not None:
                account.cache.evict(group, min(most, count - freed, until_level))
            came_free = self._groups[group].free - before
            if came_free < 1:
                eligible.discard(name)
            freed += came_free
        return freed

    def _victims(
        self, tenant: TenantId, group: int, count: int, eligible: Set[TenantId]
    ) -> list[tuple[float, bool, TenantId]]:
        """Whose idle units may be evicted for the tenant, who wants so many, in their order."""
        victims = [
            (self._level(account, group, count if name == tenant else 0), name == tenant, name)
            for name, account in self._accounts.items()
            if name in eligible and self._evictable(account, group, is_own=name == tenant) > 0
        ]
        return sorted(victims, reverse=True)

    def level(self, tenant: TenantId, group: int) -> float:
        """What the tenant borrows of the group for its weight, in units."""
        account = self._accounts.get(tenant)
        return 0.0 if account is None else self._level(account, group)

    def borrowed(self, tenant: TenantId) -> tuple[int, ...]:
        """Units per group above the floor."""
        account = self._accounts.get(tenant)
        groups = range(len(self._groups))
        return tuple(0 if account is None else account.borrowed(group) for group in groups)

    def use(self, tenant: TenantId) -> TierUse:
        account = self._accounts.get(tenant) or self._empty()
        return TierUse(
            share=account.share,
            used_bytes=self._bytes(account.used) + self._bytes(account.beside),
            borrowed_bytes=self._bytes(map(account.borrowed, range(len(self._groups)))),
            idle_bytes=self._bytes(map(account.idle, range(len(self._groups)))),
        )

    def check(self) -> None:
        """Assert that the books are exact: what all tenants hold and what is free is everything,
        and what floors claim is what they lack."""
        for index, group in enumerate(self._groups):
            accounts = self._accounts.values()
            assert sum(account.used[index] for account in accounts) + group.free == group.total
            assert 0 <= group.free <= group.total
            unfilled = [account.unfilled(index) for account in accounts]
            assert sum(unfilled) == group.unfilled
            assert sum(map(self._chunks, unfilled)) == group.unfilled_chunks
        for account in self._accounts.values():
            assert min((*account.used, *account.beside)) >= 0

    def _evict_above_limit(self, tenant: TenantId) -> None:
        for group in range(len(self._groups)):
            over = -self._below_limit(tenant, group)
            if over > 0:
                self.reclaim(tenant, group, over)

    def _account(self, tenant: TenantId) -> _Account:
        if tenant not in self._accounts:
            self._accounts[tenant] = self._empty()
        return self._accounts[tenant]

    def _empty(self) -> _Account:
        none = [0] * len(self._groups)
        return _Account(none, list(none), list(none))

    def _move(self, tenant: TenantId, index: int, count: int) -> None:
        account, group = self._account(tenant), self._groups[index]
        before = account.unfilled(index)
        account.used[index] += count
        after = account.unfilled(index)
        group.free -= count
        group.unfilled += after - before
        group.unfilled_chunks += self._chunks(after) - self._chunks(before)

    def _count_floors(self, account: _Account, sign: int) -> None:
        for index, group in enumerate(self._groups):
            group.unfilled += sign * account.unfilled(index)
            group.unfilled_chunks += sign * self._chunks(account.unfilled(index))

    def _floors(self, share: TierShare) -> list[int]:
        total_bytes = max(1, self.total_bytes)
        floor_bytes = min(share.floor_bytes, share.limit_bytes, total_bytes)
        return [group.total * floor_bytes // total_bytes for group in self._groups]

    def _chunks(self, count: int) -> int:
        return -(-count // self._chunk)

    def _chunks_of_others(self, tenant: TenantId, index: int) -> int:
        account, group = self._accounts.get(tenant), self._groups[index]
        own = 0 if account is None else self._chunks(account.unfilled(index))
        return group.unfilled_chunks - own

    def _unclaimed(self, tenant: TenantId, index: int) -> int:
        """Free units that no other tenant's floor claims."""
        account, group = self._accounts.get(tenant), self._groups[index]
        own = 0 if account is None else account.unfilled(index)
        chunks = self._chunks_of_others(tenant, index)
        in_units = group.free - (group.unfilled - own)
        # Floors are claimed in whole chunks, so that those who need whole ones find them; but not
        # to the cost of another floor.
        in_chunks = group.free - self._chunk * chunks
        return max(min(in_units, in_chunks), min(in_units, own))

    def _below_limit(self, tenant: TenantId, index: int) -> int:
        account = self._accounts.get(tenant)
        if account is None or account.share.limit_bytes == UNLIMITED:
            return UNLIMITED
        held = self._bytes(account.used) + self._bytes(account.beside)
        return (account.share.limit_bytes - held) // max(1, self._groups[index].unit_bytes)

    def _not_held(self, tenant: TenantId, index: int) -> int:
        """What the tier has beyond what the tenant holds of it and beside it."""
        account, total = self._accounts.get(tenant), self._groups[index].total
        return total if account is None else total - account.used[index] - account.beside[index]

    def _evictable(self, account: _Account, group: int, *, is_own: bool) -> int:
        idle = account.idle(group)
        return idle if is_own else min(idle, account.borrowed(group))

    def _level(self, account: _Account, group: int, more: int = 0) -> float:
        return max(0, account.used[group] + more - account.floors[group]) / account.share.weight

    def _bytes(self, counts: Iterable[int]) -> int:
        return sum(
            count * group.unit_bytes for count, group in zip(counts, self._groups, strict=True)
        )
