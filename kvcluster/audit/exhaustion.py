"""Attacks on what all share: streams, memory, the server's time. The victim has to be served on."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
from grpc import aio

from kvcluster.audit.attack import Outcome, attack, breached, held, inconclusive
from kvcluster.audit.scene import MAX_CONTEXT_TOKENS, OPEN_STREAMS, Scene
from kvcluster.audit.wire import (
    TIMEOUT_S,
    Answer,
    ask,
    bearer,
    read_status,
    reasons,
    status_of,
    stream,
)
from kvcluster.errors import ServerUnavailable
from kvcluster.rpc.v1 import common_pb2
from kvcluster.rpc.v1 import inference_service_pb2 as pb
from kvcluster.tenancy.api_key import make_secret

REFUSED_WITHIN_S = 2.0
"""A refusal that takes longer has cost the server something."""
_METADATA_BYTES = 100_000
_FLOOD_CALLS = 300
_FLOOD_CHUNKS = 3000
_OVERSIZED_BYTES = 32 * 1024 * 1024
_TRICKLE_PAUSE_S = 0.02
_STALLED_TOKENS = 4096
_Stream = aio.StreamStreamCall[Any, Any]


@attack(
    tries="more open streams than the tenant is allowed, all of them idle",
    breach="one too many is let in, its refusal does not say what is used and allowed, or the "
    "victim is not served meanwhile",
)
async def many_small_requests(scene: Scene) -> Outcome:
    method = scene.method("InferenceService", "StreamGenerate")
    async with AsyncExitStack() as stack:
        for _ in range(OPEN_STREAMS):
            call = await stack.enter_async_context(stream(scene.data, method, scene.attacker.key))
            await call.write(_setup())
            await call.read()  # Admitted: it is counted from now on
        one_more = await stack.enter_async_context(stream(scene.data, method, scene.attacker.key))
        answer = await status_of(one_more, timeout_s=REFUSED_WITHIN_S)
        fault = await scene.victim_fault()
    if answer is None or answer.is_answered:
        return breached(f"an open stream more than the {OPEN_STREAMS} allowed is let in")
    if answer.reason != "TENANT_QUOTA_EXCEEDED" or b"open_streams" not in answer.status:
        return breached(f"a stream too many is refused without saying why: {reasons([answer])}")
    if fault is not None:
        return breached(f"while the attacker's streams are open {fault}")
    return held("streams over the limit are refused with what is used", refused_s=answer.took_s)


@attack(
    tries="a prompt declared longer than any limit, and more output than any limit",
    breach="it is let in, or its refusal is not quick and typed",
)
async def one_huge_request(scene: Scene) -> Outcome:
    method = scene.method("InferenceService", "StreamGenerate")
    slowest = 0.0
    for fields in (
        {"input_tokens": 2**50},
        {"input_tokens": 10 * MAX_CONTEXT_TOKENS},
        {"max_output_tokens": 2**32 - 1},
    ):
        async with stream(scene.data, method, scene.attacker.key) as call:
            await call.write(_setup(**fields))
            answer = await status_of(call, timeout_s=REFUSED_WITHIN_S)
        if answer is None or answer.reason not in (
            "CONTEXT_TOO_LONG",
            "TENANT_QUOTA_EXCEEDED",
            "INVALID_FIELD",
        ):
            came = "nothing" if answer is None else reasons([answer])
            return breached(f"a request with {fields} is not refused: {came}")
        slowest = max(slowest, answer.took_s)
    fault = await scene.victim_fault()
    if fault is not None:
        return breached(f"after huge requests {fault}")
    return held("requests over every limit are refused before anything is taken", slowest_s=slowest)


@attack(
    tries="uploads of a token at a time, as slowly as is allowed, on all the tenant's streams",
    breach="the victim is not served meanwhile",
)
async def slow_upload(scene: Scene) -> Outcome:
    async def trickle(call: _Stream) -> None:
        await call.write(_setup())
        for offset in range(MAX_CONTEXT_TOKENS):
            await call.write(_chunk(offset))
            await asyncio.sleep(_TRICKLE_PAUSE_S)

    return await _served_beside(scene, "slow uploads", trickle)


@attack(
    tries="streams on which nothing is ever sent, on all the tenant's streams",
    breach="the victim is not served meanwhile",
)
async def idle_stream(scene: Scene) -> Outcome:
    async def wait(call: _Stream) -> None:
        await call.wait_for_connection()
        await asyncio.Event().wait()

    return await _served_beside(scene, "idle streams", wait)


@attack(
    tries="generations whose events are never read, so that the connection's window fills",
    breach="the victim is not served meanwhile",
)
async def window_stall(scene: Scene) -> Outcome:
    async def stall(call: _Stream) -> None:
        # As many events as fill the window, if the model has them.
        num_tokens = min(_STALLED_TOKENS, scene.max_context_tokens // 2)
        await call.write(_setup(max_output_tokens=num_tokens))
        await call.write(_chunk(0))
        await call.done_writing()
        await asyncio.Event().wait()

    return await _served_beside(scene, "streams that are not read", stall)


@attack(
    tries=f"{_METADATA_BYTES} bytes of metadata, in one value and in many",
    breach="the call is answered, or the server or connection does not survive",
)
async def huge_metadata(scene: Scene) -> Outcome:
    method = scene.method("InferenceService", "ListModels")
    plain = pb.ListModelsRequest().SerializeToString()
    many = tuple((f"x-{number}", "y" * 100) for number in range(_METADATA_BYTES // 100))
    answers = []
    for channel in (scene.data, scene.admin):
        for extra in ((("x", "y" * _METADATA_BYTES),), many):
            answers.append(await ask(channel, method, plain, (*extra, *scene.attacker.key)))
    let_in = [answer for answer in answers if answer.code.name != "RESOURCE_EXHAUSTED"]
    if let_in:
        return breached(f"{_METADATA_BYTES} bytes of metadata are taken: {reasons(let_in)}")
    control = await ask(scene.data, method, plain, scene.attacker.key)
    if not control.is_answered:
        return breached("after too much metadata the attacker's ordinary call is refused as well")
    fault = await scene.victim_fault()
    if fault is not None:
        return breached(f"after too much metadata {fault}")
    return held("too much metadata is refused, and the connection goes on")


@attack(
    tries=f"{_FLOOD_CHUNKS} messages in one stream as fast as they go, messages of "
    f"{_OVERSIZED_BYTES >> 20} MiB, and compressed ones",
    breach="an oversized or compressed message is taken, or the victim is not served meanwhile",
)
async def message_flood(scene: Scene) -> Outcome:
    async def flood(call: _Stream) -> None:
        await call.write(_setup())
        for offset in range(_FLOOD_CHUNKS):
            await call.write(_chunk(offset))
        await asyncio.Event().wait()

    outcome = await _served_beside(scene, "floods of messages", flood)
    method = scene.method("InferenceService", "CountTokens")
    huge = await ask(scene.data, method, b"\x12" + bytes(_OVERSIZED_BYTES), scene.attacker.key)
    if huge.code.name != "RESOURCE_EXHAUSTED":
        return breached(f"a message of {_OVERSIZED_BYTES} bytes is taken: {reasons([huge])}")
    squeezed = await _compressed(scene)
    if squeezed.code is not grpc.StatusCode.UNIMPLEMENTED:
        return breached("a compressed message is taken, and so would be a bomb")
    return outcome


async def _compressed(scene: Scene) -> Answer:
    call: Any = scene.data.unary_unary("/kvcluster.rpc.v1.InferenceService/CountTokens")
    start = time.perf_counter()
    try:
        reply = await call(
            bytes(1024 * 1024),
            metadata=scene.attacker.key,
            compression=grpc.Compression.Gzip,
            timeout=TIMEOUT_S,
        )
    except aio.AioRpcError as error:
        return read_status(error, time.perf_counter() - start)
    return Answer(grpc.StatusCode.OK, "", b"", reply, time.perf_counter() - start)


@attack(
    tries=f"{_FLOOD_CALLS} calls at one time with guessed keys",
    breach="one is let in, or the victim is not served meanwhile",
)
async def call_flood(scene: Scene) -> Outcome:
    method = scene.method("InferenceService", "ListModels")
    plain = pb.ListModelsRequest().SerializeToString()

    async def guess() -> Answer | None:
        try:
            return await ask(scene.data, method, plain, bearer(make_secret().text))
        except ServerUnavailable:
            return None  # refused by the transport

    guesses = [asyncio.ensure_future(guess()) for _ in range(_FLOOD_CALLS)]
    fault = await scene.victim_fault()
    answers = [answer for answer in await asyncio.gather(*guesses) if answer is not None]
    if any(answer.is_answered for answer in answers):
        return breached("a guessed key is let in")
    if fault is not None:
        return breached(f"during a flood of calls {fault}")
    if not answers:
        return inconclusive("the transport refused the whole flood")
    return held("a flood of guesses is refused, and the victim served", refused=len(answers))


async def _served_beside(
    scene: Scene, what: str, spoil: Callable[[_Stream], Awaitable[None]]
) -> Outcome:
    """Whether the victim is served while `spoil` runs on all the streams that a tenant may have."""
    async with _spoiling(scene, spoil) as num_running:
        start = time.perf_counter()
        fault = await scene.victim_fault()
        took_s = time.perf_counter() - start
        still = num_running()
    if fault is not None:
        return breached(f"beside {what} {fault}")
    if not still:
        return inconclusive(f"the server ended all {what} before the victim was served")
    return held(f"the victim is served beside {what}", victim_s=took_s, streams=still)


@asynccontextmanager
async def _spoiling(
    scene: Scene, spoil: Callable[[_Stream], Awaitable[None]]
) -> AsyncIterator[Callable[[], int]]:
    """Gives how many of the streams are open still."""
    await scene.until_no_stream_is_open(scene.attacker)
    method = scene.method("InferenceService", "StreamGenerate")
    async with AsyncExitStack() as stack:
        calls = [
            await stack.enter_async_context(stream(scene.data, method, scene.attacker.key))
            for _ in range(OPEN_STREAMS)
        ]
        running = [asyncio.ensure_future(spoil(call)) for call in calls]
        try:
            # The server has seen them all before the victim comes.
            await asyncio.gather(*(call.wait_for_connection() for call in calls))
            await scene.until_streams_are_open(scene.attacker, len(calls))
            yield lambda: sum(not call.done() for call in calls)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


def _setup(**fields: int) -> bytes:
    setup = pb.GenerateRequest(**{"max_output_tokens": 1, **fields})  # type: ignore[arg-type]
    return pb.StreamGenerateRequest(setup=setup).SerializeToString()


def _chunk(offset: int) -> bytes:
    part = common_pb2.TokenInput(packed_ids=b"\x01\0\0\0")
    chunk = pb.PromptChunk(offset=offset, input=part)
    return pb.StreamGenerateRequest(chunk=chunk).SerializeToString()


ATTACKS = (
    many_small_requests,
    one_huge_request,
    slow_upload,
    idle_stream,
    window_stall,
    huge_metadata,
    message_flood,
    call_flood,
)
