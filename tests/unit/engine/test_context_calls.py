"""Contexts as calls of many sizes and of tenants with settings of their own see them."""

import asyncio

from kvcluster.tenancy.limits import TenantLimits
from kvcluster.types import DEFAULT_TENANT
from tests.unit.engine.serving import Served
from tests.unit.engine.test_contexts import served, uploaded

__all__ = ["served"]


async def test_a_long_list_holds_nobody_up(served: Served) -> None:
    for number in range(5):
        await uploaded(served, f"book-{number}", tokens=[1, 2, 3])
    turns, task = 0, asyncio.create_task(served.service.list_contexts(DEFAULT_TENANT))
    while not task.done():
        turns += 1
        await asyncio.sleep(0)

    assert len(await task) == 5
    assert turns >= 5


async def test_a_fork_has_its_parents_policy_whatever_the_tenants_default_is(
    served: Served,
) -> None:
    await uploaded(served, policy="half")
    limits = TenantLimits(default_policy="snap:budget=0.5,epoch=8,queries=1")
    record = await served.service.fork_context(DEFAULT_TENANT, "book", "copy", 0, limits)

    assert record.policy == "half"
