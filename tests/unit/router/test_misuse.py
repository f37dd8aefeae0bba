"""Two administrators at once, and a request that fails among others: through the real ports."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from kvcluster.client import Client
from kvcluster.engine.api import Output
from kvcluster.errors import KvClusterError
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from tests.attacks.attacked import real_engine
from tests.fake_engine import model_spec, sampling
from tests.fake_ring import expected_output
from tests.unit.router.administering import Administered, administered
from tests.unit.router.serving import read_refusal

NUM_ADMINS = 12
PROMPTS = [[number + 1] * (20 + 5 * number) for number in range(6)]
NUM_TOKENS = 24
WRONG_ID = 1_000_000


@pytest.fixture
async def admin(tmp_path: Path) -> AsyncIterator[Administered]:
    async with (
        real_engine() as engine,
        administered(tmp_path / "tenants.sqlite", engine) as found,
    ):
        yield found


async def test_of_administrators_who_update_at_once_one_wins_and_the_others_are_told(
    admin: Administered,
) -> None:
    etag = (await admin.create("red")).etag

    async def update(number: int) -> str:
        tenant = pb.Tenant(name="tenants/red", etag=etag, display_name=f"by {number}")
        request = pb.UpdateTenantRequest(tenant=tenant)
        request.update_mask.paths.append("display_name")
        try:
            await admin.stub.UpdateTenant(request, metadata=admin.operator)
        except aio.AioRpcError as error:
            return read_refusal(error).reason
        return f"by {number}"

    answers = await asyncio.gather(*map(update, range(NUM_ADMINS)))
    (winner,) = [answer for answer in answers if answer.startswith("by ")]
    events = await admin.stub.ListAuditEvents(
        pb.ListAuditEventsRequest(parent="tenants/red", filter="method=UpdateTenant"),
        metadata=admin.operator,
    )
    report = await admin.stub.VerifyAuditLog(pb.VerifyAuditLogRequest(), metadata=admin.operator)

    assert answers.count("ETAG_MISMATCH") == NUM_ADMINS - 1
    assert (await admin.get("red")).display_name == winner
    assert len(events.audit_events) == 1
    assert report.intact


async def test_a_request_that_fails_among_others_leaves_them_their_own_tokens(
    admin: Administered,
) -> None:
    """One sends an id that is in no vocabulary in the middle of its prompt, one leaves, one is
    late."""
    await admin.create("red")
    key = await admin.key("red")

    async def run(ids: object, **options: Any) -> tuple[list[int], str]:
        """Tokens, and why there are no more."""
        tokens: list[int] = []
        try:
            async with Client(admin.door.address, api_key=key) as client:
                async for each in client.generate(prompt_ids=ids, **options):  # type: ignore[arg-type]
                    if isinstance(each.event, Output):
                        tokens += each.event.token_ids
        except KvClusterError as error:
            return tokens, error.reason
        return tokens, ""

    async def corrupt() -> AsyncIterator[list[int]]:
        yield [7] * 30
        await asyncio.sleep(0)
        yield [WRONG_ID]

    failing = asyncio.gather(
        run(corrupt(), max_output_tokens=4),
        run([8] * 40, max_output_tokens=60_000, timeout_s=0.3),
    )
    leaving = asyncio.ensure_future(run([9] * 40, max_output_tokens=60_000))
    running = asyncio.gather(*(run(ids, max_output_tokens=NUM_TOKENS) for ids in PROMPTS))
    outputs = await running
    leaving.cancel()

    assert [reason for _, reason in await failing] == ["INVALID_FIELD", "DEADLINE_EXCEEDED"]
    spec = model_spec(eos_token_ids=())
    for prompt, (found, reason) in zip(PROMPTS, outputs, strict=True):
        assert reason == ""
        assert found == expected_output(prompt, sampling(), max_output_tokens=NUM_TOKENS, spec=spec)
