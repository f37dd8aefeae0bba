"""Attacks on stored contexts: another tenant's, in every call that takes one.

Written against the names of fields alone, so that it runs from any client: a server without
contexts is skipped.
"""

import base64
from typing import Any

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from kvcluster.audit.attack import Outcome, attack, breached, held, inconclusive, skipped
from kvcluster.audit.scene import Party, Scene
from kvcluster.audit.wire import Answer, ask_with_all, services

_SERVICE = "ContextService"
_NUM_TOKENS = 64
_PACKED = base64.b64encode(b"\x01\0\0\0" * _NUM_TOKENS).decode()


@attack(
    tries="the victim's context, by its name and by its id under the attacker's own name: get, "
    "update, append, fork, delete, and generate on it",
    breach="one is found, or the refusal differs from that for a context that does not exist",
)
async def foreign_contexts(scene: Scene) -> Outcome:
    service = next((each for each in services() if each.name == _SERVICE), None)
    if service is None:
        return skipped("this version of kvcluster knows no contexts")
    made = [
        await _upload(scene, service, party, name)
        for party, name in ((scene.victim, "audit-theirs"), (scene.attacker, "audit-own"))
    ]
    if any(answer.code.name == "UNIMPLEMENTED" for answer in made):
        return skipped("the server has no contexts")
    if not all(answer.is_answered for answer in made):
        return inconclusive(f"the tenants' own contexts are refused: {made[0].reason}")
    own = await _tried(scene, service.methods_by_name["GetContext"], "name", _own("audit-own"))
    if not own.is_answered:
        return inconclusive("the attacker's own context is not found either")
    fault = await _fault(scene, service)
    if fault is not None:
        return breached(fault)
    left = await scene.ask(
        service.methods_by_name["GetContext"],
        _message(
            service.methods_by_name["GetContext"],
            {"name": f"{scene.victim.name}/contexts/audit-theirs"},
        ),
        scene.victim.key,
    )
    if not left.is_answered:
        return breached("the victim's context is gone after the attacker's calls")
    return held("the victim's context is not found, like those that never were")


def _own(context: str) -> str:
    return f"{{attacker}}/contexts/{context}"


async def _fault(scene: Scene, service: ServiceDescriptor) -> str | None:
    names = ("{victim}/contexts/audit-theirs", _own("audit-theirs"), _own("audit-nobodys"))
    generate = scene.method("InferenceService", "Generate")
    for method, field, extra in (
        (service.methods_by_name["GetContext"], "name", {}),
        (
            service.methods_by_name["UpdateContext"],
            "context.name",
            {"update_mask": "displayName"},
        ),
        (service.methods_by_name["ForkContext"], "name", {"context_id": "audit-fork"}),
        (service.methods_by_name["DeleteContext"], "name", {}),
        (generate, "context", {"max_output_tokens": 1, "prompt": {"packed_ids": "AQAAAA=="}}),
    ):
        answers = [await _tried(scene, method, field, name, **extra) for name in names]
        if any(answer.is_answered for answer in answers):
            return f"{method.name} finds the victim's context"
        if len({(answer.code, answer.status) for answer in answers}) > 1:
            return f"{method.name} tells whether the victim has such a context"
    parents = (scene.victim.name, "tenants/audit-no-such-tenant")
    appended = [
        await _upload(scene, service, scene.attacker, "audit-theirs", parent=parent)
        for parent in parents
    ]
    if any(answer.is_answered for answer in appended):
        return "UploadContext appends to the victim's context"
    if len({(answer.code, answer.status) for answer in appended}) > 1:
        return "UploadContext tells which tenants exist"
    return None


async def _tried(
    scene: Scene, method: MethodDescriptor, field: str, name: str, **extra: Any
) -> Answer:
    """What the attacker gets for a context's name in this field."""
    text = name.format(attacker=scene.attacker.name, victim=scene.victim.name)
    outer, _, inner = field.partition(".")
    fields = {outer: {inner: text} if inner else text, **extra}
    return await scene.ask(method, _message(method, fields), scene.attacker.key)


async def _upload(
    scene: Scene, service: ServiceDescriptor, party: Party, context: str, *, parent: str = ""
) -> Answer:
    method = service.methods_by_name["UploadContext"]
    parts = (
        {"setup": {"parent": parent or party.name, "context_id": context}},
        {"chunk": {"offset": 0, "input": {"packed_ids": _PACKED}}},
    )
    requests = [_message(method, part).SerializeToString() for part in parts]
    return await ask_with_all(scene.data, method, requests, party.key)


def _message(method: MethodDescriptor, fields: dict[str, Any]) -> Message:
    found: Message = ParseDict(fields, GetMessageClass(method.input_type)())
    return found


ATTACKS = (foreign_contexts,)
