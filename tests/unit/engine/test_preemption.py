"""Whose blocks a running request gets that found none (one rank of 32 blocks, counted by bytes)."""

from collections.abc import Mapping

from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.block_table import BlockTable
from kvcluster.cache.partitions import CachePartitions
from kvcluster.cache.tier import TierShare
from kvcluster.engine.preemption import is_hopeless, victim
from kvcluster.engine.request import Request
from kvcluster.types import GenerationId, Policy, Rank, TenantId
from tests.fake_engine import request

RED, BLUE, GREEN = TenantId("red"), TenantId("blue"), TenantId("green")


def of(tenant: TenantId, arrival: int, *, priority: int = 0) -> Request:
    spec = request(tenant=tenant, priority=priority)
    return Request(GenerationId(f"{tenant}-{arrival}"), spec, Policy(), arrival)


def partitions(
    held: Mapping[TenantId, int],
    shares: Mapping[TenantId, TierShare] | None = None,
) -> CachePartitions:
    """Tenants that hold so many blocks. The shares are given afterwards."""
    made = CachePartitions([[BlockPool(32)]], block_bytes=[1], encoded_per_page=lambda _: [8])
    for tenant, count in held.items():
        table = BlockTable(1)
        for _ in range(count):
            assert made.of(tenant).append(table, Rank(0)) is not None
    made.apply(shares or {})
    return made


def test_of_one_tenant_the_last_in_order_leaves() -> None:
    running = [of(RED, 1), of(RED, 2), of(RED, 3, priority=4)]
    books = partitions({RED: 32})

    assert victim(running[0], running, books) is running[1]
    assert victim(running[2], running, books) is running[1]
    assert victim(running[1], running, books) is None


def test_of_another_tenant_a_later_one_leaves_where_that_tenant_has_borrowed() -> None:
    running = [of(RED, 1), of(BLUE, 2)]

    assert victim(running[0], running, partitions({RED: 16, BLUE: 16})) is running[1]
    covered = partitions({RED: 16, BLUE: 16}, {BLUE: TierShare(floor_bytes=16)})
    assert victim(running[0], running, covered) is None


def test_an_earlier_one_stays_unless_a_floor_is_owed() -> None:
    running = [of(RED, 1), of(BLUE, 2)]

    assert victim(running[1], running, partitions({RED: 24, BLUE: 8})) is None
    owed = partitions({RED: 24, BLUE: 8}, {BLUE: TierShare(floor_bytes=16)})
    assert victim(running[1], running, owed) is running[0]


def test_who_borrows_most_for_its_weight_gives_first() -> None:
    running = [of(RED, 1), of(BLUE, 2), of(GREEN, 3)]
    held = {RED: 8, BLUE: 16, GREEN: 8}

    assert victim(running[0], running, partitions(held)) is running[1]
    heavy = partitions(held, {BLUE: TierShare(weight=4)})
    assert victim(running[0], running, heavy) is running[2]


def test_priority_within_one_tenant_moves_nothing_between_tenants() -> None:
    """Blue's urgent request takes the place of blue's other one, which came before red's."""
    running = [of(BLUE, 1), of(RED, 2), of(BLUE, 3, priority=9)]
    books = partitions({RED: 16, BLUE: 16})

    assert victim(running[2], running, books) is running[1]
    assert victim(running[1], running, books) is running[0]


def test_at_its_limit_a_tenant_makes_room_for_itself_or_is_told() -> None:
    running = [of(RED, 1), of(BLUE, 2)]
    books = partitions({RED: 8, BLUE: 8}, {RED: TierShare(limit_bytes=8)})

    assert victim(running[0], running, books) is None
    assert is_hopeless(running[0], running, books)
    assert not is_hopeless(running[0], [*running, of(RED, 3)], books)


def test_while_another_has_borrowed_there_is_hope() -> None:
    running = [of(RED, 1), of(BLUE, 2)]

    assert not is_hopeless(running[1], running, partitions({RED: 24, BLUE: 8}))
    assert is_hopeless(running[1], running[1:], partitions({BLUE: 32}))
