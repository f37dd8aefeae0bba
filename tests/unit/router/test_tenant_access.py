"""Who may do what, through the real ports: with no key, a wrong one, another tenant's, a role's."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import aio

from kvcluster.client import Client
from kvcluster.config import RouterConfig, TenancyConfig
from kvcluster.engine.api import Finished
from kvcluster.errors import (
    ConfigError,
    CredentialInvalid,
    GenerationNotFound,
    PermissionDenied,
    QuotaExceeded,
    StoreUnavailable,
    TenantDraining,
    TenantSuspended,
)
from kvcluster.router.front_door import FrontDoor
from kvcluster.rpc.v1 import inference_service_pb2
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.rpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from kvcluster.rpc.v1.tenant_service_pb2_grpc import TenantServiceStub
from kvcluster.tenancy.api_key import make_secret
from kvcluster.types import TenantId
from tests.unit.router.administering import (
    ADMIN,
    INFERENCE,
    VIEWER,
    Administered,
    Metadata,
    administered,
    bearer,
)
from tests.unit.router.fake_backend import FakeBackend
from tests.unit.router.serving import Refusal, drain, refusal_of, setup, text_of
from tests.unit.tenancy.test_sqlite_store import full_disk

Code = grpc.StatusCode


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "tenants.sqlite"


@pytest.fixture
async def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def admin(database: Path, backend: FakeBackend) -> AsyncIterator[Administered]:
    async with administered(database, backend) as served:
        await served.create("red")
        await served.create("blue")
        yield served


async def asked(admin: Administered, metadata: Metadata) -> Refusal:
    """How the data port refuses a call with such metadata."""
    async with aio.insecure_channel(admin.door.address) as channel:
        request = inference_service_pb2.ListModelsRequest()
        call = InferenceServiceStub(channel).ListModels(request, metadata=metadata)
        return await refusal_of(call)


async def output_of(admin: Administered, secret: str, **options: object) -> str:
    async with Client(admin.door.address, api_key=secret) as client:
        events = client.generate(prompt="hello", max_output_tokens=5, **options)
        return text_of([event async for event in events])


async def test_a_key_generates_as_its_tenant_and_as_nobody_else(
    admin: Administered, backend: FakeBackend
) -> None:
    red, blue = await admin.key("red"), await admin.key("blue")

    assert await output_of(admin, red) == "hello"

    (generation,) = backend.generations.values()
    assert generation.record.tenant == "red"
    async with Client(admin.door.address, api_key=red) as client:
        assert (await client.get("tenants/red/generations/g0")).tenant == "red"
    async with Client(admin.door.address, api_key=blue) as client:
        for name in ("tenants/red/generations/g0", "tenants/blue/generations/g0"):
            with pytest.raises(GenerationNotFound):
                await client.get(name)
            with pytest.raises(GenerationNotFound):
                await client.cancel(name)


async def test_every_wrong_credential_gets_one_answer_byte_for_byte(admin: Administered) -> None:
    good, revoked = await admin.key("red"), await admin.key("red", key="gone")
    await admin.stub.RevokeApiKey(
        pb.RevokeApiKeyRequest(name="tenants/red/apiKeys/gone"), metadata=admin.operator
    )
    request = pb.CreateApiKeyRequest(
        parent="tenants/red",
        api_key=pb.ApiKey(role=INFERENCE, expire_time=Timestamp(seconds=int(time.time()) + 1)),
    )
    expired = (await admin.stub.CreateApiKey(request, metadata=admin.operator)).secret
    deleted = await admin.key("blue")
    await admin.stub.DeleteTenant(
        pb.DeleteTenantRequest(name="tenants/blue"), metadata=admin.operator
    )
    wrong: list[Metadata] = [
        (),
        (("authorization", ""),),
        (("authorization", good),),
        (("authorization", f"Basic {good}"),),
        (("authorization", "Bearer "),),
        (("x-api-key", good),),
        (("x-tenant-id", "red"),),
        (*bearer(good), *bearer(good)),
        bearer(good[:-1]),
        bearer(good.swapcase()),
        bearer(make_secret().text),
        bearer("kvc_" + good[4:20] + "_" + "A" * 43),
        bearer("eyJhbGciOiJub25lIn0.eyJzdWIiOiJyZWQifQ."),
        bearer("\\x80\\x05."),
        bearer("A" * 10_000),
        bearer(revoked),
        bearer(deleted),
    ]
    # Nothing tells when the clock has passed a key's time, but the answer itself.
    while (late := await asked_or_none(admin, bearer(expired))) is None:
        await asyncio.sleep(0.05)

    refusals = [late] + [await asked(admin, metadata) for metadata in wrong]

    assert {(refusal.code, refusal.reason) for refusal in refusals} == {
        (Code.UNAUTHENTICATED, "CREDENTIAL_INVALID")
    }
    assert len({refusal.status.SerializeToString() for refusal in refusals}) == 1


async def asked_or_none(admin: Administered, metadata: Metadata) -> Refusal | None:
    """The refusal; None: it was no refusal."""
    async with aio.insecure_channel(admin.door.address) as channel:
        request = inference_service_pb2.ListModelsRequest()
        stub = InferenceServiceStub(channel)
        try:
            await stub.ListModels(request, metadata=metadata)
        except aio.AioRpcError:
            return await refusal_of(stub.ListModels(request, metadata=metadata))
    return None


async def test_metadata_that_names_another_tenant_changes_nothing(
    admin: Administered, backend: FakeBackend
) -> None:
    metadata = (*bearer(await admin.key("red")), ("x-tenant-id", "blue"), ("tenant", "blue"))
    request = setup(max_output_tokens=1).setup
    request.prompt.text = "a"
    async with aio.insecure_channel(admin.door.address) as channel:
        await drain(InferenceServiceStub(channel).Generate(request, metadata=metadata))

    assert [g.record.tenant for g in backend.generations.values()] == ["red"]


@pytest.mark.parametrize("role", [VIEWER, ADMIN])
async def test_a_key_for_administration_generates_nothing(role: int, admin: Administered) -> None:
    for secret in (await admin.key("red", role), admin.secret):
        with pytest.raises(PermissionDenied, match="role"):
            await output_of(admin, secret)


Ask = Callable[[TenantServiceStub, str, Metadata], Awaitable[object]]

READS: dict[str, Ask] = {
    "GetTenant": lambda stub, name, key: stub.GetTenant(
        pb.GetTenantRequest(name=name), metadata=key
    ),
    "GetTenantUsage": lambda stub, name, key: stub.GetTenantUsage(
        pb.GetTenantUsageRequest(name=f"{name}/usage"), metadata=key
    ),
    "WatchTenantUsage": lambda stub, name, key: stub.WatchTenantUsage(
        pb.WatchTenantUsageRequest(name=f"{name}/usage"), metadata=key
    ).read(),
    "ListCacheEntries": lambda stub, name, key: stub.ListCacheEntries(
        pb.ListCacheEntriesRequest(parent=name), metadata=key
    ),
    "ListApiKeys": lambda stub, name, key: stub.ListApiKeys(
        pb.ListApiKeysRequest(parent=name), metadata=key
    ),
    "ListAuditEvents": lambda stub, name, key: stub.ListAuditEvents(
        pb.ListAuditEventsRequest(parent=name), metadata=key
    ),
}
OWN_ACTS: dict[str, Ask] = {
    "CreateApiKey": lambda stub, name, key: stub.CreateApiKey(
        pb.CreateApiKeyRequest(parent=name, api_key_id="made", api_key=pb.ApiKey(role=INFERENCE)),
        metadata=key,
    ),
    "RevokeApiKey": lambda stub, name, key: stub.RevokeApiKey(
        pb.RevokeApiKeyRequest(name=f"{name}/apiKeys/made"), metadata=key
    ),
    "PurgeCacheEntries": lambda stub, name, key: stub.PurgeCacheEntries(
        pb.PurgeCacheEntriesRequest(parent=name), metadata=key
    ),
    "RotateTenantKey": lambda stub, name, key: stub.RotateTenantKey(
        pb.RotateTenantKeyRequest(name=name), metadata=key
    ),
}
OPERATOR_ACTS: dict[str, Ask] = {
    "CreateTenant": lambda stub, name, key: stub.CreateTenant(
        pb.CreateTenantRequest(tenant_id="green"), metadata=key
    ),
    "ListTenants": lambda stub, name, key: stub.ListTenants(pb.ListTenantsRequest(), metadata=key),
    "UpdateTenant": lambda stub, name, key: stub.UpdateTenant(
        pb.UpdateTenantRequest(tenant=pb.Tenant(name=name, display_name="x")), metadata=key
    ),
    "DeleteTenant": lambda stub, name, key: stub.DeleteTenant(
        pb.DeleteTenantRequest(name=name), metadata=key
    ),
    "UndeleteTenant": lambda stub, name, key: stub.UndeleteTenant(
        pb.UndeleteTenantRequest(name=name), metadata=key
    ),
    "SuspendTenant": lambda stub, name, key: stub.SuspendTenant(
        pb.SuspendTenantRequest(name=name), metadata=key
    ),
    "ResumeTenant": lambda stub, name, key: stub.ResumeTenant(
        pb.ResumeTenantRequest(name=name), metadata=key
    ),
    "DrainTenant": lambda stub, name, key: stub.DrainTenant(
        pb.DrainTenantRequest(name=name), metadata=key
    ),
    "VerifyAuditLog": lambda stub, name, key: stub.VerifyAuditLog(
        pb.VerifyAuditLogRequest(), metadata=key
    ),
    "PublishPrefix": lambda stub, name, key: stub.PublishPrefix(
        pb.PublishPrefixRequest(published_prefix_id="system"), metadata=key
    ),
    "ListPublishedPrefixes": lambda stub, name, key: stub.ListPublishedPrefixes(
        pb.ListPublishedPrefixesRequest(), metadata=key
    ),
    "WithdrawPrefix": lambda stub, name, key: stub.WithdrawPrefix(
        pb.WithdrawPrefixRequest(name="publishedPrefixes/system"), metadata=key
    ),
    "ListAuditEvents of all": lambda stub, name, key: stub.ListAuditEvents(
        pb.ListAuditEventsRequest(parent="tenants/-"), metadata=key
    ),
}


def test_every_rpc_is_in_one_of_the_tables() -> None:
    named = {name.partition(" ")[0] for name in READS | OWN_ACTS | OPERATOR_ACTS}

    methods = pb.DESCRIPTOR.services_by_name["TenantService"].methods
    assert named == {method.name for method in methods}


async def test_a_viewer_reads_its_own_and_does_nothing(admin: Administered) -> None:
    key = bearer(await admin.key("red", VIEWER))

    for ask in READS.values():
        await ask(admin.stub, "tenants/red", key)
    for ask in (OWN_ACTS | OPERATOR_ACTS).values():
        refusal = await refusal_of(ask(admin.stub, "tenants/red", key))
        assert (refusal.code, refusal.reason) == (Code.PERMISSION_DENIED, "PERMISSION_DENIED")


async def test_a_tenants_admin_does_what_is_its_own_and_nothing_else(admin: Administered) -> None:
    key = bearer(await admin.key("red", ADMIN))

    for ask in (READS | OWN_ACTS).values():
        await ask(admin.stub, "tenants/red", key)
    for ask in OPERATOR_ACTS.values():
        assert (await refusal_of(ask(admin.stub, "tenants/red", key))).reason == "PERMISSION_DENIED"


async def test_a_tenants_admin_cannot_make_itself_an_operator(admin: Administered) -> None:
    key = bearer(await admin.key("red", ADMIN))

    for parent in ("tenants/red", "tenants/operators"):
        request = pb.CreateApiKeyRequest(
            parent=parent, api_key=pb.ApiKey(role=pb.ApiKey.ROLE_OPERATOR)
        )
        refusal = await refusal_of(admin.stub.CreateApiKey(request, metadata=key))
        assert refusal.reason in ("INVALID_FIELD", "PERMISSION_DENIED")


async def test_a_key_for_generating_administers_nothing(admin: Administered) -> None:
    key = bearer(await admin.key("red"))

    for ask in (READS | OWN_ACTS | OPERATOR_ACTS).values():
        refusal = await refusal_of(ask(admin.stub, "tenants/red", key))
        assert refusal.code is Code.PERMISSION_DENIED


@pytest.mark.parametrize("name", [*READS, *OWN_ACTS, *OPERATOR_ACTS])
async def test_another_tenants_looks_exactly_like_what_is_not_there(
    name: str, admin: Administered
) -> None:
    key = bearer(await admin.key("red", ADMIN))
    await admin.key("blue", key="made")
    ask = (READS | OWN_ACTS | OPERATOR_ACTS)[name]

    foreign = await refusal_of(ask(admin.stub, "tenants/blue", key))
    absent = await refusal_of(ask(admin.stub, "tenants/none", key))

    assert foreign.code is Code.PERMISSION_DENIED
    assert foreign.status.SerializeToString() == absent.status.SerializeToString()


@pytest.mark.parametrize("name", [*READS, *OWN_ACTS, *OPERATOR_ACTS])
async def test_without_a_good_key_no_rpc_is_answered(name: str, admin: Administered) -> None:
    ask = (READS | OWN_ACTS | OPERATOR_ACTS)[name]

    for metadata in ((), bearer(make_secret().text)):
        refusal = await refusal_of(ask(admin.stub, "tenants/red", metadata))
        assert (refusal.code, refusal.reason) == (Code.UNAUTHENTICATED, "CREDENTIAL_INVALID")


async def test_a_suspended_tenants_calls_are_refused_and_its_running_ones_end(
    admin: Administered, backend: FakeBackend
) -> None:
    secret, viewer = await admin.key("red"), bearer(await admin.key("red", VIEWER))
    backend.gate.clear()
    async with Client(admin.door.address, api_key=secret) as client:
        events = client.generate(prompt="hello", disconnect_grace_s=60)
        await anext(events)

        await admin.stub.SuspendTenant(
            pb.SuspendTenantRequest(name="tenants/red", reason="unpaid"), metadata=admin.operator
        )

        with pytest.raises(TenantSuspended, match="unpaid"):
            async for _ in events:
                pass
        with pytest.raises(TenantSuspended):
            await client.models()
        assert backend.generations["g0"].finished is not None
    told = await admin.stub.GetTenant(pb.GetTenantRequest(name="tenants/red"), metadata=viewer)
    assert told.state_reason == "unpaid"
    backend.gate.set()
    assert await output_of(admin, await admin.key("blue")) == "hello"
    await admin.stub.ResumeTenant(
        pb.ResumeTenantRequest(name="tenants/red"), metadata=admin.operator
    )
    assert await output_of(admin, secret) == "hello"


async def test_a_draining_tenants_generations_finish_and_no_more_begin(
    admin: Administered, backend: FakeBackend
) -> None:
    secret = await admin.key("red")
    backend.gate.clear()
    async with Client(admin.door.address, api_key=secret) as client:
        events = client.generate(prompt="hello", max_output_tokens=5)
        first = await anext(events)
        await admin.stub.DrainTenant(
            pb.DrainTenantRequest(name="tenants/red"), metadata=admin.operator
        )

        with pytest.raises(TenantDraining) as refused:
            await anext(client.generate(prompt="more"))
        with pytest.raises(TenantDraining):
            await client.estimate(input_tokens=1)
        backend.gate.set()
        rest = [event async for event in events]

        assert refused.value.retry_after_s
        assert text_of(rest) == "hello"
        assert [event async for event in client.resume(first.generation)] == [first, *rest]


async def test_what_still_runs_of_a_draining_tenant_is_cancelled_after_its_grace(
    admin: Administered, backend: FakeBackend
) -> None:
    backend.gate.clear()
    async with Client(admin.door.address, api_key=await admin.key("red")) as client:
        events = client.generate(prompt="hello")
        await anext(events)
        request = pb.DrainTenantRequest(name="tenants/red")
        request.grace_period.FromMilliseconds(50)

        answer = await admin.stub.DrainTenant(request, metadata=admin.operator)

        assert answer.HasField("drain_end_time")
        await asyncio.wait_for(backend.until(lambda g: g.finished is not None), timeout=5)
        *_, last = [event.event async for event in events]
        assert isinstance(last, Finished)


async def test_an_upload_that_began_before_a_drain_begins_no_generation_after_it(
    admin: Administered, backend: FakeBackend
) -> None:
    metadata = bearer(await admin.key("red"))
    async with aio.insecure_channel(admin.door.address) as channel:
        call = InferenceServiceStub(channel).StreamGenerate(metadata=metadata)
        await call.wait_for_connection()
        usage = pb.GetTenantUsageRequest(name="tenants/red/usage")
        while not (await admin.stub.GetTenantUsage(usage, metadata=admin.operator)).open_streams:
            await asyncio.sleep(0.001)
        await admin.stub.DrainTenant(
            pb.DrainTenantRequest(name="tenants/red"), metadata=admin.operator
        )
        await call.write(setup())

        refusal = await refusal_of(drain(call))

    assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "TENANT_DRAINING")
    assert backend.generations == {}


async def test_a_revoked_keys_running_calls_end_and_other_keys_of_the_tenant_go_on(
    admin: Administered, backend: FakeBackend
) -> None:
    leaked, kept = await admin.key("red", key="leaked"), await admin.key("red")
    backend.gate.clear()
    async with (
        Client(admin.door.address, api_key=leaked) as thief,
        Client(admin.door.address, api_key=kept) as owner,
    ):
        stolen, own = thief.generate(prompt="x"), owner.generate(prompt="y", max_output_tokens=1)
        await anext(stolen)
        await anext(own)
        await admin.stub.RevokeApiKey(
            pb.RevokeApiKeyRequest(name="tenants/red/apiKeys/leaked"), metadata=admin.operator
        )

        with pytest.raises(CredentialInvalid):
            async for _ in stolen:
                pass
        backend.gate.set()
        assert text_of([event async for event in own]) == "y"


async def test_every_router_of_a_database_refuses_what_one_has_revoked_or_suspended(
    admin: Administered, database: Path
) -> None:
    revoked, suspended = await admin.key("red", key="k"), await admin.key("blue")
    other_backend = FakeBackend()
    async with administered(database, other_backend, operator=admin.secret) as other:
        assert await output_of(other, revoked) == await output_of(other, suspended) == "hello"
        other_backend.gate.clear()
        async with Client(other.door.address, api_key=suspended) as client:
            events = client.generate(prompt="hello", disconnect_grace_s=60)
            await anext(events)

            await admin.stub.RevokeApiKey(
                pb.RevokeApiKeyRequest(name="tenants/red/apiKeys/k"), metadata=admin.operator
            )
            await admin.stub.SuspendTenant(
                pb.SuspendTenantRequest(name="tenants/blue"), metadata=admin.operator
            )

            # The very next call, with no time between.
            assert (await asked(other, bearer(revoked))).reason == "CREDENTIAL_INVALID"
            assert (await asked(other, bearer(suspended))).reason == "TENANT_SUSPENDED"
            began = time.monotonic()
            with pytest.raises(TenantSuspended):
                async for _ in events:
                    pass
            assert time.monotonic() - began < 1.0
            await asyncio.wait_for(
                other_backend.until(lambda g: g.finished is not None, "g2"), timeout=5
            )


async def test_open_streams_are_counted_by_tenant_and_refused_at_once(
    admin: Administered, backend: FakeBackend
) -> None:
    await admin.create("narrow", open_streams=2)
    secret = await admin.key("narrow")
    backend.gate.clear()
    async with Client(admin.door.address, api_key=secret) as client:
        streams = [client.generate(prompt="hello") for _ in range(2)]
        for stream in streams:
            await anext(stream)

        with pytest.raises(QuotaExceeded) as refused:
            await anext(client.generate(prompt="one more"))
        other = asyncio.create_task(output_of(admin, await admin.key("red")))
        backend.gate.set()

        assert await other == "hello"
        assert refused.value.metadata == {"quota": "open_streams", "used": "2", "limit": "2"}
        for stream in streams:
            assert [event async for event in stream]
        assert [event async for event in client.generate(prompt="again", max_output_tokens=1)]


async def test_a_quota_is_also_a_quota_failure_for_any_client(admin: Administered) -> None:
    await admin.create("shut", open_streams=0)
    request = setup().setup
    request.prompt.text = "a"
    metadata = bearer(await admin.key("shut"))
    async with aio.insecure_channel(admin.door.address) as channel:
        call = InferenceServiceStub(channel).Generate(request, metadata=metadata)
        refusal = await refusal_of(drain(call))

    assert refusal.code is Code.RESOURCE_EXHAUSTED
    assert [detail.TypeName().rpartition(".")[2] for detail in refusal.status.details] == [
        "ErrorInfo",
        "RetryInfo",
        "QuotaFailure",
    ]


async def test_the_limits_of_now_go_to_the_engine_with_each_request(
    admin: Administered, backend: FakeBackend
) -> None:
    secret = await admin.key("red")
    await output_of(admin, secret)
    request = pb.UpdateTenantRequest(
        tenant=pb.Tenant(name="tenants/red", limits=pb.TenantLimits(concurrent_generations=3))
    )
    await admin.stub.UpdateTenant(request, metadata=admin.operator)
    await output_of(admin, secret)

    limits = [g.request.limits.concurrent_generations for g in backend.generations.values()]
    assert limits == [16, 3]


async def test_a_full_disk_refuses_acts_and_serves_what_is_there(
    admin: Administered, database: Path
) -> None:
    secret = await admin.key("red")

    async def suspend_and_resume() -> None:
        for _ in range(1000):
            for rpc, request in (
                (admin.stub.SuspendTenant, pb.SuspendTenantRequest(name="tenants/blue")),
                (admin.stub.ResumeTenant, pb.ResumeTenantRequest(name="tenants/blue")),
            ):
                await rpc(request, metadata=admin.operator)

    with full_disk(database):
        refusal = await refusal_of(suspend_and_resume())
        assert await output_of(admin, secret) == "hello"

    assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "STORE_UNAVAILABLE")
    assert str(database) not in refusal.message
    report = await admin.stub.VerifyAuditLog(pb.VerifyAuditLogRequest(), metadata=admin.operator)
    assert report.intact


async def test_while_the_store_cannot_be_asked_nobody_new_is_let_in_and_running_calls_go_on(
    admin: Administered, backend: FakeBackend
) -> None:
    secret = await admin.key("red")
    backend.gate.clear()
    async with Client(admin.door.address, api_key=secret) as client:
        events = client.generate(prompt="hello", max_output_tokens=5)
        await anext(events)
        assert admin.door._store is not None
        admin.door._store.close()

        with pytest.raises(StoreUnavailable):
            await client.models()
        backend.gate.set()

        assert text_of([event async for event in events]) == "hello"


async def test_no_secret_reaches_a_log_or_an_answer_but_the_one_that_shows_it(
    admin: Administered, backend: FakeBackend, caplog: pytest.LogCaptureFixture, database: Path
) -> None:
    root = logging.getLogger("kvcluster")
    was, root.propagate = root.propagate, True
    caplog.set_level(logging.DEBUG)
    secret = await admin.key("red")
    backend.failure = RuntimeError(f"bug near {secret}")
    try:
        request = setup().setup
        request.prompt.text = "canary-prompt-text"
        async with aio.insecure_channel(admin.door.address) as channel:
            call = InferenceServiceStub(channel).Generate(request, metadata=bearer(secret))
            bug = await refusal_of(drain(call))
        wrong = await asked(admin, bearer(secret[:-1]))
    finally:
        root.propagate = was
    listed = await admin.stub.ListApiKeys(
        pb.ListApiKeysRequest(parent="tenants/red"), metadata=admin.operator
    )
    events = await admin.stub.ListAuditEvents(
        pb.ListAuditEventsRequest(parent="tenants/-"), metadata=admin.operator
    )

    said = "".join(map(str, (caplog.text, bug, wrong, listed, events)))
    assert "call_failed" in said
    assert "admin_act" in said
    random_part = secret.rpartition("_")[2]
    assert random_part not in said
    assert "canary" not in said
    files = b"".join(path.read_bytes() for path in database.parent.iterdir())
    assert random_part.encode() not in files


async def test_metadata_of_100_000_bytes_is_refused_and_others_are_served(
    admin: Administered,
) -> None:
    with pytest.raises(aio.AioRpcError):
        async with aio.insecure_channel(admin.door.admin_address) as channel:
            await TenantServiceStub(channel).ListTenants(
                pb.ListTenantsRequest(), metadata=(("x", "y" * 100_000), *admin.operator)
            )

    assert (await admin.get("red")).name == "tenants/red"


async def test_without_a_key_the_local_user_is_the_default_tenant_where_that_is_allowed(
    database: Path, backend: FakeBackend
) -> None:
    async with administered(database, backend, insecure_local=True) as admin:
        async with Client(admin.door.address) as client:
            assert [event async for event in client.generate(prompt="a", max_output_tokens=1)]
        made = await admin.stub.CreateTenant(pb.CreateTenantRequest(tenant_id="red"))
        forged = await asked(admin, bearer(make_secret().text))
        events = await admin.stub.ListAuditEvents(pb.ListAuditEventsRequest(parent=made.name))

    assert [g.record.tenant for g in backend.generations.values()] == [TenantId("default")]
    assert forged.reason == "CREDENTIAL_INVALID"
    assert [event.principal for event in events.audit_events] == ["local"]


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "10.0.0.1:0"])
async def test_neither_port_is_open_to_other_machines_without_tls(
    listen: str, database: Path, backend: FakeBackend
) -> None:
    tenancy = TenancyConfig(database=str(database), admin_listen="127.0.0.1:0")
    with pytest.raises(ConfigError, match=r"router\.listen: want a loopback"):
        await FrontDoor([backend], RouterConfig(listen=listen), tenancy).start()
    tenancy = TenancyConfig(database=str(database), admin_listen=listen)
    with pytest.raises(ConfigError, match=r"tenancy\.admin_listen: want a loopback"):
        await FrontDoor([backend], RouterConfig(listen="127.0.0.1:0"), tenancy).start()


async def test_without_database_and_without_being_asked_nothing_is_served(
    backend: FakeBackend,
) -> None:
    door = FrontDoor([backend], RouterConfig(listen="127.0.0.1:0"), TenancyConfig())

    with pytest.raises(ConfigError, match="no authentication"):
        await door.start()


async def test_an_admin_port_in_use_is_a_config_error(
    admin: Administered, tmp_path: Path, backend: FakeBackend
) -> None:
    tenancy = TenancyConfig(
        database=str(tmp_path / "other.sqlite"), admin_listen=admin.door.admin_address
    )
    door = FrontDoor([backend], RouterConfig(listen="127.0.0.1:0"), tenancy)

    with pytest.raises(ConfigError, match=r"tenancy\.admin_listen: .* cannot be bound"):
        await door.start()
    await door.stop(grace_s=0)
