"""Runs one generation for one call: feeds its prompt to the engine and its events to the client.

Both go on at the same time, in two tasks that end with the call. What is left to clean up when a
call breaks is decided here and nowhere else.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
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
from kvcluster.errors import DeadlineExceeded, KvClusterError, RequestIdConflict, UploadStalled
from kvcluster.router.calls import Call
from kvcluster.router.records import event_to_proto
from kvcluster.router.status import error_of_kind, is_bug
from kvcluster.types import GenerationId, TenantId

# The engine answers `fail` with Finished at once; a client that does not read is not waited for.
_LAST_EVENT_S = 1.0
_UNFINISHED = UploadStalled("the upload ended before the prompt was complete: send it again")


class Generating:
    """Serves Generate, StreamGenerate and ResumeGeneration. Keeps nothing between calls."""

    async def run(
        self,
        call: Call,
        backend: Backend,
        request: GenerationRequest,
        prompt: AsyncIterator[PromptChunk],
    ) -> None:
        """Open `request`, feed it `prompt` and send its events until it has ended.

        Raises the error that the upload or the generation ended with. When it is cancelled or the
        client does not read, the generation loses this reader and this upload. A retry's call ends
        well only once its whole prompt has been found equal.
        """
        opened = await self._open(backend, request)
        feeding = asyncio.create_task(_feed(backend, opened, prompt))
        following = asyncio.create_task(follow(call, backend, opened.generation, 0))
        broken: KvClusterError = _UNFINISHED
        try:
            await asyncio.wait({feeding, following}, return_when=asyncio.FIRST_COMPLETED)
            if opened.is_attached and _has_answer(following):
                await asyncio.wait({feeding})
            failure = feeding.exception() if feeding.done() else None
            if failure is not None:
                broken = _as_reported(failure)
                await _fail(backend, opened, broken)
                if await _has_ended(backend, request.tenant, opened.generation):
                    await asyncio.wait({following}, timeout=_LAST_EVENT_S)
                if not _explains(following, failure):
                    raise failure
            raise_if_failed(await following)
        finally:
            feeding.cancel()
            following.cancel()
            await asyncio.gather(feeding, following, return_exceptions=True)
            if feeding.cancelled() or feeding.exception() is not None:
                await _fail(backend, opened, broken)

    async def _open(self, backend: Backend, request: GenerationRequest) -> Opened:
        opening = asyncio.ensure_future(backend.open(request))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The engine may hold the request already, and nobody else knows its name.
            with suppress(KvClusterError):
                opened = await opening
                await _fail(backend, opened, _UNFINISHED)
            raise


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
        raise error_of_kind(
            finished.error_kind,
            finished.error_message,
            metadata=finished.error_metadata,
            retry_after_s=finished.error_retry_after_s,
        )
    if finished.reason is FinishReason.DEADLINE:
        raise DeadlineExceeded("the deadline passed before the generation ended: allow more time")


async def _feed(backend: Backend, opened: Opened, prompt: AsyncIterator[PromptChunk]) -> None:
    # The next message is read only when the engine has taken this one: that holds the client back.
    async for chunk in prompt:
        await backend.append_prompt(opened.generation, opened.upload, chunk)
    await backend.finish_prompt(opened.generation, opened.upload)


async def _fail(backend: Backend, opened: Opened, error: KvClusterError) -> None:
    # An engine that cannot be reached, or does not know the generation, has lost it anyway.
    with suppress(KvClusterError):
        await backend.fail(opened.generation, opened.upload, type(error).__name__, error.message)


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


def _outcome(following: asyncio.Task[Finished | None]) -> FinishReason | None:
    if not following.done() or following.cancelled() or following.exception() is not None:
        return None
    finished = following.result()
    return None if finished is None else finished.reason


def _has_answer(following: asyncio.Task[Finished | None]) -> bool:
    return _outcome(following) in (FinishReason.STOP, FinishReason.LENGTH)


def _explains(following: asyncio.Task[Finished | None], failure: BaseException) -> bool:
    """Whether the upload failed because the generation ended, such as by CancelGeneration."""
    is_end = _outcome(following) in (FinishReason.CANCELLED, FinishReason.DEADLINE)
    return is_end and not isinstance(failure, RequestIdConflict)


@runtime_checkable
class _Closable(Protocol):
    async def aclose(self) -> None: ...


async def _close(batches: AsyncIterator[tuple[GenerationEvent, ...]]) -> None:
    if isinstance(batches, _Closable):
        await batches.aclose()
