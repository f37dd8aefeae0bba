"""What tests of the `Backend` share: an engine behind it, on a fake ring that answers at once."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from kvcluster.engine.api import (
    GenerationEvent,
    Output,
    TokenChunk,
)
from kvcluster.engine.plan import StepPlan, StepResult
from kvcluster.engine.service import EngineService
from kvcluster.types import DEFAULT_TENANT, GenerationId, TenantId
from tests.fake_engine import (
    FakeCluster,
    packed,
    request,
    sampling,
)
from tests.fake_ring import expected_output

PROMPT = list(range(1, 21))
BLUE = TenantId("blue")


@dataclass
class RingExecutor:
    """Answers each step after one turn of the event loop, while `gate` is open."""

    fake: FakeCluster
    gate: asyncio.Event

    async def execute(self, plan: StepPlan) -> StepResult:
        result = self.fake.ring.execute(plan)
        await self.gate.wait()
        await asyncio.sleep(0)
        return result


@dataclass
class Served:
    fake: FakeCluster
    service: EngineService
    gate: asyncio.Event

    async def open(self, max_output_tokens: int = 4, **fields: object) -> GenerationId:
        return (await self.service.open(request(max_output_tokens, **fields))).generation

    async def retry(self, max_output_tokens: int = 4) -> int:
        """The number of one more upload for the request_id "r"."""
        return (await self.service.open(request(max_output_tokens, request_id="r"))).upload

    async def send(
        self, generation: GenerationId, ids: list[int], offset: int = 0, *, upload: int = 0
    ) -> None:
        await self.service.append_prompt(generation, upload, TokenChunk(offset, packed(ids)))

    async def resend(self, generation: GenerationId, ids: list[int], upload: int) -> None:
        """All of a retry's prompt."""
        await self.send(generation, ids, upload=upload)
        await self.service.finish_prompt(generation, upload)

    async def start(
        self, prompt: list[int], max_output_tokens: int = 4, **fields: object
    ) -> GenerationId:
        generation = await self.open(max_output_tokens, **fields)
        await self.send(generation, prompt)
        await self.service.finish_prompt(generation, 0)
        return generation

    async def read(
        self, generation: GenerationId, after: int = 0, *, tenant: TenantId = DEFAULT_TENANT
    ) -> list[GenerationEvent]:
        batches = self.service.watch(tenant, generation, after)
        return [event async for batch in batches for event in batch]

    async def output(
        self, generation: GenerationId, *, tenant: TenantId = DEFAULT_TENANT
    ) -> list[int]:
        events = [event.event for event in await self.read(generation, tenant=tenant)]
        return [token for event in events if isinstance(event, Output) for token in event.token_ids]

    def expected(self, prompt: list[int], max_output_tokens: int = 4) -> list[int]:
        return expected_output(
            prompt, sampling(), max_output_tokens=max_output_tokens, spec=self.fake.spec
        )

    async def settled(self) -> None:
        """Wait until nothing is unfinished or in flight."""
        async with asyncio.timeout(5):
            await self.service._driver.wait_idle()


async def serve(fake: FakeCluster, *, feeder_silence_s: float = 60.0) -> AsyncIterator[Served]:
    gate = asyncio.Event()
    gate.set()
    executor = RingExecutor(fake, gate)
    service = EngineService(
        fake.engine, executor, nodes=["a", "b"], feeder_silence_s=feeder_silence_s
    )
    service.start()
    yield Served(fake, service, gate)
    gate.set()
    await service.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}
