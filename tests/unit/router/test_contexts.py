"""ContextService through a real port, in front of a real engine on a fake ring."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import aio

from kvcluster.client import Client
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import Finished, Output
from kvcluster.engine.context_api import ContextChange, ContextState
from kvcluster.errors import (
    ContextNotFound,
    EtagMismatch,
    InvalidField,
    ResourceExists,
)
from kvcluster.rpc.v1 import common_pb2, inference_service_pb2
from kvcluster.rpc.v1 import context_service_pb2 as pb
from kvcluster.rpc.v1.context_service_pb2_grpc import ContextServiceStub
from tests.fake_engine import CharacterTokenizer, FakeCluster, model_spec, packed
from tests.unit.engine.serving import Served, serve
from tests.unit.engine.test_engine_simulation import CODECS, MENU
from tests.unit.router.serving import refusal_of, serving

TOKENS = [position * position % 120 + 1 for position in range(42)]
SUFFIX = [7, 8, 9]


@dataclass(frozen=True)
class Front:
    """A client of a router, and the engine behind it."""

    client: Client
    stub: ContextServiceStub
    served: Served

    async def generate(self, prompt: list[int], **options: object) -> tuple[list[int], int]:
        """Output ids, and how many tokens of the input were cached."""
        output, cached = list[int](), -1
        async for event in self.client.generate(
            prompt_ids=prompt,
            max_output_tokens=4,
            **options,  # type: ignore[arg-type]
        ):
            if isinstance(event.event, Output):
                output += event.event.token_ids
            if isinstance(event.event, Finished):
                cached = event.event.usage.cached_input_tokens
        return output, cached


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    fake = FakeCluster(
        spec=model_spec(eos_token_ids=(), max_context_tokens=200),
        cache=CacheConfig(block_size=4, exact_recent_tokens=8),
        config=EngineConfig(prefill_chunk_tokens=8, shard_min_tokens=16, upload_window_chunks=2),
        tokenizer=CharacterTokenizer(),
        menu=MENU,
        encoded_per_page={name: [count] for name, count in CODECS.items()},
    )
    async for served in serve(fake):
        async with (
            serving(served.service) as server,
            Client(server.address) as client,
            aio.insecure_channel(server.address) as channel,
        ):
            yield Front(client, ContextServiceStub(channel), served)


def setup(context_id: str = "book", **fields: object) -> pb.UploadContextRequest:
    return pb.UploadContextRequest(
        setup=pb.UploadContextRequest.Setup(
            parent="tenants/default", context_id=context_id, **fields
        )
    )


def chunk(offset: int, ids: list[int], **fields: int) -> pb.UploadContextRequest:
    return pb.UploadContextRequest(
        chunk=inference_service_pb2.PromptChunk(
            offset=offset, input=common_pb2.TokenInput(packed_ids=packed(ids)), **fields
        )
    )


async def received(front: Front) -> int:
    try:
        return (await front.client.get_context("book")).received_tokens
    except ContextNotFound:
        return 0


async def test_a_context_is_uploaded_once_and_generated_on_again_and_again(front: Front) -> None:
    record = await front.client.upload_context(
        "book", prompt_ids=TOKENS, display_name="A book", policy="half", ttl_s=3600
    )
    found = [await front.generate([own, *SUFFIX], context="book") for own in (1, 2, 3)]

    assert record.context_id == "tenants/default/contexts/book"
    assert (record.state, record.token_count, record.policy) == (ContextState.ACTIVE, 42, "half")
    assert record.compression_ratio > 1
    assert record.expire_time_s is not None
    assert found == [(front.served.expected([*TOKENS, own, *SUFFIX]), 40) for own in (1, 2, 3)]


async def test_an_upload_that_breaks_goes_on_where_it_was(front: Front) -> None:
    call = front.stub.UploadContext()
    await call.write(setup())
    await call.write(chunk(0, TOKENS[:16]))
    while await received(front) < 16:
        pass
    call.cancel()
    assert (await front.client.get_context("book")).state is ContextState.CREATING

    record = await front.client.upload_context("book", prompt_ids=TOKENS)

    assert (record.state, record.token_count) == (ContextState.ACTIVE, 42)
    assert await front.generate(SUFFIX, context="book") == (
        front.served.expected([*TOKENS, *SUFFIX]),
        40,
    )


async def test_contexts_are_continued_and_forked(front: Front) -> None:
    await front.client.upload_context("book", prompt_ids=TOKENS)
    fork = await front.client.fork_context("book", "short", prefix_tokens=20)
    longer = await front.client.append_context("book", prompt_ids=[5, 6, 7])

    assert (fork.token_count, longer.token_count) == (20, 45)
    assert (await front.generate(SUFFIX, context="short"))[0] == front.served.expected(
        [*TOKENS[:20], *SUFFIX]
    )
    assert (await front.generate(SUFFIX, context="book"))[0] == front.served.expected(
        [*TOKENS, 5, 6, 7, *SUFFIX]
    )
    with pytest.raises(ResourceExists):
        await front.client.fork_context("book", "short")


async def test_text_is_uploaded_and_continued(front: Front) -> None:
    await front.client.upload_context("book", prompt="once upon a time")
    record = await front.client.append_context("book", prompt=" there was a cache")
    whole = [*map(ord, "once upon a time there was a cache")]

    assert record.token_count == len(whole)
    assert (await front.generate(SUFFIX, context="book"))[0] == front.served.expected(
        [*whole, *SUFFIX]
    )


async def test_lists_come_in_pages_and_through_filters(front: Front) -> None:
    for number in range(5):
        await front.client.upload_context(
            f"book-{number}", prompt_ids=TOKENS[: 8 + number], pinned=number % 2 == 0
        )
    ids = [record.context_id async for record in front.client.list_contexts()]
    pinned = [
        record.context_id[-1]
        async for record in front.client.list_contexts(filter_text="pinned=true AND state=ACTIVE")
    ]
    page = await front.stub.ListContexts(
        pb.ListContextsRequest(parent="tenants/default", page_size=2)
    )
    rest = await front.stub.ListContexts(
        pb.ListContextsRequest(
            parent="tenants/default", page_size=1000, page_token=page.next_page_token
        )
    )

    assert [name[-1] for name in ids] == ["0", "1", "2", "3", "4"]
    assert pinned == ["0", "2", "4"]
    assert [context.name for context in (*page.contexts, *rest.contexts)] == ids
    assert rest.next_page_token == ""


async def test_updates_change_what_the_mask_names(front: Front) -> None:
    record = await front.client.upload_context("book", prompt_ids=TOKENS, ttl_s=60)
    changed = await front.stub.UpdateContext(
        pb.UpdateContextRequest(
            context=pb.Context(
                name=record.context_id, etag=record.etag, display_name="New", pinned=True
            ),
            update_mask=FieldMask(paths=["pinned"]),
        )
    )
    assert (changed.pinned, changed.display_name) == (True, "")
    with pytest.raises(EtagMismatch):
        await front.client.update_context(
            "book", ContextChange(display_name="New"), etag=record.etag
        )
    kept = await front.client.update_context("book", ContextChange(keeps_for_ever=True))

    assert kept.expire_time_s is None
    with pytest.raises(InvalidField, match="display_name"):
        await front.client.update_context("book", ContextChange(display_name="x" * 201))


async def test_delete_returns_when_the_ranks_hold_nothing(front: Front) -> None:
    await front.client.upload_context("book", prompt_ids=[121, 122, 123, 124] * 4)
    assert 122 in front.served.fake.ring.tokens_on_ranks()
    await front.client.delete_context("book")

    assert 122 not in front.served.fake.ring.tokens_on_ranks()
    with pytest.raises(ContextNotFound):
        await front.client.get_context("book")
    with pytest.raises(ContextNotFound):
        await front.generate(SUFFIX, context="book")


async def test_anothers_context_and_none_get_the_same_answer(front: Front) -> None:
    """The caller is `default`. Names of another tenant, and names that are not there."""
    await front.client.upload_context("book", prompt_ids=TOKENS)
    stub = front.stub
    inference = front.client._stub
    for call in (
        lambda name: stub.GetContext(pb.GetContextRequest(name=name)),
        lambda name: stub.DeleteContext(pb.DeleteContextRequest(name=name)),
        lambda name: stub.ForkContext(pb.ForkContextRequest(name=name, context_id="own")),
        lambda name: stub.UpdateContext(
            pb.UpdateContextRequest(context=pb.Context(name=name, pinned=True))
        ),
        lambda name: inference.Generate(
            inference_service_pb2.GenerateRequest(
                context=name,
                max_output_tokens=1,
                prompt=common_pb2.TokenInput(packed_ids=packed(SUFFIX)),
            )
        ).read(),
    ):
        answers = [
            await refusal_of(call(name))
            for name in ("tenants/blue/contexts/book", "tenants/default/contexts/nothing")
        ]
        assert answers[0].status == answers[1].status
        assert answers[0].code is grpc.StatusCode.NOT_FOUND
        assert answers[0].reason == "CONTEXT_NOT_FOUND"


@pytest.mark.parametrize(
    ("messages", "reason", "text"),
    [
        ([chunk(0, [1])], "INVALID_FIELD", "must be the first message"),
        ([setup("No")], "INVALID_FIELD", "want 1 to 63 of the characters"),
        ([setup(), setup()], "INVALID_FIELD", "must be a chunk"),
        ([setup()], "INVALID_FIELD", "is empty"),
        ([setup(), chunk(3, [1])], "PROMPT_CORRUPT", "go on there"),
        ([setup(), chunk(0, [1], crc32c=1)], "PROMPT_CORRUPT", "damaged"),
        ([setup(), chunk(0, [128])], "INVALID_FIELD", "ids of the vocabulary"),
        ([setup(total_tokens=201)], "CONTEXT_TOO_LONG", "the limit is 200"),
        ([setup(context=pb.Context(policy="nothing"))], "INVALID_FIELD", "nothing"),
        ([setup(context=pb.Context(model="other"))], "MODEL_NOT_FOUND", "other"),
    ],
)
async def test_bad_uploads_are_refused(
    front: Front, messages: list[pb.UploadContextRequest], reason: str, text: str
) -> None:
    refusal = await refusal_of(front.stub.UploadContext(iter(messages)))

    assert refusal.reason == reason
    assert text in refusal.message


async def test_other_tokens_than_before_are_refused(front: Front) -> None:
    call = front.stub.UploadContext()
    await call.write(setup())
    await call.write(chunk(0, TOKENS[:16]))
    await call.write(chunk(99, TOKENS[:1]))
    await refusal_of(call)
    again = await refusal_of(front.stub.UploadContext(iter([setup(), chunk(0, [1, 1, 1])])))

    assert again.reason == "PROMPT_CORRUPT"
    assert "not those that came before" in again.message


async def test_what_a_request_does_with_kept_blocks_is_its_choice(front: Front) -> None:
    expected = front.served.expected(TOKENS)
    assert await front.generate(TOKENS, cache_mode="read_only") == (expected, 0)
    assert await front.generate(TOKENS) == (expected, 0)
    assert await front.generate(TOKENS, cache_namespace="someone") == (expected, 0)
    assert await front.generate(TOKENS, cache_mode="bypass") == (expected, 0)
    assert await front.generate(TOKENS) == (expected, 40)


async def test_the_only_engine_is_not_asked_for_a_record_before_each_call(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    await front.client.upload_context("book", prompt_ids=TOKENS)

    async def never(*_: object) -> None:
        raise AssertionError("it looks at every block of the context")

    monkeypatch.setattr(front.served.service, "get_context", never)
    await front.generate(SUFFIX, context="book")
    await front.client.fork_context("book", "copy")
    await front.client.delete_context("copy")
    with pytest.raises(ContextNotFound):
        await front.generate(SUFFIX, context="copy")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "text", "ttl_s": float("nan")}, "duration"),
        ({"prompt": "text", "ttl_s": 0.0}, "context.ttl"),
        ({"prompt": "text", "ttl_s": -5.0}, "context.ttl"),
        ({"prompt": ""}, "is empty"),
        ({"prompt": "a lone \ud800"}, "UTF-8"),
        ({}, "prompt"),
    ],
)
async def test_what_is_wrong_with_an_upload_is_said_before_it_is_sent_or_by_the_server(
    options: dict[str, Any], said: str, front: Front
) -> None:
    with pytest.raises(InvalidField, match=said):
        await front.client.upload_context("book", **options)


@pytest.mark.parametrize("prefix_tokens", [-1, 1 << 64])
async def test_a_fork_of_an_impossible_length_is_refused(prefix_tokens: int, front: Front) -> None:
    with pytest.raises(InvalidField, match="prefix_tokens"):
        await front.client.fork_context("book", "copy", prefix_tokens=prefix_tokens)


def test_the_services_messages_are_described() -> None:
    """Reflection builds stubs from the file: it has every RPC of the CLI."""
    service = pb.DESCRIPTOR.services_by_name["ContextService"]

    assert [method.name for method in service.methods] == [
        "UploadContext",
        "GetContext",
        "ListContexts",
        "UpdateContext",
        "ForkContext",
        "DeleteContext",
    ]
    assert Path(pb.DESCRIPTOR.name).name == "context_service.proto"
