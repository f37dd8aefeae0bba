"""Each limit of a tenant, refused through the real ports of a real engine: at once, typed, with
what is used and allowed, and with nothing taken."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from grpc import aio

from kvcluster.client import Client
from kvcluster.engine.api import Admitted
from kvcluster.errors import KvClusterError
from kvcluster.rpc.v1 import inference_service_pb2 as pb_inference
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.rpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.attacks.attacked import real_engine
from tests.unit.router.administering import Administered, administered, bearer
from tests.unit.router.serving import refusal_of, setup

REFUSED_WITHIN_S = 1.0
"""Nothing is waited for: a refusal takes a millisecond or two on an idle machine."""


@pytest.fixture
async def admin(tmp_path: Path) -> AsyncIterator[Administered]:
    async with (
        real_engine() as engine,
        administered(tmp_path / "tenants.sqlite", engine) as found,
    ):
        yield found


class Limit(NamedTuple):
    """What a tenant is given, and how it asks for one more than that."""

    limits: dict[str, Any]
    num_open: int = 0
    """Requests that are there already, their prompts still to come."""
    request: Mapping[str, Any] = MappingProxyType({})
    reason: str = "TENANT_QUOTA_EXCEEDED"
    metadata: Mapping[str, str] = MappingProxyType({})


LIMITS = {
    "open_streams": Limit(
        {"open_streams": 1},
        num_open=1,
        metadata={"quota": "open_streams", "used": "1", "limit": "1"},
    ),
    "concurrent_generations": Limit(
        {"concurrent_generations": 2, "queued_generations": 0},
        num_open=2,
        metadata={"quota": "concurrent_generations", "used": "2", "limit": "2"},
    ),
    "queued_generations": Limit(
        {"concurrent_generations": 1, "queued_generations": 2},
        num_open=3,
        metadata={"quota": "queued_generations", "used": "2", "limit": "2"},
    ),
    "input_tokens_per_minute": Limit(
        {"input_tokens_per_minute": 30},
        request={"input_tokens": 31},
        metadata={"quota": "input_tokens_per_minute", "used": "0", "limit": "30"},
    ),
    "output_tokens_per_minute": Limit(
        {"output_tokens_per_minute": 30},
        num_open=1,
        request={"max_output_tokens": 30},
        metadata={"quota": "output_tokens_per_minute", "used": "1", "limit": "30"},
    ),
    "max_context_tokens": Limit(
        {"max_context_tokens": 30},
        request={"input_tokens": 25, "max_output_tokens": 6},
        reason="CONTEXT_TOO_LONG",
        metadata={"over_tokens": "1", "limit_tokens": "30"},
    ),
    "max_priority": Limit(
        {"max_priority": 3},
        request={"priority": 4},
        metadata={"quota": "max_priority", "used": "4", "limit": "3"},
    ),
    "allowed_policies": Limit(
        {"allowed_policies": ["exact"]},
        request={"policy": "window:recent=64"},
        reason="PERMISSION_DENIED",
        metadata={"allowed": "exact"},
    ),
}


@asynccontextmanager
async def opened(
    admin: Administered, secret: str, count: int
) -> AsyncIterator[InferenceServiceStub]:
    """With so many generations that are admitted and wait for their prompts."""
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(aio.insecure_channel(admin.door.address))
        stub = InferenceServiceStub(channel)
        for _ in range(count):
            call = stub.StreamGenerate(metadata=bearer(secret))
            stack.callback(call.cancel)
            await call.write(setup(model="", max_output_tokens=1))
            assert (await call.read()).WhichOneof("event") == "admitted"
        yield stub


@pytest.mark.parametrize("name", LIMITS)
async def test_one_more_than_the_limit_is_refused_with_what_is_used_and_allowed(
    name: str, admin: Administered
) -> None:
    limit = LIMITS[name]
    await admin.create("red", **limit.limits)
    secret = await admin.key("red")
    async with opened(admin, secret, limit.num_open) as stub:
        before = await usage_of(admin)
        call = stub.StreamGenerate(metadata=bearer(secret))
        asked = setup(**{"model": "", "max_output_tokens": 1, **limit.request})
        async with asyncio.timeout(REFUSED_WITHIN_S):
            refusal = await refusal_of(first_answer(call, asked))
        after = await usage_of(admin)

    assert refusal.reason == limit.reason
    assert limit.metadata.items() <= refusal.metadata.items(), refusal.metadata
    assert taken(after) == taken(before)


@pytest.mark.parametrize("name", [name for name in LIMITS if name != "allowed_policies"])
async def test_up_to_the_limit_is_served(name: str, admin: Administered) -> None:
    """The refusals of the test above are the limit's, and no other's."""
    limit = LIMITS[name]
    await admin.create("red", **limit.limits)
    most = {
        "input_tokens": {"input_tokens": 8},
        "max_output_tokens": {"max_output_tokens": 2},
        "priority": {"priority": 3},
    }
    request = {key: value for asked in limit.request for key, value in most[asked].items()}
    async with opened(admin, await admin.key("red"), max(0, limit.num_open - 1)) as stub:
        call = stub.StreamGenerate(metadata=bearer(await admin.key("red")))
        await call.write(setup(**{"model": "", "max_output_tokens": 1, **request}))

        assert (await call.read()).WhichOneof("event") == "admitted"
        call.cancel()


async def first_answer(
    call: aio.StreamStreamCall, asked: pb_inference.StreamGenerateRequest
) -> None:
    # What is refused at once may be refused before the request is out.
    with suppress(aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(asked)
    await call.read()


async def usage_of(admin: Administered) -> pb.TenantUsage:
    request = pb.GetTenantUsageRequest(name="tenants/red/usage")
    return await admin.stub.GetTenantUsage(request, metadata=admin.operator)


def taken(usage: pb.TenantUsage) -> Sequence[int]:
    return (
        usage.running_generations,
        usage.queued_generations,
        usage.open_streams,
        usage.input_tokens_per_minute,
        usage.output_tokens_per_minute,
        usage.gpu.used_bytes,
    )


async def test_more_pinned_bytes_than_allowed_are_refused_before_the_upload(
    admin: Administered,
) -> None:
    await admin.create("red", max_pinned_bytes=100)
    key = await admin.key("red")
    async with Client(admin.door.address, api_key=key) as client:
        for options in ({"pinned": True}, {}):
            upload = client.upload_context(
                "book", prompt_ids=list(range(1, 40)), tenant="red", **options
            )
            if options:
                with pytest.raises(KvClusterError) as refused:
                    await upload
            else:
                await upload
        kept = [context.pinned async for context in client.list_contexts(tenant="red")]

    assert refused.value.reason == "TENANT_QUOTA_EXCEEDED"
    assert refused.value.metadata["quota"] == "max_pinned_bytes"
    assert (refused.value.metadata["used"], refused.value.metadata["limit"]) == ("0", "100")
    assert kept == [False]


async def test_the_default_policy_is_that_of_requests_that_name_none(admin: Administered) -> None:
    await admin.create("red", default_policy="window:recent=64")
    key = await admin.key("red")
    async with Client(admin.door.address, api_key=key) as client:
        policies = [
            event.event.policy
            for given in ("", "exact")
            async for event in client.generate(
                prompt_ids=[1, 2, 3], max_output_tokens=1, policy=given
            )
            if isinstance(event.event, Admitted)
        ]

    assert policies == ["exact + window:recent=64", "exact"]


@pytest.mark.parametrize("weight", [0, 1001])
async def test_a_weight_outside_its_rule_is_refused_where_it_is_given(
    weight: int, admin: Administered
) -> None:
    refusal = await refusal_of(admin.create("red", weight=weight))

    assert (refusal.reason, "limits.weight: want 1 to 1000" in refusal.message) == (
        "INVALID_FIELD",
        True,
    )


def test_every_limit_is_in_this_file() -> None:
    elsewhere = {"weight", "max_pinned_bytes", "default_policy"}

    assert {field.name for field in pb.TenantLimits.DESCRIPTOR.fields} == {*LIMITS, *elsewhere}
    assert {field.name for field in pb_inference.GenerateRequest.DESCRIPTOR.fields} >= {
        "priority",
        "policy",
        "input_tokens",
        "max_output_tokens",
    }
