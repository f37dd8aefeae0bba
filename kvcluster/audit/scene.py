"""What every attack plays on: a running server, and two tenants that exist for the audit alone."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from grpc import aio

from kvcluster.admin_client import AdminClient
from kvcluster.audit.wire import Answer, Metadata, ask, bearer, is_admin, services
from kvcluster.client import Client
from kvcluster.client_tls import ClientTls, open_channel
from kvcluster.engine.api import Finished, Output, Progress
from kvcluster.errors import KvClusterError
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.types import TenantId

INFERENCE = pb.ApiKey.ROLE_INFERENCE
ADMIN = pb.ApiKey.ROLE_TENANT_ADMIN
OPEN_STREAMS = 4
MAX_CONTEXT_TOKENS = 65_536
_POLL_S = 0.02
_LET_IN_S = 0.5
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server that is attacked."""

    address: str
    admin_address: str
    operator: str
    """Secret of an operator's key, or such a token."""
    tls: ClientTls | None = None
    num_samples: int = 200
    """Times that each arm of a timing attack is measured."""
    prompt_tokens: int = 512
    """Length of the prompts of timing attacks: more than a block."""
    patience_s: float = 60.0
    """How long the victim may take for a short generation while it is attacked."""
    public_keys: bytes = b""
    """The identity provider's key set, where the server takes tokens: every caller can have it."""
    token: str = ""
    """A good token of any tenant, to make forgeries of; empty: they are made up."""


class Party(NamedTuple):
    """A tenant of the audit and two of its keys."""

    tenant: TenantId
    secret: str
    """For generating."""
    admin: str
    """For administering itself."""

    @property
    def key(self) -> Metadata:
        return bearer(self.secret)

    @property
    def name(self) -> str:
        return f"tenants/{self.tenant}"


class Served(NamedTuple):
    """One short generation."""

    name: str
    first_token_s: float
    cached_tokens: int


@dataclass(frozen=True)
class Scene:
    """Used by one task at a time."""

    target: Target
    data: aio.Channel
    admin: aio.Channel
    operator: AdminClient
    attacker: Party
    victim: Party
    victim_generation: str
    """Name of one that the victim has."""
    max_context_tokens: int
    """Of the model and the two tenants."""

    def method(self, service: str, name: str) -> MethodDescriptor:
        (found,) = [each for each in services() if each.name == service]
        return found.methods_by_name[name]

    async def ask(self, method: MethodDescriptor, request: Message, metadata: Metadata) -> Answer:
        """On the port of the method's service."""
        channel = self.admin if is_admin(method.containing_service) else self.data
        return await ask(channel, method, request.SerializeToString(), metadata)

    async def generate(self, party: Party, prompt_ids: Sequence[int] = (1, 2, 3)) -> Served:
        """A token of a prompt. Raises: KvClusterError."""
        async with Client(self.target.address, api_key=party.secret, tls=self.target.tls) as client:
            return await generate_with(client, prompt_ids)

    async def victim_fault(self) -> str | None:
        """Why the victim is not served now; None: it is, and in time."""
        try:
            async with asyncio.timeout(self.target.patience_s):
                await self.generate(self.victim)
        except KvClusterError as error:
            return f"the victim was refused: {error.reason}"
        except TimeoutError:
            return f"the victim had no answer within {self.target.patience_s:g} s"
        return None

    async def until_no_stream_is_open(self, party: Party) -> None:
        """A stream that was broken off is open to the server until it notices. Returns also when it
        does not: what needs places for streams will tell."""
        await self._until_open(party, lambda count: not count, self.target.patience_s)

    async def until_streams_are_open(self, party: Party, count: int) -> None:
        """A stream that was begun is open to the server a moment later, if it is let in."""
        await self._until_open(party, lambda found: found >= count, _LET_IN_S)

    async def _until_open(
        self, party: Party, is_enough: Callable[[int], bool], timeout_s: float
    ) -> None:
        usage = pb.GetTenantUsageRequest(name=f"{party.name}/usage")
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not is_enough(getattr(await self.operator.ask(usage), "open_streams", 0)):
                    await asyncio.sleep(_POLL_S)

    async def new_key(self, party: Party, *, role: int = INFERENCE, **fields: object) -> str:
        """The secret of another key of the party; its id is `audit` unless `fields` say."""
        request = pb.CreateApiKeyRequest(
            parent=party.name,
            api_key_id=str(fields.pop("key", "")),
            api_key=pb.ApiKey(role=role, **fields),  # type: ignore[arg-type]
        )
        made = await self.operator.ask(request)
        assert isinstance(made, pb.CreateApiKeyResponse), "the RPC's own answer"
        return made.secret


async def generate_with(client: Client, prompt_ids: Sequence[int]) -> Served:
    """A token of a prompt over a connection that is there. Raises: KvClusterError."""
    start = time.perf_counter()
    name, cached, first_s = "", 0, 0.0
    async for received in client.generate(prompt_ids=list(prompt_ids), max_output_tokens=1):
        name = received.generation
        match received.event:
            case Progress():
                cached = max(cached, received.event.cached_tokens)
            case Output() if not first_s:
                first_s = time.perf_counter() - start
            case Finished():
                cached = max(cached, received.event.usage.cached_input_tokens)
    return Served(name, first_s or time.perf_counter() - start, cached)


@asynccontextmanager
async def staged(target: Target) -> AsyncIterator[Scene]:
    """The scene, and nothing of it afterwards. Raises: KvClusterError when it cannot be made."""
    run = secrets.token_hex(4)
    options = (("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),)
    data = open_channel(target.address, target.tls, options)
    admin = open_channel(target.admin_address, target.tls, options)
    async with (
        data,
        admin,
        AdminClient(target.admin_address, api_key=target.operator, tls=target.tls) as operator,
    ):
        names = [f"audit-{run}-{who}" for who in ("attacker", "victim")]
        try:
            attacker, victim = [await _party(operator, name) for name in names]
            async with Client(target.address, api_key=victim.secret, tls=target.tls) as client:
                served = await generate_with(client, (1, 2, 3))
                model_tokens = [model.max_context_tokens for model in await client.models()]
            yield Scene(
                target=target,
                data=data,
                admin=admin,
                operator=operator,
                attacker=attacker,
                victim=victim,
                victim_generation=served.name,
                max_context_tokens=min(*model_tokens, MAX_CONTEXT_TOKENS),
            )
        finally:
            for name in names:
                await _forget(operator, name)


async def _party(operator: AdminClient, tenant: str) -> Party:
    limits = pb.TenantLimits(
        open_streams=OPEN_STREAMS,
        concurrent_generations=OPEN_STREAMS,
        queued_generations=OPEN_STREAMS,
        max_context_tokens=MAX_CONTEXT_TOKENS,
    )
    await operator.ask(pb.CreateTenantRequest(tenant_id=tenant, tenant=pb.Tenant(limits=limits)))
    keys = []
    for role in (INFERENCE, ADMIN):
        made = await operator.ask(
            pb.CreateApiKeyRequest(parent=f"tenants/{tenant}", api_key=pb.ApiKey(role=role))
        )
        assert isinstance(made, pb.CreateApiKeyResponse), "the RPC's own answer"
        keys.append(made.secret)
    return Party(TenantId(tenant), *keys)


async def _forget(operator: AdminClient, tenant: str) -> None:
    try:
        await operator.ask(pb.DeleteTenantRequest(name=f"tenants/{tenant}", force=True))
    except KvClusterError:
        # It was never made, or the attacks have deleted it: the report says so where it is one.
        return
