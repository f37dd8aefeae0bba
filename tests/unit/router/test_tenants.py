"""Every RPC of TenantService through the real admin port, as operators use it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from kvcluster.client import Client
from kvcluster.engine.api import GenerationState
from kvcluster.router.admin_server import ADMIN_SERVICE_NAME
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from tests.unit.router.administering import (
    ADMIN,
    INFERENCE,
    OPERATOR,
    Administered,
    administered,
    bearer,
)
from tests.unit.router.fake_backend import FakeBackend
from tests.unit.router.serving import refusal_of

Code = grpc.StatusCode
State = pb.Tenant.State
SERVICE = pb.DESCRIPTOR.services_by_name["TenantService"]


@pytest.fixture
async def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def admin(tmp_path: Path, backend: FakeBackend) -> AsyncIterator[Administered]:
    async with administered(tmp_path / "tenants.sqlite", backend) as served:
        yield served


async def test_a_tenant_is_created_with_the_defaults_of_what_is_not_set(
    admin: Administered,
) -> None:
    made = await admin.create("red", concurrent_generations=3)

    assert made == await admin.get("red")
    assert (made.name, made.state, made.key_version) == ("tenants/red", State.STATE_ACTIVE, 1)
    assert made.limits.concurrent_generations == 3
    assert made.limits.queued_generations == 64
    assert not made.limits.HasField("input_tokens_per_minute")
    assert made.partitions.gpu.floor_bytes == 0
    assert abs(made.create_time.seconds - time.time()) < 60


async def test_what_is_only_validated_is_answered_and_not_done(admin: Administered) -> None:
    request = pb.CreateTenantRequest(tenant_id="red", validate_only=True)

    answer = await admin.stub.CreateTenant(request, metadata=admin.operator)

    assert answer.name == "tenants/red"
    refusal = await refusal_of(admin.get("red"))
    assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "RESOURCE_NOT_FOUND")


async def test_tenants_are_listed_by_id_in_pages_and_by_filter(admin: Administered) -> None:
    for number in range(5):
        team = "even" if number % 2 == 0 else "odd"
        request = pb.CreateTenantRequest(
            tenant_id=f"t{number}", tenant=pb.Tenant(labels={"team": team})
        )
        await admin.stub.CreateTenant(request, metadata=admin.operator)

    async def listed(**fields: object) -> list[list[str]]:
        pages, token = [], ""
        while True:
            request = pb.ListTenantsRequest(page_token=token, **fields)
            page = await admin.stub.ListTenants(request, metadata=admin.operator)
            pages.append([tenant.name.removeprefix("tenants/") for tenant in page.tenants])
            token = page.next_page_token
            if not token:
                return pages

    assert await listed() == [["operators", "t0", "t1", "t2", "t3", "t4"]]
    assert await listed(page_size=4) == [["operators", "t0", "t1", "t2"], ["t3", "t4"]]
    assert await listed(page_size=2, filter="labels.team=even") == [["t0", "t2"], ["t4"]]
    assert await listed(filter="state=SUSPENDED") == [[]]
    await admin.stub.DeleteTenant(
        pb.DeleteTenantRequest(name="tenants/t0"), metadata=admin.operator
    )
    assert await listed(filter="labels.team=even") == [["t2", "t4"]]
    assert await listed(filter="state=DELETED", show_deleted=True) == [["t0"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"page_size": -1},
        {"page_token": "not base64!"},
        {"filter": "age<3"},
        {"filter": "state=A OR state=B"},
    ],
)
async def test_a_list_that_cannot_be_made_is_refused(
    fields: dict[str, object], admin: Administered
) -> None:
    for call in (
        admin.stub.ListTenants(pb.ListTenantsRequest(**fields), metadata=admin.operator),
        admin.stub.ListAuditEvents(
            pb.ListAuditEventsRequest(parent="tenants/-", **fields), metadata=admin.operator
        ),
    ):
        refusal = await refusal_of(call)
        assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD")


@pytest.mark.parametrize("token", ["eA==", "LTE=", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5"])
async def test_a_page_token_of_another_list_is_refused(token: str, admin: Administered) -> None:
    request = pb.ListAuditEventsRequest(parent="tenants/-", page_token=token)

    refusal = await refusal_of(admin.stub.ListAuditEvents(request, metadata=admin.operator))

    assert refusal.metadata == {"field": "page_token"}


def updated(mask: list[str] | None, etag: str = "", **fields: object) -> pb.UpdateTenantRequest:
    return pb.UpdateTenantRequest(
        tenant=pb.Tenant(name="tenants/red", etag=etag, **fields),
        update_mask=None if mask is None else FieldMask(paths=mask),
    )


async def test_an_update_changes_what_its_mask_names_and_nothing_else(admin: Administered) -> None:
    before = await admin.create("red", weight=5, max_priority=7)

    after = await admin.stub.UpdateTenant(
        updated(
            ["limits.weight"],
            display_name="ignored",
            limits=pb.TenantLimits(weight=9, max_priority=50),
        ),
        metadata=admin.operator,
    )

    assert (after.limits.weight, after.limits.max_priority) == (9, 7)
    assert after.display_name == ""
    assert after.etag != before.etag


async def test_what_a_mask_names_and_the_message_has_not_gets_its_default(
    admin: Administered,
) -> None:
    await admin.create("red", weight=5, max_priority=7, allowed_policies=["int4"])

    one = await admin.stub.UpdateTenant(updated(["limits.weight"]), metadata=admin.operator)
    assert (one.limits.weight, one.limits.max_priority) == (1, 7)
    all_ = await admin.stub.UpdateTenant(updated(["limits"]), metadata=admin.operator)
    assert (all_.limits.max_priority, list(all_.limits.allowed_policies)) == (0, [])


async def test_without_a_mask_what_is_set_is_changed(admin: Administered) -> None:
    await admin.create("red", weight=5)

    after = await admin.stub.UpdateTenant(
        updated(
            None,
            display_name="Red",
            labels={"a": "b"},
            partitions=pb.Partitions(gpu=pb.TierPartition(floor_bytes=8, limit_bytes=9)),
        ),
        metadata=admin.operator,
    )

    assert (after.display_name, dict(after.labels), after.limits.weight) == ("Red", {"a": "b"}, 5)
    assert (after.partitions.gpu.floor_bytes, after.partitions.gpu.limit_bytes) == (8, 9)
    assert not after.partitions.host.HasField("limit_bytes")


async def test_a_star_replaces_all_that_can_be_changed(admin: Administered) -> None:
    before = await admin.create("red", weight=5)

    after = await admin.stub.UpdateTenant(
        updated(["*"], display_name="Red"), metadata=admin.operator
    )

    assert (after.display_name, after.limits.weight) == ("Red", 1)
    assert (after.uid, after.create_time) == (before.uid, before.create_time)


@pytest.mark.parametrize(
    "path", ["state", "uid", "etag", "name", "labels.a", "limits.age", "", "x"]
)
async def test_a_mask_of_what_cannot_be_changed_is_refused(path: str, admin: Administered) -> None:
    await admin.create("red")

    call = admin.stub.UpdateTenant(updated([path]), metadata=admin.operator)

    assert (await refusal_of(call)).metadata == {"field": "update_mask"}


async def test_of_two_admins_who_update_at_once_one_is_told_to_read_again(
    admin: Administered,
) -> None:
    etag = (await admin.create("red")).etag
    calls = [
        admin.stub.UpdateTenant(
            updated(["display_name"], etag, display_name=name), metadata=admin.operator
        )
        for name in ("one", "two")
    ]

    answers = await asyncio.gather(*calls, return_exceptions=True)

    refused = [answer for answer in answers if isinstance(answer, aio.AioRpcError)]
    assert [error.code() for error in refused] == [Code.ABORTED]
    (won,) = [answer for answer in answers if isinstance(answer, pb.Tenant)]
    assert (await admin.get("red")).display_name == won.display_name


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"weight": 0}, "limits.weight"),
        ({"open_streams": 2**64 - 1}, "limits.open_streams"),
        ({"default_policy": "int5"}, "limits.default_policy"),
        ({"default_policy": "auto: ppl<=1"}, "limits.default_policy"),
        ({"allowed_policies": ["int4", "int5"]}, "limits.allowed_policies"),
    ],
)
async def test_limits_outside_their_rules_are_refused_by_name(
    limits: dict[str, object], field: str, admin: Administered
) -> None:
    refusal = await refusal_of(admin.create("red", **limits))

    assert (refusal.code, refusal.metadata) == (Code.INVALID_ARGUMENT, {"field": field})


async def test_while_no_engine_answers_policies_are_checked_by_their_form_alone(
    admin: Administered, backend: FakeBackend
) -> None:
    backend.status_failure = RuntimeError("gone")

    made = await admin.create("red", default_policy="int5")

    assert made.limits.default_policy == "int5"


@pytest.mark.parametrize("tenant_id", ["", "Red", "r_d", "a/b", "-", "x" * 64, "default"])
async def test_an_id_of_another_form_is_refused(tenant_id: str, admin: Administered) -> None:
    refusal = await refusal_of(admin.create(tenant_id))

    assert refusal.metadata == {"field": "tenant_id"}


async def test_an_id_that_is_taken_is_refused_also_by_the_operators(admin: Administered) -> None:
    await admin.create("red")

    for taken in ("red", "operators"):
        refusal = await refusal_of(admin.create(taken))
        assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "RESOURCE_EXISTS")


async def test_a_tenant_goes_through_its_states(admin: Administered) -> None:
    await admin.create("red")
    steps = [
        (admin.stub.SuspendTenant, pb.SuspendTenantRequest, State.STATE_SUSPENDED),
        (admin.stub.ResumeTenant, pb.ResumeTenantRequest, State.STATE_ACTIVE),
        (admin.stub.DrainTenant, pb.DrainTenantRequest, State.STATE_DRAINING),
        (admin.stub.ResumeTenant, pb.ResumeTenantRequest, State.STATE_ACTIVE),
        (admin.stub.DeleteTenant, pb.DeleteTenantRequest, State.STATE_DELETED),
        (admin.stub.UndeleteTenant, pb.UndeleteTenantRequest, State.STATE_ACTIVE),
    ]

    for rpc, request, state in steps:
        answer = await rpc(request(name="tenants/red"), metadata=admin.operator)
        assert answer.state == state
        assert (await admin.get("red")).state == state

    refusal = await refusal_of(
        admin.stub.ResumeTenant(pb.ResumeTenantRequest(name="tenants/red"), metadata=admin.operator)
    )
    assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "TENANT_STATE_CONFLICT")


async def test_a_deleted_tenant_can_be_undeleted_until_it_is_purged_and_is_not_updated(
    admin: Administered,
) -> None:
    await admin.create("red")

    deleted = await admin.stub.DeleteTenant(
        pb.DeleteTenantRequest(name="tenants/red"), metadata=admin.operator
    )

    assert deleted.key_version == 0
    assert deleted.purge_time.seconds - deleted.delete_time.seconds == 30 * 24 * 3600
    refusal = await refusal_of(
        admin.stub.UpdateTenant(updated(["display_name"]), metadata=admin.operator)
    )
    assert refusal.reason == "TENANT_STATE_CONFLICT"


async def test_a_tenant_with_unfinished_generations_is_deleted_only_by_force(
    admin: Administered, backend: FakeBackend
) -> None:
    await admin.create("red")
    backend.gate.clear()
    async with Client(admin.door.address, api_key=await admin.key("red")) as client:
        events = client.generate(prompt="hello")
        await anext(events)

        refusal = await refusal_of(
            admin.stub.DeleteTenant(
                pb.DeleteTenantRequest(name="tenants/red"), metadata=admin.operator
            )
        )
        await admin.stub.DeleteTenant(
            pb.DeleteTenantRequest(name="tenants/red", force=True), metadata=admin.operator
        )

        assert refusal.metadata == {"unfinished_generations": "1"}
        await backend.until(lambda generation: generation.finished is not None)
        assert backend.generations["g0"].record.state is GenerationState.CANCELLED
        await events.aclose()


async def test_a_data_key_is_rotated_and_erased(admin: Administered) -> None:
    await admin.create("red")

    for erases, version in ((False, 2), (True, 3)):
        request = pb.RotateTenantKeyRequest(name="tenants/red", crypto_erase=erases)
        answer = await admin.stub.RotateTenantKey(request, metadata=admin.operator)
        assert answer.key_version == version


async def test_a_key_is_made_listed_and_revoked_and_its_secret_shown_once(
    admin: Administered,
) -> None:
    await admin.create("red")
    request = pb.CreateApiKeyRequest(
        parent="tenants/red",
        api_key_id="laptop",
        api_key=pb.ApiKey(
            role=ADMIN,
            display_name="on my laptop",
            expire_time=Timestamp(seconds=int(time.time()) + 3600),
        ),
    )

    made = await admin.stub.CreateApiKey(request, metadata=admin.operator)
    await admin.key("red")
    listed = await admin.stub.ListApiKeys(
        pb.ListApiKeysRequest(parent="tenants/red"), metadata=admin.operator
    )
    revoked = await admin.stub.RevokeApiKey(
        pb.RevokeApiKeyRequest(name=made.api_key.name), metadata=admin.operator
    )

    assert made.secret.startswith("kvc_")
    assert made.api_key.name == "tenants/red/apiKeys/laptop"
    assert made.api_key in listed.api_keys
    assert len(listed.api_keys) == 2
    assert made.secret not in str(listed)
    assert revoked.HasField("revoke_time")


@pytest.mark.parametrize(
    ("parent", "key", "reason"),
    [
        ("tenants/red", pb.ApiKey(), "INVALID_FIELD"),
        ("tenants/red", pb.ApiKey(role=99), "INVALID_FIELD"),
        ("tenants/red", pb.ApiKey(role=OPERATOR), "INVALID_FIELD"),
        ("tenants/operators", pb.ApiKey(role=ADMIN), "INVALID_FIELD"),
        ("tenants/red", pb.ApiKey(role=INFERENCE, display_name="x" * 201), "INVALID_FIELD"),
        (
            "tenants/red",
            pb.ApiKey(role=INFERENCE, expire_time=Timestamp(seconds=5)),
            "INVALID_FIELD",
        ),
        (
            "tenants/red",
            pb.ApiKey(role=INFERENCE, expire_time=Timestamp(seconds=2**62)),
            "INVALID_FIELD",
        ),
        ("tenants/none", pb.ApiKey(role=INFERENCE), "RESOURCE_NOT_FOUND"),
        ("red", pb.ApiKey(role=INFERENCE), "INVALID_FIELD"),
    ],
)
async def test_a_key_that_must_not_be_is_not_made(
    parent: str, key: pb.ApiKey, reason: str, admin: Administered
) -> None:
    await admin.create("red")

    call = admin.stub.CreateApiKey(
        pb.CreateApiKeyRequest(parent=parent, api_key=key), metadata=admin.operator
    )

    assert (await refusal_of(call)).reason == reason


async def test_usage_is_what_the_engine_and_the_router_count(
    admin: Administered, backend: FakeBackend
) -> None:
    await admin.create("red")
    backend.gate.clear()
    async with Client(admin.door.address, api_key=await admin.key("red")) as client:
        events = client.generate(prompt="hello")
        await anext(events)
        await backend.until(lambda generation: len(generation.ids) == 5)

        usage = await admin.stub.GetTenantUsage(
            pb.GetTenantUsageRequest(name="tenants/red/usage"), metadata=admin.operator
        )
        await events.aclose()

    assert (usage.name, usage.running_generations) == ("tenants/red/usage", 1)
    assert (usage.open_streams, usage.input_tokens_per_minute) == (1, 5)


async def test_usage_is_watched_until_the_caller_leaves(admin: Administered) -> None:
    await admin.create("red")
    request = pb.WatchTenantUsageRequest(
        name="tenants/red/usage", interval=Duration(nanos=100_000_000)
    )

    call = admin.stub.WatchTenantUsage(request, metadata=admin.operator)
    seen = [await call.read() for _ in range(3)]
    call.cancel()

    times = [usage.read_time.ToMicroseconds() for usage in seen]
    assert times == sorted(set(times))


@pytest.mark.parametrize("interval", [Duration(nanos=1), Duration(seconds=4000)])
async def test_usage_is_not_watched_too_often_or_too_rarely(
    interval: Duration, admin: Administered
) -> None:
    request = pb.WatchTenantUsageRequest(name="tenants/operators/usage", interval=interval)

    refusal = await refusal_of(admin.stub.WatchTenantUsage(request, metadata=admin.operator).read())

    assert refusal.metadata == {"field": "interval"}


async def test_every_act_is_audited_with_who_did_it_and_from_where(admin: Administered) -> None:
    await admin.create("red")
    await admin.key("red", key="k1")
    await admin.stub.SuspendTenant(
        pb.SuspendTenantRequest(name="tenants/red", reason="unpaid"), metadata=admin.operator
    )

    request = pb.ListAuditEventsRequest(parent="tenants/red")
    events = (await admin.stub.ListAuditEvents(request, metadata=admin.operator)).audit_events

    assert [event.method for event in events] == ["CreateTenant", "CreateApiKey", "SuspendTenant"]
    assert {event.principal for event in events} == {"tenants/operators/apiKeys/root"}
    assert all(event.peer.startswith("ipv4:127.0.0.1:") for event in events)
    assert events[1].target == "tenants/red/apiKeys/k1"
    assert '"state":"suspended"' in events[2].change
    assert [event.previous_sha256 for event in events[1:]] == [e.sha256 for e in events[:-1]]


async def test_audit_events_come_in_pages_and_by_filter(admin: Administered) -> None:
    for number in range(3):
        await admin.create(f"t{number}")
    request = pb.ListAuditEventsRequest(
        parent="tenants/-", page_size=2, filter="method=CreateTenant"
    )

    first = await admin.stub.ListAuditEvents(request, metadata=admin.operator)
    request.page_token = first.next_page_token
    second = await admin.stub.ListAuditEvents(request, metadata=admin.operator)

    found = [*first.audit_events, *second.audit_events]
    assert [event.target for event in found] == ["tenants/t0", "tenants/t1", "tenants/t2"]
    assert second.next_page_token == ""


async def test_the_audit_log_is_verified(admin: Administered) -> None:
    await admin.create("red")

    report = await admin.stub.VerifyAuditLog(pb.VerifyAuditLogRequest(), metadata=admin.operator)

    assert (report.intact, report.events, report.fault) == (True, 2, "")


async def test_every_method_of_the_proto_is_served(admin: Administered) -> None:
    for method in SERVICE.methods:
        call = admin.channel.unary_unary(f"/{SERVICE.full_name}/{method.name}")
        refusal = await refusal_of(call(b"\xff", metadata=admin.operator))
        assert refusal.reason == "MALFORMED_MESSAGE", method.name


async def test_what_is_not_there_is_not_found_in_every_method_that_names_a_tenant(
    admin: Administered,
) -> None:
    missing = "tenants/none"
    stub = admin.stub
    calls = [
        stub.GetTenant(pb.GetTenantRequest(name=missing), metadata=admin.operator),
        stub.DeleteTenant(pb.DeleteTenantRequest(name=missing), metadata=admin.operator),
        stub.UndeleteTenant(pb.UndeleteTenantRequest(name=missing), metadata=admin.operator),
        stub.SuspendTenant(pb.SuspendTenantRequest(name=missing), metadata=admin.operator),
        stub.ResumeTenant(pb.ResumeTenantRequest(name=missing), metadata=admin.operator),
        stub.DrainTenant(pb.DrainTenantRequest(name=missing), metadata=admin.operator),
        stub.RotateTenantKey(pb.RotateTenantKeyRequest(name=missing), metadata=admin.operator),
        stub.ListApiKeys(pb.ListApiKeysRequest(parent=missing), metadata=admin.operator),
        stub.GetTenantUsage(
            pb.GetTenantUsageRequest(name=f"{missing}/usage"), metadata=admin.operator
        ),
        stub.RevokeApiKey(
            pb.RevokeApiKeyRequest(name=f"{missing}/apiKeys/k"), metadata=admin.operator
        ),
        stub.UpdateTenant(
            pb.UpdateTenantRequest(tenant=pb.Tenant(name=missing)), metadata=admin.operator
        ),
    ]

    for call in calls:
        refusal = await refusal_of(call)
        assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "RESOURCE_NOT_FOUND")


NASTY = ["", "-", "tenants/", "tenants/../x", "tenants/\x00", "tenants/é", "'; --"]
NASTY += ["tenants/red' OR '1'='1", "x" * 100_000, "%s%n", "tenants/RED", "\u202e", "*"]


@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
async def test_nasty_text_in_any_field_is_refused_and_is_no_bug(
    method: str, admin: Administered
) -> None:
    await admin.create("red")
    found = SERVICE.methods_by_name[method]
    request_type = message_factory.GetMessageClass(found.input_type)
    texts = [field.name for field in found.input_type.fields if field.type == field.TYPE_STRING]
    rpc = admin.channel.unary_unary(f"/{SERVICE.full_name}/{method}")
    if method == "WatchTenantUsage":
        rpc = admin.channel.unary_stream(f"/{SERVICE.full_name}/{method}")

    for field in texts:
        for text in NASTY:
            raw = request_type(**{field: text}).SerializeToString()
            call = rpc(raw, metadata=admin.operator)
            with suppress(aio.AioRpcError):
                await (call.read() if method == "WatchTenantUsage" else call)
            assert await call.code() not in (Code.INTERNAL, Code.UNKNOWN), (field, text[:40])

    assert (await admin.get("red")).state == State.STATE_ACTIVE


async def test_a_stub_made_from_reflection_administers(admin: Administered) -> None:
    """As grpcurl does: nothing of ours is imported by the caller."""

    def administer() -> tuple[str, int]:
        with grpc.insecure_channel(admin.door.admin_address) as channel:
            pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            service = pool.FindServiceByName(ADMIN_SERVICE_NAME)

            def call(rpc_name: str, **fields: object) -> object:
                method = service.FindMethodByName(rpc_name)
                request = message_factory.GetMessageClass(method.input_type)
                answer = message_factory.GetMessageClass(method.output_type)
                rpc = channel.unary_unary(
                    f"/{service.full_name}/{rpc_name}", request.SerializeToString, answer.FromString
                )
                return rpc(request(**fields), metadata=admin.operator)

            call("CreateTenant", tenant_id="red")
            tenant = call("GetTenant", name="tenants/red")
            return tenant.name, len(service.methods)  # type: ignore[attr-defined]

    assert await asyncio.to_thread(administer) == ("tenants/red", len(SERVICE.methods))


async def test_the_admin_port_has_health_and_not_the_data_ports_service(
    admin: Administered,
) -> None:
    health = health_pb2_grpc.HealthStub(admin.channel)

    answer = await health.Check(health_pb2.HealthCheckRequest(service=ADMIN_SERVICE_NAME))
    other = admin.channel.unary_unary("/kvcluster.rpc.v1.InferenceService/ListModels")
    async with aio.insecure_channel(admin.door.address) as data:
        admin_rpc = data.unary_unary(f"/{SERVICE.full_name}/ListTenants")
        from_data = await refusal_of(admin_rpc(b"", metadata=admin.operator))

    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert (await refusal_of(other(b"", metadata=bearer("x")))).code is Code.UNIMPLEMENTED
    assert from_data.code is Code.UNIMPLEMENTED
