"""Runs one generation for one call: feeds its prompt to the engine and its events to the client.

Both go on at the same time, in two tasks that end with the call. What is left to clean up when a
call breaks is decided here and nowhere else.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvcluster.engine.api import (
    Backend,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    GenerationState,
    Opened,
    PromptChunk,
)
from kvcluster.errors import DeadlineExceeded, KvClusterError, UploadStalled
from kvcluster.router.calls import Call
from kvcluster.router.records import event_to_proto
from kvcluster.router.status import error_of_kind, is_bug
from kvcluster.types import GenerationId, TenantId

# The engine answers `fail` with Finished at once; a client that does not read is not waited for.
_LAST_EVENT_S = 1.0
_UNFINISHED = UploadStalled("the upload ended before the prompt was complete: send it again")


@dataclass
class _Uploads:
    """The uploads into one generation that are open on this router."""

    num_open: int = 0
    has_opener: bool = False
    is_complete: bool = False


class Generating:
    """Serves Generate, StreamGenerate and ResumeGeneration.

    Its only state is which uploads are open. A retry with the same request_id uploads into the same
    generation, and the first upload breaking off must not end what the second still feeds.
    """

    def __init__(self) -> None:
        self._uploads: dict[GenerationId, _Uploads] = {}

    async def run(
        self,
        call: Call,
        backend: Backend,
        request: GenerationRequest,
        prompt: AsyncIterator[PromptChunk],
    ) -> None:
        """Open `request`, feed it `prompt` and send its events until it has ended.

        Raises the error that the upload or the generation ended with. When it is cancelled or the
        client does not read, the generation loses this reader, and fails if its prompt is
        unfinished.
        """
        opened = await self._open(backend, request)
        uploads = self._join(opened)
        feeding = asyncio.create_task(_feed(backend, opened.generation, prompt, uploads))
        following = asyncio.create_task(follow(call, backend, opened.generation, 0))
        broken: KvClusterError = _UNFINISHED
        try:
            await asyncio.wait({feeding, following}, return_when=asyncio.FIRST_COMPLETED)
            failure = feeding.exception() if feeding.done() else None
            if failure is not None:
                broken = _as_reported(failure)
                if self._is_abandoned_without(uploads):
                    await _fail(backend, opened.generation, broken)
                if await _has_ended(backend, request.tenant, opened.generation):
                    await asyncio.wait({following}, timeout=_LAST_EVENT_S)
                if not _has_other_outcome(following):
                    raise failure
            raise_if_failed(await following)
        finally:
            feeding.cancel()
            following.cancel()
            await asyncio.gather(feeding, following, return_exceptions=True)
            if self._leave(opened.generation, uploads) and not _has_finished(following):
                await _fail(backend, opened.generation, broken)

    async def _open(self, backend: Backend, request: GenerationRequest) -> Opened:
        opening = asyncio.ensure_future(backend.open(request))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The engine may hold the request already, and nobody else knows its name.
            with suppress(KvClusterError):
                opened = await opening
                if not opened.is_attached:
                    await backend.fail(
                        opened.generation, type(_UNFINISHED).__name__, _UNFINISHED.message
                    )
            raise

    def _join(self, opened: Opened) -> _Uploads:
        uploads = self._uploads.setdefault(opened.generation, _Uploads())
        uploads.num_open += 1
        uploads.has_opener |= not opened.is_attached
        return uploads

    def _leave(self, generation: GenerationId, uploads: _Uploads) -> bool:
        """End one upload. True: the prompt is unfinished, and nobody is left to finish it."""
        is_abandoned = self._is_abandoned_without(uploads)
        uploads.num_open -= 1
        if not uploads.num_open:
            del self._uploads[generation]
        return is_abandoned

    @staticmethod
    def _is_abandoned_without(uploads: _Uploads) -> bool:
        # Without the opener here, another router may hold it, or the prompt may be long complete.
        return uploads.num_open == 1 and uploads.has_opener and not uploads.is_complete


async def follow(
    call: Call, backend: Backend, generation: GenerationId, after_sequence: int
) -> Finished | None:
    """Send the events after `after_sequence`; the last one is returned, unless it came before.

    Detaches from the generation when it returns, raises or is cancelled. Raises: ClientTooSlow and
    what `Backend.watch` raises.
    """
    batches = backend.watch(call.tenant, generation, after_sequence)
    try:
        async for batch in batches:
            for event in batch:
                await call.send(event_to_proto(event, call.tenant))
                if isinstance(event.event, Finished):
                    return event.event
        return None
    finally:
        await _close(batches)


def raise_if_failed(finished: Finished | None) -> None:
    """Raise what the generation ended with, so that the call's status says it too."""
    if finished is None:
        return
    if finished.reason is FinishReason.ERROR:
        raise error_of_kind(finished.error_kind, finished.error_message)
    if finished.reason is FinishReason.DEADLINE:
        raise DeadlineExceeded("the deadline passed before the generation ended: allow more time")


async def _feed(
    backend: Backend,
    generation: GenerationId,
    prompt: AsyncIterator[PromptChunk],
    uploads: _Uploads,
) -> None:
    # The next message is read only when the engine has taken this one: that holds the client back.
    async for chunk in prompt:
        await backend.append_prompt(generation, chunk)
    await backend.finish_prompt(generation)
    uploads.is_complete = True


async def _fail(backend: Backend, generation: GenerationId, error: KvClusterError) -> None:
    # An engine that cannot be reached has lost the generation anyway.
    with suppress(KvClusterError):
        await backend.fail(generation, type(error).__name__, error.message)


async def _has_ended(backend: Backend, tenant: TenantId, generation: GenerationId) -> bool:
    try:
        state = (await backend.get(tenant, generation)).state
    except KvClusterError:
        return False
    return state not in (GenerationState.QUEUED, GenerationState.RUNNING)


def _as_reported(failure: BaseException) -> KvClusterError:
    if isinstance(failure, KvClusterError) and not is_bug(failure):
        return failure
    return KvClusterError("internal error while the prompt was read")


def _has_finished(following: asyncio.Task[Finished | None]) -> bool:
    return not following.cancelled() and following.exception() is None


def _has_other_outcome(following: asyncio.Task[Finished | None]) -> bool:
    """Whether the generation ended for a reason of its own, such as CancelGeneration."""
    if not following.done() or not _has_finished(following):
        return False
    finished = following.result()
    return finished is not None and finished.reason is not FinishReason.ERROR


@runtime_checkable
class _Closable(Protocol):
    async def aclose(self) -> None: ...


async def _close(batches: AsyncIterator[tuple[GenerationEvent, ...]]) -> None:
    if isinstance(batches, _Closable):
        await batches.aclose()
