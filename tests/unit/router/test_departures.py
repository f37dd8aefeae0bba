"""Clients that leave, stall or stop reading, through the real port: nothing of theirs stays."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from kvcluster.client import Client
from kvcluster.engine.api import FinishReason
from kvcluster.rpc.v1 import inference_service_pb2 as pb
from kvcluster.rpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.unit.router.fake_backend import FakeBackend, FakeGeneration
from tests.unit.router.serving import drain, refusal_of, serving, setup, text_chunk, text_of


def has_ended(generation: FakeGeneration) -> bool:
    return generation.finished is not None


def is_unread(generation: FakeGeneration) -> bool:
    return generation.num_readers == 0


class FreezingProxy:
    """Forwards TCP until `freeze`; then it keeps the connections open and passes nothing on."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    def freeze(self) -> None:
        self._flowing.clear()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for writer in self._writers:
                writer.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, upstream_writer]
        for source, target in ((reader, upstream_writer), (upstream_reader, writer)):
            self._tasks.add(asyncio.create_task(self._forward(source, target)))

    async def _forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while raw := await source.read(65536):
            await self._flowing.wait()
            target.write(raw)
            await target.drain()


async def _upload_part(stub: InferenceServiceStub, **fields: object) -> aio.StreamStreamCall:
    call = stub.StreamGenerate()
    await call.write(setup(**fields))
    await call.read()
    await call.write(text_chunk(0, "hello"))
    return call


async def test_a_cancelled_call_ends_its_generation_during_the_upload(
    stub: InferenceServiceStub, backend: FakeBackend
) -> None:
    call = await _upload_part(stub)

    call.cancel()
    await backend.until(has_ended)

    assert backend.generations["g0"].finished.reason is not FinishReason.LENGTH
    assert backend.num_held_tokens == 0


async def test_a_broken_upload_is_never_taken_for_a_complete_prompt(
    stub: InferenceServiceStub, backend: FakeBackend
) -> None:
    """grpc reports the end of the messages before it cancels the call."""
    for number in range(20):
        call = await _upload_part(stub, disconnect_grace=Duration(seconds=60))
        call.cancel()
        await backend.until(has_ended, f"g{number}")

    assert not any(generation.is_complete for generation in backend.generations.values())


async def test_a_cancelled_call_ends_its_generation_during_decode(
    client: Client, backend: FakeBackend
) -> None:
    events = client.generate(prompt="hello", max_output_tokens=100_000)
    for _ in range(10):
        await anext(events)

    await events.aclose()
    await backend.until(has_ended)

    assert backend.generations["g0"].finished.reason is FinishReason.CANCELLED


async def test_a_closed_connection_ends_its_generation(backend: FakeBackend) -> None:
    backend.gate.clear()
    async with serving(backend) as server:
        client = Client(server.address)
        events = client.generate(prompt="hello")
        await anext(events)

        await client.close()
        await backend.until(has_ended)

        assert backend.num_held_tokens == 0
        await events.aclose()


async def test_within_its_grace_a_generation_goes_on_and_can_be_resumed(
    client: Client, backend: FakeBackend
) -> None:
    events = client.generate(prompt="hello", max_output_tokens=500, disconnect_grace_s=60.0)
    seen = [await anext(events) for _ in range(10)]
    await events.aclose()
    await backend.until(is_unread)

    seen += [
        event async for event in client.resume(seen[0].generation, after_sequence=seen[-1].sequence)
    ]

    assert text_of(seen) == "hello" * 100


async def test_an_upload_that_stalls_is_given_up_with_its_generation(backend: FakeBackend) -> None:
    async with (
        serving(backend, upload_idle_timeout_s=0.1) as server,
        aio.insecure_channel(server.address) as channel,
    ):
        call = await _upload_part(InferenceServiceStub(channel))

        refusal = await refusal_of(drain(call))

    assert (refusal.code.name, refusal.reason) == ("ABORTED", "UPLOAD_STALLED")
    assert backend.generations["g0"].finished.error_kind == "UploadStalled"
    assert backend.num_held_tokens == 0


async def test_a_stream_that_never_says_a_word_is_given_up(backend: FakeBackend) -> None:
    async with (
        serving(backend, upload_idle_timeout_s=0.1) as server,
        aio.insecure_channel(server.address) as channel,
    ):
        refusal = await refusal_of(drain(InferenceServiceStub(channel).StreamGenerate()))

    assert refusal.reason == "UPLOAD_STALLED"
    assert not backend.generations


async def test_a_held_back_upload_is_not_a_stalled_one(backend: FakeBackend) -> None:
    """While the engine makes the client wait, it is not the client that is slow."""
    backend.window_tokens = 2
    backend.gate.clear()
    async with (
        serving(backend, upload_idle_timeout_s=0.1) as server,
        aio.insecure_channel(server.address) as channel,
    ):
        call = await _upload_part(InferenceServiceStub(channel))
        await call.done_writing()
        draining = asyncio.create_task(drain(call))
        await asyncio.wait({draining}, timeout=0.3)
        backend.gate.set()

        responses = await draining

    assert responses[-1].HasField("finished")


async def test_a_client_that_stops_reading_is_detached_and_can_resume(
    backend: FakeBackend,
) -> None:
    backend.output_text = "x" * 100_000
    async with (
        serving(backend, write_timeout_s=0.2) as server,
        aio.insecure_channel(server.address) as channel,
    ):
        stub = InferenceServiceStub(channel)
        call = await _upload_part(
            stub, max_output_tokens=1000, disconnect_grace=Duration(seconds=60)
        )
        await call.done_writing()
        await backend.until(is_unread)

        refusal = await refusal_of(drain(call))
        request = pb.ResumeGenerationRequest(
            name="tenants/default/generations/g0", after_sequence=1000
        )
        last = (await drain(stub.ResumeGeneration(request)))[-1]

    assert (refusal.code.name, refusal.reason) == ("ABORTED", "CLIENT_TOO_SLOW")
    assert last.HasField("finished")


async def test_a_half_open_connection_ends_what_it_carried(backend: FakeBackend) -> None:
    async with serving(backend, keepalive_s=0.2) as server:
        proxy = FreezingProxy(server.address)
        async with proxy.listening() as address, aio.insecure_channel(address) as channel:
            call = await _upload_part(InferenceServiceStub(channel))
            await backend.until(lambda generation: generation.size == 5)

            proxy.freeze()
            await asyncio.wait_for(backend.until(has_ended), timeout=10)

            assert backend.num_held_tokens == 0
            call.cancel()


async def test_a_call_whose_deadline_passes_leaves_nothing_behind(
    stub: InferenceServiceStub, backend: FakeBackend
) -> None:
    backend.gate.clear()
    call = stub.StreamGenerate(iter([setup(), text_chunk(0, "hello")]), timeout=0.2)

    with pytest.raises(aio.AioRpcError) as raised:
        await drain(call)
    await backend.until(has_ended)

    assert raised.value.code().name == "DEADLINE_EXCEEDED"
    assert backend.num_held_tokens == 0


async def test_a_client_that_leaves_while_its_request_is_opened_leaves_nothing(
    backend: FakeBackend,
) -> None:
    class SlowToOpen(FakeBackend):
        async def open(self, request: object) -> object:
            self.asked.set()
            await self.may_open.wait()
            return await super().open(request)

    slow = SlowToOpen()
    slow.asked, slow.may_open = asyncio.Event(), asyncio.Event()
    async with serving(slow) as server, aio.insecure_channel(server.address) as channel:
        call = InferenceServiceStub(channel).StreamGenerate()
        await call.write(setup())
        await slow.asked.wait()

        call.cancel()
        slow.may_open.set()
        await slow.until(has_ended)

    assert slow.num_held_tokens == 0
