"""Whatever tenants take, give back, keep for later and are allowed, the books of a tier are exact,
nobody gets over its limit, and no floor loses a unit.

The machine runs against a model that counts every unit by itself. `BROKEN` has one fault a path,
and each is found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvcluster.cache.tier import TierLedger, TierShare
from kvcluster.tenancy.limits import UNLIMITED
from kvcluster.types import TenantId

TENANTS = tuple(map(TenantId, ("red", "blue", "green", "grey")))
TOTALS, UNIT_BYTES = (40, 24), (3, 7)
TOTAL_BYTES = sum(total * size for total, size in zip(TOTALS, UNIT_BYTES, strict=True))
GROUPS = range(len(TOTALS))
OPERATIONS = 50
"""Of each example."""


@dataclass
class KeptUnits:
    """A tenant's cache: some of its units, which it can do without."""

    ledger: TierLedger
    tenant: TenantId
    units: list[int] = field(default_factory=lambda: [0] * len(TOTALS))
    num_evicted: int = 0

    def idle_units(self) -> Sequence[int]:
        return self.units

    def evict(self, group: int, count: int) -> None:
        assert 0 < count <= self.units[group]
        self.units[group] -= count
        self.num_evicted += count
        self.ledger.give_back(self.tenant, group, count)


class TierMachine(RuleBasedStateMachine):
    """`held` and `kept`: the units of each tenant that are in use, and that are not."""

    ledger_class: type[TierLedger] = TierLedger
    operations: ClassVar[list[int]] = [0]
    """How many were done, each followed by all checks."""

    @initialize(chunk=st.sampled_from([1, 1, 4, 8]))
    def build(self, chunk: int) -> None:
        self.ledger = self.ledger_class(TOTALS, unit_bytes=UNIT_BYTES, chunk=chunk)
        self.held = {tenant: [0] * len(TOTALS) for tenant in TENANTS}
        self.beside = {tenant: [0] * len(TOTALS) for tenant in TENANTS}
        self.kept = {tenant: KeptUnits(self.ledger, tenant) for tenant in TENANTS}
        self.shares: dict[TenantId, TierShare] = {}
        for tenant, kept in self.kept.items():
            self.ledger.plug(tenant, kept)
        self.lacking = [0] * len(TOTALS)

    @rule(tenant=st.sampled_from(TENANTS), group=st.sampled_from(GROUPS), count=st.integers(1, 12))
    def take(self, tenant: TenantId, group: int, count: int) -> None:
        """A request of the tenant grows."""
        before = self.everything(tenant, group)
        room = self.ledger.available(tenant)[group]
        took = self.ledger.take(tenant, group, count)
        assert took == (count <= room)
        if took:
            self.held[tenant][group] += count
            assert self.is_within(tenant)
        # What a floor promises is there, whatever others hold.
        if not self.lacking[group]:
            assert took or count > self.promised(tenant, group, before)

    @rule(tenant=st.sampled_from(TENANTS), group=st.sampled_from(GROUPS), data=st.integers(0, 999))
    def release(self, tenant: TenantId, group: int, data: int) -> None:
        count = data % (self.held[tenant][group] + 1)
        self.ledger.give_back(tenant, group, count)
        self.held[tenant][group] -= count

    @rule(tenant=st.sampled_from(TENANTS), group=st.sampled_from(GROUPS), data=st.integers(0, 999))
    def cache(self, tenant: TenantId, group: int, data: int) -> None:
        """A request ends, and its units stay for the next one."""
        count = data % (self.held[tenant][group] + 1)
        self.held[tenant][group] -= count
        self.kept[tenant].units[group] += count

    @rule(tenant=st.sampled_from(TENANTS), group=st.sampled_from(GROUPS), data=st.integers(0, 999))
    def evict(self, tenant: TenantId, group: int, data: int) -> None:
        """The tenant's cache is purged in part."""
        count = data % (self.kept[tenant].units[group] + 1)
        if count:
            self.kept[tenant].evict(group, count)

    @rule(tenant=st.sampled_from(TENANTS), group=st.sampled_from(GROUPS), count=st.integers(1, 30))
    def reclaim(self, tenant: TenantId, group: int, count: int) -> None:
        """A request of the tenant finds no room: others, and its own cache, give some."""
        obtainable = self.ledger.obtainable(tenant)[group]
        used = {name: self.everything(name, group) for name in TENANTS}
        floors = {name: self.floor(name, group) for name in TENANTS}
        free = self.free(group)
        freed = self.ledger.reclaim(tenant, group, count)

        assert freed == self.free(group) - free <= count
        for other in set(TENANTS) - {tenant}:
            lost = used[other] - self.everything(other, group)
            assert lost == 0 or self.everything(other, group) >= floors[other]
        if count <= obtainable <= self.ledger.available(tenant)[group] + count:
            while self.ledger.available(tenant)[group] < count:
                assert self.ledger.reclaim(tenant, group, count), "it said that it could be had"

    @rule(tenant=st.sampled_from(TENANTS), group=st.sampled_from(GROUPS), count=st.integers(-9, 9))
    def keep_beside(self, tenant: TenantId, group: int, count: int) -> None:
        count = max(count, -self.beside[tenant][group])
        if self.ledger.take_beside(tenant, group, count):
            self.beside[tenant][group] += count
            assert count <= 0 or self.is_within(tenant)
        else:
            assert count > 0

    @rule(
        floors=st.tuples(*(st.sampled_from([0, 20, 60, 90]) for _ in TENANTS)),
        limits=st.tuples(*(st.sampled_from([0, 60, 120, UNLIMITED, UNLIMITED]) for _ in TENANTS)),
        weight=st.integers(1, 4),
    )
    def change(self, floors: Sequence[int], limits: Sequence[int], weight: int) -> None:
        """An operator changes the shares of all; the last tenant has none."""
        self.shares = {
            tenant: TierShare(floor_bytes=min(floor, limit), limit_bytes=limit, weight=weight)
            for tenant, floor, limit in zip(TENANTS[:-1], floors, limits, strict=False)
        }
        self.ledger.apply(self.shares)
        self.lacking = self.lacking_now()
        for tenant in TENANTS:
            has_kept = any(self.kept[tenant].units)
            assert self.is_within(tenant) or not has_kept, "what is idle is evicted at once"

    @invariant()
    def books_are_exact(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.operations[0] += 1
        self.ledger.check()
        for tenant in TENANTS:
            used = tuple(self.everything(tenant, group) for group in GROUPS)
            assert self.ledger.used(tenant) == used
            use, idle = self.ledger.use(tenant), self.kept[tenant].units
            assert use.used_bytes == in_bytes(used) + in_bytes(self.beside[tenant])
            assert use.idle_bytes == in_bytes(idle)
            over = [max(0, used[group] - self.floor(tenant, group)) for group in GROUPS]
            assert use.borrowed_bytes == in_bytes(over)

    @invariant()
    def no_floor_loses_a_unit(self) -> None:
        if not hasattr(self, "ledger"):
            return
        now = self.lacking_now()
        # Less is there than was promised only after a change of shares.
        assert all(less <= before for less, before in zip(now, self.lacking, strict=True))
        self.lacking = now

    def everything(self, tenant: TenantId, group: int) -> int:
        return self.held[tenant][group] + self.kept[tenant].units[group]

    def free(self, group: int) -> int:
        return TOTALS[group] - sum(self.everything(tenant, group) for tenant in TENANTS)

    def floor(self, tenant: TenantId, group: int) -> int:
        share = self.shares.get(tenant, TierShare())
        return TOTALS[group] * share.floor_bytes // TOTAL_BYTES

    def promised(self, tenant: TenantId, group: int, used: int) -> int:
        """Units that are the tenant's whatever others do, as far as its limit allows."""
        share = self.shares.get(tenant, TierShare())
        left = (
            share.limit_bytes - in_bytes(self.ledger.used(tenant)) - in_bytes(self.beside[tenant])
        )
        beyond = TOTALS[group] - used - self.beside[tenant][group]
        return min(self.floor(tenant, group) - used, left // UNIT_BYTES[group], beyond)

    def lacking_now(self) -> list[int]:
        """By group, units that floors promise and that are not free."""
        unfilled = [
            sum(max(0, self.floor(t, group) - self.everything(t, group)) for t in TENANTS)
            for group in GROUPS
        ]
        return [max(0, unfilled[group] - self.free(group)) for group in GROUPS]

    def is_within(self, tenant: TenantId) -> bool:
        share = self.shares.get(tenant, TierShare())
        held = [self.everything(tenant, group) + self.beside[tenant][group] for group in GROUPS]
        return in_bytes(held) <= share.limit_bytes


def in_bytes(units: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(units, UNIT_BYTES, strict=True))


def run(machine: type[TierMachine], *, examples: int, seconds_matter: bool = True) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=OPERATIONS,
            deadline=None,
            database=None,
            derandomize=True,
            # A fault that is there on purpose need not be made small.
            phases=[Phase.generate, Phase.shrink] if seconds_matter else [Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def counted(operations: int) -> int:
    """How many operations a run of about so many did."""
    machine = type("Counted", (TierMachine,), {"operations": [0]})
    run(machine, examples=operations // OPERATIONS + operations // 1000)
    return machine.operations[0]


def test_ten_thousand_operations_leave_exact_books_and_every_floor() -> None:
    assert counted(10_000) >= 10_000


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_hundred_thousand_operations_leave_exact_books_and_every_floor() -> None:
    assert counted(100_000) >= 100_000


class TakesFromFloors(TierLedger):
    """Sees what is free, not what is promised."""

    def _unclaimed(self, tenant: TenantId, index: int) -> int:
        return self._groups[index].free


class ForgetsLimits(TierLedger):
    def _below_limit(self, tenant: TenantId, index: int) -> int:
        return UNLIMITED


class EvictsBelowFloors(TierLedger):
    """Takes all that is idle from anyone."""

    def _evictable(self, account: object, group: int, *, is_own: bool) -> int:
        return super()._evictable(account, group, is_own=True)  # type: ignore[arg-type]


class GivesBackTooLittle(TierLedger):
    def give_back(self, tenant: TenantId, group: int, count: int) -> None:
        super().give_back(tenant, group, count - (count > 5))


class ForgetsWhatIsBeside(TierLedger):
    """Counts what is kept beside the units as nothing."""

    def take_beside(self, tenant: TenantId, group: int, count: int) -> bool:
        return True


class KeepsOldFloors(TierLedger):
    """An operator's change reaches limits and weights alone."""

    def _floors(self, share: TierShare) -> list[int]:
        return [0] * len(self._groups)


class KeepsWhatIsAboveLimits(TierLedger):
    def _evict_above_limit(self, tenant: TenantId) -> None:
        pass


class PromisesTooMuch(TierLedger):
    """Says that it can evict what is in use."""

    def obtainable(self, tenant: TenantId) -> tuple[int, ...]:
        return tuple(group.total for group in self._groups)


BROKEN: Mapping[str, type[TierLedger]] = {
    broken.__name__: broken
    for broken in (
        TakesFromFloors,
        ForgetsLimits,
        EvictsBelowFloors,
        GivesBackTooLittle,
        ForgetsWhatIsBeside,
        KeepsOldFloors,
        KeepsWhatIsAboveLimits,
        PromisesTooMuch,
    )
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_machine_finds_a_ledger_that_is_wrong_in_one_path(name: str) -> None:
    machine = type(name, (TierMachine,), {"ledger_class": BROKEN[name]})

    with pytest.raises(AssertionError):
        run(machine, examples=800, seconds_matter=False)
