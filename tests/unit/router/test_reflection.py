"""Every RPC of both ports answers a stub that was made from what the server itself tells of its
protos, and the tenants' and contexts' ones a command of the shell."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.attacks.attacked import real_engine
from tests.unit.cli.conftest import run
from tests.unit.router.administering import Administered, administered

OURS = "kvcluster."
PACKED = "AQAAAAIAAAADAAAABAAAAAUAAAAGAAAABwAAAAgAAAAJAAAA"
"""Token ids 1 to 9."""
IDS = "[1, 2, 3, 4, 5, 6, 7, 8, 9]"
PROMPT = {"packedIds": PACKED}


class Step(NamedTuple):
    """One RPC as a message of JSON, and as a command; {...} stands for what came before."""

    rpc: str
    request: Any
    command: Sequence[str] = ()

    @property
    def messages(self) -> Sequence[Any]:
        return self.request if isinstance(self.request, list) else [self.request]


TENANTS = (
    Step("CreateTenant", {"tenantId": "red"}, ["create-tenant", "red"]),
    Step("GetTenant", {"name": "tenants/red"}, ["get-tenant", "red"]),
    Step("ListTenants", {"filter": "state=ACTIVE"}, ["list-tenants", "--filter", "state=ACTIVE"]),
    Step(
        "UpdateTenant",
        {"tenant": {"name": "tenants/red", "displayName": "Red"}, "updateMask": "displayName"},
        ["update-tenant", "red", "--display-name", "Red"],
    ),
    Step("SuspendTenant", {"name": "tenants/red"}, ["suspend-tenant", "red"]),
    Step("ResumeTenant", {"name": "tenants/red"}, ["resume-tenant", "red"]),
    Step("DrainTenant", {"name": "tenants/red"}, ["drain-tenant", "red"]),
    Step("RotateTenantKey", {"name": "tenants/red"}, ["rotate-tenant-key", "red"]),
    Step("GetTenantUsage", {"name": "tenants/red/usage"}, ["get-tenant-usage", "red"]),
    Step(
        "WatchTenantUsage",
        {"name": "tenants/red/usage"},
        ["watch-tenant-usage", "red", "--count", "1"],
    ),
    Step("ListCacheEntries", {"parent": "tenants/red"}, ["list-cache-entries", "red"]),
    Step(
        "PurgeCacheEntries",
        {"parent": "tenants/red", "cacheNamespace": "n"},
        ["purge-cache-entries", "red", "--namespace", "n"],
    ),
    Step(
        "CreateApiKey",
        {"parent": "tenants/red", "apiKeyId": "k1", "apiKey": {"role": "ROLE_INFERENCE"}},
        ["create-api-key", "red", "--api-key-id", "k1"],
    ),
    Step("ListApiKeys", {"parent": "tenants/red"}, ["list-api-keys", "red"]),
    Step("RevokeApiKey", {"name": "tenants/red/apiKeys/k1"}, ["revoke-api-key", "red", "k1"]),
    Step("DeleteTenant", {"name": "tenants/red", "force": True}, ["delete-tenant", "red"]),
    Step("UndeleteTenant", {"name": "tenants/red"}, ["undelete-tenant", "red"]),
    Step("ListAuditEvents", {"parent": "tenants/-"}, ["list-audit-events"]),
    Step("VerifyAuditLog", {}, ["verify-audit-log"]),
    Step(
        "PublishPrefix",
        {"publishedPrefixId": "system", "content": PROMPT},
        ["publish-prefix", "system", "--prompt-ids", "{ids}", "--timeout", "60"],
    ),
    Step("ListPublishedPrefixes", {}, ["list-published-prefixes"]),
    Step("WithdrawPrefix", {"name": "publishedPrefixes/system"}, ["withdraw-prefix", "system"]),
)
CONTEXTS = (
    Step(
        "UploadContext",
        [
            {"setup": {"parent": "tenants/blue", "contextId": "book"}},
            {"chunk": {"offset": 0, "input": PROMPT}},
        ],
        ["upload", "book", "--prompt-ids", "{ids}"],
    ),
    Step("GetContext", {"name": "tenants/blue/contexts/book"}, ["get", "book"]),
    Step("ListContexts", {"parent": "tenants/blue"}, ["list"]),
    Step(
        "UpdateContext",
        {
            "context": {"name": "tenants/blue/contexts/book", "displayName": "A book"},
            "updateMask": "displayName",
        },
        ["update", "book", "--display-name", "A book"],
    ),
    Step(
        "ForkContext",
        {"name": "tenants/blue/contexts/book", "contextId": "copy"},
        ["fork", "book", "copy"],
    ),
    Step("DeleteContext", {"name": "tenants/blue/contexts/copy"}, ["delete", "copy"]),
)
GENERATIONS = (
    Step("Generate", {"maxOutputTokens": 1, "prompt": PROMPT}),
    Step(
        "StreamGenerate",
        [
            {"setup": {"maxOutputTokens": 1}},
            {"chunk": {"offset": 0, "input": PROMPT}},
        ],
    ),
    Step("GetGeneration", {"name": "{generation}"}),
    Step("ResumeGeneration", {"name": "{generation}"}),
    Step("ListGenerations", {"parent": "tenants/blue"}),
    Step("CancelGeneration", {"name": "{generation}"}),
    Step("CountTokens", {"input": PROMPT}),
    Step("EstimateGeneration", {"maxOutputTokens": 1, "inputTokens": 9}),
    Step("ListModels", {}),
)
WALKS = {
    "TenantService": TENANTS,
    "ContextService": CONTEXTS,
    "InferenceService": GENERATIONS,
}


@dataclass
class Ports:
    admin: Administered
    secret: str
    """For generating as the tenant blue."""

    def address(self, service: str) -> str:
        door = self.admin.door
        return door.admin_address if service == "TenantService" else door.address

    def key(self, service: str) -> str:
        return self.admin.secret if service == "TenantService" else self.secret


@pytest.fixture
async def ports(tmp_path: Path) -> AsyncIterator[Ports]:
    async with (
        real_engine() as engine,
        administered(tmp_path / "tenants.sqlite", engine) as admin,
    ):
        await admin.create("blue", max_pinned_bytes=1 << 40)
        yield Ports(admin, await admin.key("blue"))


def reflected(channel: grpc.Channel) -> dict[str, ServiceDescriptor]:
    """Our services as the server tells of them; nothing of this program's protos is used."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    names = [name for name in database.get_services() if name.startswith(OURS)]
    return {name.rpartition(".")[2]: pool.FindServiceByName(name) for name in names}


def answer(channel: grpc.Channel, method: MethodDescriptor, messages: Any, key: str) -> Any:
    """The first message that comes, as a dict."""
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    call = kinds[method.client_streaming, method.server_streaming](
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    requests = [ParseDict(each, GetMessageClass(method.input_type)()) for each in messages]
    sent = iter(requests) if method.client_streaming else requests[0]
    replies = call(sent, metadata=(("authorization", f"Bearer {key}"),), timeout=20)
    if not method.server_streaming:
        return MessageToDict(replies)
    first = MessageToDict(next(replies))
    if "generation" not in first:
        replies.cancel()
        return first
    for _ in replies:
        pass
    return first


def walked(address: str, service: str, key: str) -> set[str]:
    """The RPCs that answered."""
    found = {"generation": ""}
    with grpc.insecure_channel(address) as channel:
        methods = reflected(channel)[service].methods_by_name
        for step in WALKS[service]:
            messages = json.loads(
                json.dumps(step.messages).replace("{generation}", found["generation"])
            )
            replied = answer(channel, methods[step.rpc], messages, key)
            found["generation"] = replied.get("generation", found["generation"])
    return set(methods)


@pytest.mark.parametrize("service", WALKS)
async def test_every_rpc_answers_a_stub_made_from_reflection(service: str, ports: Ports) -> None:
    methods = await asyncio.to_thread(walked, ports.address(service), service, ports.key(service))

    assert methods == {step.rpc for step in WALKS[service]}


@pytest.mark.parametrize(
    ("service", "group"), [("TenantService", "tenants"), ("ContextService", "contexts")]
)
async def test_every_rpc_is_a_command_that_works(
    service: str, group: str, ports: Ports, tmp_path: Path
) -> None:
    (tmp_path / "ids.json").write_text(IDS)
    (tmp_path / "key").write_text(ports.key(service))
    flags = ["--server", ports.address(service), "--api-key-file", str(tmp_path / "key"), "--json"]
    flags += ["--tenant", "blue"] if group == "contexts" else []

    for step in WALKS[service]:
        words = [word.format(ids=tmp_path / "ids.json") for word in step.command]
        ended = await run(group, *words, *flags)
        assert (step.rpc, ended.code, ended.stderr.count("\n")) == (step.rpc, 0, 0), ended.stderr
        json.loads(ended.stdout.splitlines()[0])


async def test_each_port_tells_of_its_own_services_alone(ports: Ports) -> None:
    def told(service: str) -> set[str]:
        with grpc.insecure_channel(ports.address(service)) as channel:
            return set(reflected(channel))

    assert await asyncio.to_thread(told, "TenantService") == {"TenantService"}
    assert await asyncio.to_thread(told, "ContextService") == {"ContextService", "InferenceService"}
