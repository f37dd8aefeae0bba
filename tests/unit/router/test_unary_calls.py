"""Calls that are answered once: a tenant has so many at a time, and takes nothing from others."""

import asyncio
from pathlib import Path

import pytest

from kvcluster.client import Client
from kvcluster.errors import QuotaExceeded
from tests.unit.router.administering import administered
from tests.unit.router.fake_backend import FakeBackend


async def test_more_at_once_are_refused_and_others_are_answered(tmp_path: Path) -> None:
    backend = FakeBackend()
    async with administered(tmp_path / "tenants.sqlite", backend, max_unary_calls=2) as admin:
        for name in ("red", "blue"):
            await admin.create(name)
        red, blue = [await admin.key(name) for name in ("red", "blue")]
        backend.gate.clear()
        async with (
            Client(admin.door.address, api_key=red) as client,
            Client(admin.door.address, api_key=blue) as other,
        ):
            counting = [asyncio.create_task(client.count_tokens(prompt="hello")) for _ in range(2)]
            async with asyncio.timeout(10):
                while backend.num_counting < 2:
                    await asyncio.sleep(0)

            with pytest.raises(QuotaExceeded) as refused:
                await client.count_tokens(prompt="hello")
            of_other = asyncio.create_task(other.count_tokens(prompt="hello"))
            backend.gate.set()

            assert refused.value.metadata == {"quota": "unary_calls", "used": "2", "limit": "2"}
            assert refused.value.retry_after_s is not None
            assert await of_other == await client.count_tokens(prompt="hello")
            assert len(await asyncio.gather(*counting)) == 2
