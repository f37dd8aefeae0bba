"""Attacks on what a caller may reach: another tenant's ids in every field that takes one, ids that
two tenants have in common, and bytes that are no message."""

from collections.abc import Iterator
from typing import NamedTuple

from google.api import field_behavior_pb2, resource_pb2  # type: ignore[import-untyped]
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from kvcluster.audit.attack import Outcome, attack, breached, held, inconclusive
from kvcluster.audit.scene import Scene
from kvcluster.audit.wire import Answer, ask, bearer, is_admin, path_of, reasons, services
from kvcluster.client import Client
from kvcluster.errors import KvClusterError
from kvcluster.rpc.v1 import tenant_service_pb2 as pb

_ABSENT = "audit-no-such-tenant"
_GUESS = "audit-guess"
_MAX_DEPTH = 2
_PLURALS = {"CacheEntry": "cacheEntries"}
_PICKLE = b"\x80\x05cposix\nsystem\n(S'true'\ntR."


class _Field(NamedTuple):
    """A field of a request that takes a resource's name, by its path."""

    path: tuple[str, ...]
    kind: str
    """Such as kvcluster.dev/Tenant."""
    is_parent: bool
    """It names what the kind is below."""


def _fields(message: Descriptor, path: tuple[str, ...] = (), depth: int = 0) -> Iterator[_Field]:
    """By the annotations of the protos, so that an RPC that is added is attacked as well."""
    for field in message.fields:
        options = field.GetOptions()
        reference = options.Extensions[resource_pb2.resource_reference]
        here = (*path, field.name)
        if reference.type or reference.child_type:
            kind = reference.type or reference.child_type
            yield _Field(here, kind, bool(reference.child_type))
        elif _is_identifier(field):
            own = message.GetOptions().Extensions[resource_pb2.resource]
            if own.type:
                yield _Field(here, own.type, is_parent=False)
        elif field.message_type is not None and not field.is_repeated and depth < _MAX_DEPTH:
            yield from _fields(field.message_type, here, depth + 1)


def _is_identifier(field: FieldDescriptor) -> bool:
    behaviors = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
    return field_behavior_pb2.IDENTIFIER in behaviors


def _name_of(field: _Field, tenant: str, generation: str) -> str:
    kind = field.kind.rpartition("/")[2]
    if field.is_parent or kind == "Tenant":
        return f"tenants/{tenant}"
    if kind == "TenantUsage":
        return f"tenants/{tenant}/usage"
    leaf = generation if kind == "Generation" else _GUESS
    plural = _PLURALS.get(kind, f"{kind[0].lower()}{kind[1:]}s")
    return f"tenants/{tenant}/{plural}/{leaf}"


def _request(method: MethodDescriptor, field: _Field, name: str, own: str) -> Message:
    """`own`: the attacker's name, under which it puts a list of others'."""
    request = GetMessageClass(method.input_type)()
    owner = request
    for part in field.path[:-1]:
        owner = getattr(owner, part)
    last = owner.DESCRIPTOR.fields_by_name[field.path[-1]]
    if last.is_repeated:
        getattr(owner, last.name).append(name)
        request.parent = own  # type: ignore[attr-defined]
    else:
        setattr(owner, last.name, name)
    return request


@attack(
    tries="the victim's name, and names below it, in every field of every RPC that takes one",
    breach="an RPC answers, or its refusal differs from that for a tenant that does not exist",
)
async def foreign_names(scene: Scene) -> Outcome:
    fault = await _control(scene)
    if fault is not None:
        return inconclusive(fault)
    generation = scene.victim_generation.rpartition("/")[2]
    answered, told, num_tried = [], [], 0
    for service in services():
        key = scene.attacker.admin if is_admin(service) else scene.attacker.secret
        for method in service.methods:
            for field in _fields(method.input_type):
                foreign, absent = [
                    await scene.ask(
                        method,
                        _request(
                            method, field, _name_of(field, tenant, generation), scene.attacker.name
                        ),
                        bearer(key),
                    )
                    for tenant in (scene.victim.tenant, _ABSENT)
                ]
                num_tried += 1
                where = f"{path_of(method)} {'.'.join(field.path)}"
                if foreign.is_answered:
                    answered.append(where)
                elif (foreign.code, foreign.status) != (absent.code, absent.status):
                    told.append(where)
    if answered:
        return breached(f"answered with the victim's name: {', '.join(answered)}")
    if told:
        return breached(f"tells that the victim exists: {', '.join(told)}")
    return held("the victim's names are refused like names of nobody", fields=num_tried)


async def _control(scene: Scene) -> str | None:
    """Why the attacker's own names are refused too; None: they are not."""
    method = scene.method("TenantService", "GetTenant")
    own = pb.GetTenantRequest(name=scene.attacker.name)
    answer = await scene.ask(method, own, bearer(scene.attacker.admin))
    return None if answer.is_answered else f"the attacker's own name is refused: {answer.reason}"


@attack(
    tries="the ids of the victim's generations under the attacker's own name: get, resume, cancel",
    breach="one is found, or the refusal differs from that for an id that does not exist",
)
async def foreign_generations(scene: Scene) -> Outcome:
    theirs = scene.victim_generation.rpartition("/")[2]
    own = (await scene.generate(scene.attacker)).name
    get = scene.method("InferenceService", "GetGeneration")
    control = await _named(scene, get, own)
    if not control.is_answered:
        return inconclusive("the attacker's own generation is not found either")
    absent = theirs[::-1] if theirs[::-1] != theirs else f"{theirs}0"
    for verb in ("GetGeneration", "ResumeGeneration", "CancelGeneration"):
        method = scene.method("InferenceService", verb)
        prefix = f"{scene.attacker.name}/generations"
        found = [await _named(scene, method, f"{prefix}/{name}") for name in (theirs, absent)]
        found += [await _named(scene, method, scene.victim_generation)]
        if any(answer.is_answered for answer in found):
            return breached(f"{verb} finds the victim's generation")
        if len({answer.status for answer in found}) > 1:
            return breached(f"{verb} tells whether the victim has such a generation")
    return held("the victim's generations are not found, like those that never were")


async def _named(scene: Scene, method: MethodDescriptor, name: str) -> Answer:
    request = GetMessageClass(method.input_type)()
    request.name = name  # type: ignore[attr-defined]
    return await scene.ask(method, request, scene.attacker.key)


@attack(
    tries="the victim's request_id, with the victim's prompt and with another",
    breach="the attacker is attached to the victim's generation, or is told that the id is in use",
)
async def shared_request_id(scene: Scene) -> Outcome:
    tls = scene.target.tls
    async with (
        Client(scene.target.address, api_key=scene.victim.secret, tls=tls) as victim,
        Client(scene.target.address, api_key=scene.attacker.secret, tls=tls) as attacker,
    ):
        names = []
        for client, prompt in ((victim, [1, 2]), (attacker, [1, 2]), (attacker, [1, 2])):
            events = client.generate(
                prompt_ids=prompt, max_output_tokens=1, request_id="audit-shared"
            )
            try:
                served = [event.generation async for event in events]
            except KvClusterError as error:
                return breached(f"the victim's request_id changes the answer: {error.reason}")
            names.append(served[0])
    theirs, mine, again = names
    if theirs.rpartition("/")[2] == mine.rpartition("/")[2]:
        return breached("the victim's request_id attaches the attacker to its generation")
    if mine != again:
        return inconclusive("a tenant's own request_id does not attach to its generation either")
    return held("an id of the victim is the attacker's own to use")


@attack(
    tries="bytes that are no message, pickles among them, in every RPC of both ports",
    breach="a call is answered or ends without a typed status, or the victim is served no more",
)
async def malformed_messages(scene: Scene) -> Outcome:
    bodies = (_PICKLE, b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f", bytes(range(256)))
    wrong = []
    for service in services():
        channel = scene.admin if is_admin(service) else scene.data
        key = scene.attacker.admin if is_admin(service) else scene.attacker.secret
        for method in service.methods:
            found = [await ask(channel, method, body, bearer(key)) for body in bodies]
            if any(answer.code.name in ("OK", "UNKNOWN", "INTERNAL") for answer in found):
                wrong.append(f"{path_of(method)} ({reasons(found)})")
    fault = await scene.victim_fault()
    if fault is not None:
        return breached(f"after malformed messages {fault}")
    if wrong:
        return breached(f"malformed messages end without a typed status: {', '.join(wrong)}")
    return held("malformed messages are refused with a typed status", bodies=len(bodies))


ATTACKS = (
    foreign_names,
    foreign_generations,
    shared_request_id,
    malformed_messages,
)
