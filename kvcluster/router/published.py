"""Published prefixes: the operators' RPCs for them, and what keeps them resident in every engine.

What is published is in the tenants' database. In an engine it is a pinned context of the tenant
`PUBLISHED`, for which there is no credential.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from google.protobuf.empty_pb2 import Empty

from kvcluster.engine.api import Backend, PromptChunk, TextChunk, TokenChunk
from kvcluster.engine.context_api import ContextRecord, ContextRequest, ContextState
from kvcluster.errors import ContextNotFound, KvClusterError, ModelNotFound, PermissionDenied
from kvcluster.log import get_logger
from kvcluster.router import convert, names, paging
from kvcluster.router.calls import Call
from kvcluster.router.tenant_records import published_to_proto
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.published import PublishedPrefix
from kvcluster.tenancy.store import TenantStore
from kvcluster.tenancy.tenant import Act, KeyRole, check_id
from kvcluster.types import PUBLISHED

SYNC_INTERVAL_S = 1.0
_PART_TOKENS = 1 << 18
_PART_CHARS = 1 << 18
_THERE = (ContextState.ACTIVE, ContextState.CREATING)

ResultT = TypeVar("ResultT")
_log = get_logger(__name__)


class PublishedPrefixes:
    """Serves what is published of `store` to the engines. Holds nothing of it."""

    def __init__(self, store: TenantStore, backends: Sequence[Backend]) -> None:
        self._store = store
        self._backends = tuple(backends)
        self._busy = asyncio.Lock()

    async def run(self) -> None:
        """Bring back what engines lack, and take away what was withdrawn, until cancelled."""
        while True:
            try:
                async with self._busy:
                    await self._sync()
            except KvClusterError as error:
                _log.warning("publishing_put_off", error=type(error).__name__)
            await asyncio.sleep(SYNC_INTERVAL_S)

    async def publish(self, message: pb.PublishPrefixRequest, call: Call) -> pb.PublishedPrefix:
        """Raises: ResourceExists, ModelNotFound, and what the engines refuse it for."""
        _check_operator(call)
        check_id("published_prefix_id", message.published_prefix_id)
        part = convert.part_from_proto(message.content, field="content")
        is_text = isinstance(part.chunk, TextChunk)
        prefix = PublishedPrefix(
            prefix=message.published_prefix_id,
            model=message.published_prefix.model,
            policy=message.published_prefix.policy,
            text=part.raw.decode() if is_text else "",
            packed_ids=b"" if is_text else bytes(part.raw),
        )
        async with self._busy:
            engines = await self._engines_of(prefix)
            if not engines:
                raise ModelNotFound(f"model {prefix.model!r} is not served here")
            act = _act(call, "PublishPrefix")
            made = await _in_thread(lambda: self._store.publish(prefix, act))
            try:
                for engine in engines:
                    await _upload(engine, made)
            except KvClusterError:
                undo = _act(call, "WithdrawPrefix")
                await _in_thread(lambda: self._store.withdraw(made.prefix, undo))
                await self._remove(made)
                raise
        _log.info("admin_act", method=act.method, prefix=made.prefix)
        return await self._told(made)

    async def list_all(
        self, message: pb.ListPublishedPrefixesRequest, call: Call
    ) -> pb.ListPublishedPrefixesResponse:
        _check_operator(call)
        kept = [each for each in await _in_thread(self._store.published) if not each.is_withdrawn]
        page = paging.page_of(
            kept,
            key=lambda each: each.prefix,
            page_size=message.page_size,
            page_token=message.page_token,
        )
        return pb.ListPublishedPrefixesResponse(
            published_prefixes=[await self._told(each) for each in page.items],
            next_page_token=page.next_token,
        )

    async def withdraw(self, message: pb.WithdrawPrefixRequest, call: Call) -> Empty:
        """Raises: ResourceNotFound."""
        _check_operator(call)
        prefix, act = names.published_of(message.name), _act(call, "WithdrawPrefix")
        async with self._busy:
            withdrawn = await _in_thread(lambda: self._store.withdraw(prefix, act))
            await self._remove(withdrawn)
        _log.info("admin_act", method=act.method, prefix=prefix)
        return Empty()

    async def _sync(self) -> None:
        for prefix in await _in_thread(self._store.published):
            try:
                await self._bring_about(prefix)
            except KvClusterError as error:
                # The others do not depend on it.
                _log.warning("publishing_put_off", prefix=prefix.prefix, error=type(error).__name__)

    async def _bring_about(self, prefix: PublishedPrefix) -> None:
        """Have it in all engines, or in none."""
        if prefix.is_withdrawn:
            await self._remove(prefix)
            return
        for engine in await self._engines_of(prefix):
            found = (await _records(engine)).get(prefix.prefix)
            if found is not None and found.state is ContextState.FAILED:
                # It goes nowhere from there.
                await engine.delete_context(PUBLISHED, prefix.prefix, "")
                found = None
            if found is None or found.state not in _THERE:
                await _upload(engine, prefix)

    async def _engines_of(self, prefix: PublishedPrefix) -> list[Backend]:
        """Those that serve the prefix's model."""
        status = await asyncio.gather(*(backend.status() for backend in self._backends))
        return [
            backend
            for backend, told in zip(self._backends, status, strict=True)
            if prefix.model in ("", told.model.name)
        ]

    async def _remove(self, prefix: PublishedPrefix) -> None:
        for engine in await self._engines_of(prefix):
            with suppress(ContextNotFound):
                await engine.delete_context(PUBLISHED, prefix.prefix, "")
        await _in_thread(lambda: self._store.forget_prefix(prefix.prefix))

    async def _told(self, prefix: PublishedPrefix) -> pb.PublishedPrefix:
        engines = await self._engines_of(prefix)
        found = [(await _records(engine)).get(prefix.prefix) for engine in engines]
        return published_to_proto(prefix, found)


async def _records(engine: Backend) -> Mapping[str, ContextRecord]:
    return {record.context_id: record for record in await engine.list_contexts(PUBLISHED)}


async def _upload(engine: Backend, prefix: PublishedPrefix) -> None:
    """Have an engine compute the prefix, or what it lacks of it; returns when all of it is there.

    Raises: what the engine refuses it for.
    """
    request = ContextRequest(
        tenant=PUBLISHED,
        context_id=prefix.prefix,
        policy=prefix.policy,
        display_name="published",
        pinned=True,
    )
    opened = await engine.open_context(request)
    for chunk in _chunks(prefix, opened.record):
        await engine.append_context(PUBLISHED, prefix.prefix, opened.upload, chunk)
    await engine.finish_context(PUBLISHED, prefix.prefix, opened.upload)


def _chunks(prefix: PublishedPrefix, there: ContextRecord) -> list[PromptChunk]:
    """What is not there yet, in parts."""
    if prefix.packed_ids:
        width = convert.BYTES_PER_ID
        ids, start = prefix.packed_ids, there.received_tokens
        return [
            TokenChunk(at, ids[at * width : (at + _PART_TOKENS) * width])
            for at in range(start, len(ids) // width, _PART_TOKENS)
        ]
    rest, offset = prefix.text.encode()[there.received_bytes :].decode(), there.received_bytes
    chunks: list[PromptChunk] = []
    for at in range(0, len(rest), _PART_CHARS):
        text = rest[at : at + _PART_CHARS]
        chunks.append(TextChunk(offset, text))
        offset += len(text.encode())
    return chunks


def _check_operator(call: Call) -> None:
    if call.caller.role is not KeyRole.OPERATOR:
        raise PermissionDenied("permission denied: published prefixes are the operators'")


def _act(call: Call, method: str) -> Act:
    return Act(principal=call.caller.principal, method=method, peer=call.peer)


async def _in_thread(act: Callable[[], ResultT]) -> ResultT:
    return await asyncio.to_thread(act)
