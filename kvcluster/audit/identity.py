"""Attacks on who a caller is: forged, expired, revoked and borrowed credentials."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from kvcluster.audit.attack import Outcome, attack, breached, held, inconclusive
from kvcluster.audit.scene import ADMIN, Scene
from kvcluster.audit.wire import Answer, Metadata, bearer, path_of, reasons, services
from kvcluster.errors import ConfigError
from kvcluster.rpc.v1 import inference_service_pb2
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.api_key import make_secret
from kvcluster.tenancy.token import public_keys

REVOKED_WITHIN_S = 1.0
_EXPIRES_IN_S = 1
_EMPTY = inference_service_pb2.ListModelsRequest()


@attack(
    tries="every RPC of both ports without a credential",
    breach="any of them is answered, or refused with anything but UNAUTHENTICATED",
)
async def no_credential(scene: Scene) -> Outcome:
    let_in, num_asked = [], 0
    for service in services():
        for method in service.methods:
            answer = await scene.ask(method, _EMPTY, ())
            num_asked += 1
            if _is_unserved(answer):
                continue
            if not answer.is_unauthenticated:
                let_in.append(f"{service.name}.{method.name}")
    if let_in:
        return breached(f"without a credential these do not refuse: {', '.join(let_in)}")
    return held(f"{num_asked} RPCs refuse a caller without credential", rpcs=num_asked)


def _is_unserved(answer: Answer) -> bool:
    """The server is older than this client's protos."""
    return answer.code.name == "UNIMPLEMENTED"


def _forged_credentials(good: str) -> list[Metadata]:
    other = make_secret()
    last = "A" if good[-1] != "A" else "B"
    return [
        bearer(other.text),
        bearer(good[:21] + "A" * 43),
        bearer(good[:-1]),
        bearer(good[:-1] + last),
        bearer(good + "A"),
        bearer(good.swapcase()),
        bearer(""),
        bearer("A" * 8000),
        bearer("kvc_' OR '1'='1"),
        (("authorization", good),),
        (("authorization", f"Basic {good}"),),
        (("x-api-key", good),),
        (*bearer(good), *bearer(good)),
        (*bearer(other.text), *bearer(good)),
        (("authorization-bin", f"Bearer {good}".encode()),),
    ]


@attack(
    tries="secrets that are guessed, cut, altered, doubled, or in the wrong place",
    breach="one is let in, or the refusal tells which of them were nearly right",
)
async def forged_keys(scene: Scene) -> Outcome:
    method = scene.method("InferenceService", "ListModels")
    good = scene.attacker.secret
    if not (await scene.ask(method, _EMPTY, bearer(good))).is_answered:
        return inconclusive("the attacker's own key is refused as well")
    answers = [await scene.ask(method, _EMPTY, forged) for forged in _forged_credentials(good)]
    return _all_refused_alike("forged credentials", answers)


def _all_refused_alike(what: str, answers: Iterable[Answer]) -> Outcome:
    found = list(answers)
    let_in = [answer for answer in found if not answer.is_unauthenticated]
    if let_in:
        return breached(f"{len(let_in)} {what} are not refused: {reasons(let_in)}")
    if len({answer.status for answer in found}) > 1:
        return breached(f"refusals of {what} differ, which tells them apart")
    return held(f"{len(found)} {what} get one refusal, byte for byte", tried=len(found))


@attack(
    tries="a key after the end of its time",
    breach="it is let in",
)
async def expired_key(scene: Scene) -> Outcome:
    end = int(time.time()) + _EXPIRES_IN_S
    secret = await scene.new_key(scene.attacker, expire_time=Timestamp(seconds=end))
    method = scene.method("InferenceService", "ListModels")
    before = await scene.ask(method, _EMPTY, bearer(secret))
    # The server's clock decides, and may be behind.
    await asyncio.sleep(max(0.0, end - time.time()) + 1)
    after = await scene.ask(method, _EMPTY, bearer(secret))
    if not after.is_unauthenticated:
        return breached(f"an expired key is not refused: {reasons([after])}")
    if not before.is_answered:
        return inconclusive("the key was refused before its end as well: are the clocks apart?")
    return held("a key is refused once its time is over")


@attack(
    tries="a key that was revoked, from the moment on in which that was acknowledged",
    breach=f"it is let in more than {REVOKED_WITHIN_S:g} s later",
)
async def revoked_key(scene: Scene) -> Outcome:
    secret = await scene.new_key(scene.attacker, key="audit-revoked")
    method = scene.method("InferenceService", "ListModels")
    if not (await scene.ask(method, _EMPTY, bearer(secret))).is_answered:
        return inconclusive("the key was refused before it was revoked as well")
    name = f"{scene.attacker.name}/apiKeys/audit-revoked"
    await scene.operator.ask(pb.RevokeApiKeyRequest(name=name))
    revoked_at, num_let_in, asked_s, last_s = time.perf_counter(), 0, 0.0, 0.0
    while asked_s < 1.2 * REVOKED_WITHIN_S:  # however slow an answer is, one is asked for after it
        asked_s = time.perf_counter() - revoked_at
        if not (await scene.ask(method, _EMPTY, bearer(secret))).is_unauthenticated:
            num_let_in, last_s = num_let_in + 1, asked_s
    if last_s > REVOKED_WITHIN_S:
        return breached(f"a revoked key is let in {last_s:.2f} s later", last_s=last_s)
    return held("a revoked key is refused", let_in_after=num_let_in, last_s=last_s)


@attack(
    tries="keys for generating on the admin port, and keys for administering on the other; a "
    "tenant's administrator making itself an operator",
    breach="one is answered",
)
async def wrong_role(scene: Scene) -> Outcome:
    tenant_of = scene.method("TenantService", "GetTenant")
    own = pb.GetTenantRequest(name=scene.attacker.name)
    if not (await scene.ask(tenant_of, own, bearer(scene.attacker.admin))).is_answered:
        return inconclusive("the attacker's administrator cannot read its own tenant either")
    asked = [
        (tenant_of, own, scene.attacker.secret),
        (scene.method("InferenceService", "ListModels"), _EMPTY, scene.attacker.admin),
        (
            scene.method("TenantService", "ListTenants"),
            pb.ListTenantsRequest(),
            scene.attacker.admin,
        ),
        *(
            (
                scene.method("TenantService", "CreateApiKey"),
                pb.CreateApiKeyRequest(
                    parent=parent, api_key=pb.ApiKey(role=pb.ApiKey.ROLE_OPERATOR)
                ),
                scene.attacker.admin,
            )
            for parent in (scene.attacker.name, "tenants/operators")
        ),
    ]
    answers = [await scene.ask(method, request, bearer(key)) for method, request, key in asked]
    passed = [path_of(asked[at][0]) for at, answer in enumerate(answers) if answer.is_answered]
    if passed:
        return breached(f"answered with a key of another role: {', '.join(passed)}")
    return held(f"{len(answers)} calls with a key of another role are refused: {reasons(answers)}")


@attack(
    tries="metadata and ids that name the victim beside the attacker's own key",
    breach="the call is taken for the victim's",
)
async def spoofed_tenant(scene: Scene) -> Outcome:
    victim = scene.victim.tenant
    names = ("x-tenant-id", "x-tenant", "tenant", "tenant-id", "x-forwarded-user", "x-goog-user")
    spoofed = (*scene.attacker.key, *((name, str(victim)) for name in names))
    method = scene.method("InferenceService", "ListGenerations")
    request = inference_service_pb2.ListGenerationsRequest(parent=scene.victim.name)
    answer = await scene.ask(method, request, spoofed)
    if answer.is_answered:
        return breached("metadata alone let the attacker list the victim's generations")
    own = inference_service_pb2.ListGenerationsRequest(parent=scene.attacker.name)
    control = await scene.ask(method, own, spoofed)
    if not control.is_answered:
        return breached("metadata that names another tenant changes what a key is good for")
    return held("metadata that names another tenant changes nothing")


@attack(
    tries="tokens without signature, signed with the provider's public key as a shared secret, "
    "bringing a key of their own, or altered under a good signature",
    breach="one is let in, or the refusal tells which of them were nearly right",
)
async def forged_tokens(scene: Scene) -> Outcome:
    method = scene.method("InferenceService", "ListModels")
    tokens = _forged_tokens(scene)
    answers = [await scene.ask(method, _EMPTY, bearer(token)) for token in tokens]
    outcome = _all_refused_alike("forged tokens", answers)
    admin = scene.method("TenantService", "ListTenants")
    over = [await scene.ask(admin, pb.ListTenantsRequest(), bearer(token)) for token in tokens]
    if any(answer.is_answered for answer in over):
        return breached("a forged token administers the cluster")
    return outcome


def _forged_tokens(scene: Scene) -> list[str]:
    now = int(time.time())
    header: dict[str, Any] = {"alg": "RS256", "typ": "JWT", "kid": "1"}
    claims: dict[str, Any] = {"iss": "x", "aud": "kvcluster", "sub": "audit", "exp": now + 600}
    if scene.target.token:
        header, claims = (_part(part) for part in scene.target.token.split(".")[:2])
    claims |= {"tenant": scene.victim.tenant}
    algorithms = ("none", "None", "NONE", "", "HS256", "HS384", "HS512", "RS256", "dir")
    tokens = [_token(header | {"alg": name}, claims, b"") for name in algorithms]
    tokens += [_token(header | {"alg": "none"}, claims, None)]
    for secret in (b"", b"secret", *_public_secrets(scene.target.public_keys)):
        tokens.append(_token(header | {"alg": "HS256"}, claims, secret))
    own = {"jwk": {"kty": "oct", "k": "YQ"}, "jku": "https://example.com", "kid": "../../dev/null"}
    tokens.append(_token(header | {"alg": "HS256"} | own, claims, b"a"))
    if scene.target.token:
        tokens += _altered(scene.target.token, claims)
    return tokens


def _altered(token: str, claims: Mapping[str, Any]) -> list[str]:
    """Of a good token: with other claims under its signature, and with its signature spoilt."""
    head, body, signature = token.split(".")
    flipped = "A" if signature[0] != "A" else "B"
    return [
        f"{head}.{_encoded(claims)}.{signature}",
        f"{head}.{body}.{flipped}{signature[1:]}",
        f"{head}.{body}.",
        f"{head}.{body}",
    ]


def _public_secrets(key_set: bytes) -> list[bytes]:
    """What everybody knows of the provider's keys, as somebody might take it for a secret."""
    from cryptography.hazmat.primitives import serialization

    if not key_set:
        return []
    try:
        keys = public_keys(key_set)
    except ConfigError:
        return [key_set]
    kinds = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    texts = [each.key.public_bytes(*kinds) for each in keys.values()]
    return [key_set, *texts, *(text.strip() for text in texts)]


def _token(header: Mapping[str, Any], claims: Mapping[str, Any], secret: bytes | None) -> str:
    text = f"{_encoded(header)}.{_encoded(claims)}"
    if secret is None:
        return f"{text}."
    return f"{text}.{_base64(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


def _encoded(fields: Mapping[str, Any]) -> str:
    return _base64(json.dumps(fields).encode())


def _part(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return found


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@attack(
    tries="a tenant's administrator with a key of another, deleted tenant of the same id",
    breach="it is let in",
)
async def key_of_a_deleted_tenant(scene: Scene) -> Outcome:
    name = f"{scene.attacker.tenant}-gone"
    await scene.operator.ask(pb.CreateTenantRequest(tenant_id=name))
    made = await scene.operator.ask(
        pb.CreateApiKeyRequest(parent=f"tenants/{name}", api_key=pb.ApiKey(role=ADMIN))
    )
    assert isinstance(made, pb.CreateApiKeyResponse), "the RPC's own answer"
    await scene.operator.ask(pb.DeleteTenantRequest(name=f"tenants/{name}", force=True))
    method = scene.method("TenantService", "GetTenant")
    answer = await scene.ask(
        method, pb.GetTenantRequest(name=f"tenants/{name}"), bearer(made.secret)
    )
    if not answer.is_unauthenticated:
        return breached(f"a key of a deleted tenant is not refused: {reasons([answer])}")
    return held("a key of a deleted tenant is refused")


ATTACKS = (
    no_credential,
    forged_keys,
    expired_key,
    revoked_key,
    wrong_role,
    spoofed_tenant,
    forged_tokens,
    key_of_a_deleted_tenant,
)
