"""Takes the prompts in: each from the one upload that feeds it, while retries are compared with it.

Adds to `PromptUpload`, which knows what was sent, what needs waiting: turns, back-pressure, and
retries that follow the feeder or take its place.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from kvcluster.engine.api import GenerationRequest, PromptChunk, TextChunk
from kvcluster.engine.engine import Engine
from kvcluster.engine.generation import Generation
from kvcluster.engine.upload import (
    Content,
    PromptUpload,
    RawChunk,
    check_vocabulary,
    raw_chunk,
)
from kvcluster.errors import InvalidField, KvClusterError, PromptCorrupt, UploadStalled
from kvcluster.types import GenerationId

FEEDER_SILENCE_S = 120.0
"""A front door gives an upload up before: one that is silent for so long has died with it."""


class PromptIntake:
    """The prompts of all generations that the engine knows."""

    def __init__(
        self, engine: Engine, *, wake: Callable[[], None], feeder_silence_s: float
    ) -> None:
        """`wake` tells whoever runs the engine that it has changed."""
        self._engine = engine
        self._wake = wake
        self._feeder_silence_s = feeder_silence_s
        self._prompts: dict[GenerationId, PromptUpload] = {}

    @property
    def num_known(self) -> int:
        return len(self._prompts)

    def expect(self, generation: GenerationId, request: GenerationRequest) -> None:
        """A generation was admitted: its prompt follows as upload 0."""
        self._prompts[generation] = PromptUpload(request)

    def find(self, generation: GenerationId) -> PromptUpload:
        """Raises: GenerationNotFound."""
        self._engine.find(generation)
        return self._prompts[generation]

    async def append(self, generation: GenerationId, upload: int, chunk: PromptChunk) -> None:
        """As `Backend.append_prompt`."""
        prompt = self.find(generation)
        try:
            raw = raw_chunk(chunk)
            if upload != prompt.feeder:
                rest = await self._compared(prompt, generation, upload, raw)
                if rest is None:
                    return
                raw, chunk = rest, rest.prompt_chunk()
            await self._take(generation, upload, chunk, raw)
        except KvClusterError as error:
            self.leave(generation, upload, error)
            raise
        await self._wait_for_room(self._engine.find(generation))

    async def finish(self, generation: GenerationId, upload: int) -> None:
        """As `Backend.finish_prompt`."""
        prompt = self.find(generation)
        if prompt.is_complete and upload == prompt.feeder:
            return
        try:
            if upload == prompt.feeder or not await self._retry_ended(prompt, generation, upload):
                await self._complete(generation, upload)
        except KvClusterError as error:
            self.leave(generation, upload, error)
            raise

    def leave(self, generation: GenerationId, upload: int, error: KvClusterError) -> None:
        """As `Backend.fail`: an upload is over because of `error`. Again changes nothing."""
        prompt = self.find(generation)
        if prompt.leave(upload):
            if prompt.has_retries:
                # What was wrong with one upload need not be wrong with the others.
                error = UploadStalled("another upload of this request broke: send it again")
            self._engine.fail(generation, error)
        self._note_change(generation)

    def forget_expired(self) -> bool:
        """Forget what the engine has forgotten, once that is worth it. Returns whether it was."""
        if len(self._prompts) <= 2 * self._engine.num_known + 64:
            return False
        self._prompts = {
            generation: prompt
            for generation, prompt in self._prompts.items()
            if self._engine.knows(generation)
        }
        return True

    async def _take(
        self, generation: GenerationId, upload: int, chunk: PromptChunk, raw: RawChunk
    ) -> None:
        async with self._feeding(generation, upload) as prompt:
            _check_continues(prompt, raw)
            if not isinstance(chunk, TextChunk):
                check_vocabulary(chunk.packed_ids, self._engine.parts.spec.vocab_size)
            prompt.is_broken = isinstance(chunk, TextChunk)
            packed_ids = await prompt.encode(chunk, self._engine.parts.tokenizer)
            self._engine.append_prompt(generation, packed_ids)
            prompt.add(raw)
            prompt.is_broken = False

    async def _complete(self, generation: GenerationId, upload: int) -> None:
        async with self._feeding(generation, upload) as prompt:
            prompt.is_broken = bool(prompt.content.is_text)
            self._engine.append_prompt(generation, await prompt.finish())
            self._engine.finish_prompt(generation)
            prompt.is_complete = True

    @asynccontextmanager
    async def _feeding(self, generation: GenerationId, upload: int) -> AsyncIterator[PromptUpload]:
        """The turn of the upload that feeds the prompt; whoever waits for it looks again after."""
        prompt = self.find(generation)
        try:
            async with prompt.lock:
                self._engine.find(generation).raise_if_ended()
                if upload != prompt.feeder:
                    raise UploadStalled("another upload took over: send the prompt again")
                yield prompt
        finally:
            if self._engine.knows(generation):
                self._note_change(generation)

    async def _wait_for_room(self, generation: Generation) -> None:
        while not generation.log.is_finished and not self._engine.prompt_room(generation.id):
            await generation.room.wait()
        generation.raise_if_ended()

    async def _compared(
        self, prompt: PromptUpload, generation: GenerationId, upload: int, chunk: RawChunk
    ) -> RawChunk | None:
        """Compare a retry's chunk. Returns the rest of it when the retry is the feeder now."""
        retry = prompt.retry(upload)
        _check_follows(retry, chunk)
        if await self._is_held(prompt, generation, lambda: chunk.end <= prompt.end):
            if chunk.end > prompt.end:
                raise prompt.conflict()
            prompt.compare(upload, chunk)
            return None
        head, rest = chunk.split(prompt.end)
        prompt.compare(upload, head)
        prompt.take_over(upload)
        return rest

    async def _retry_ended(
        self, prompt: PromptUpload, generation: GenerationId, upload: int
    ) -> bool:
        """Compare the length of a retry. False: it is the feeder now, and the prompt is as long."""
        retry = prompt.retry(upload)
        if await self._is_held(prompt, generation, lambda: retry.end < prompt.end):
            prompt.finish_retry(upload)
            return True
        prompt.take_over(upload)
        return False

    async def _is_held(
        self, prompt: PromptUpload, generation: GenerationId, is_reached: Callable[[], bool]
    ) -> bool:
        """Wait until the prompt is complete or as long as is asked. False: its feeder is gone, and
        a retry may take over now. Raises: what ended the generation."""
        found = self._engine.find(generation)
        while not prompt.is_complete and not is_reached():
            found.raise_if_ended()
            if prompt.feeder is None and not prompt.lock.locked():
                return False
            try:
                async with asyncio.timeout(self._feeder_silence_s):
                    await found.room.wait()
            except TimeoutError:
                # Its front door died without a word; one that the engine holds back is alive.
                if self._engine.prompt_room(generation) and not prompt.lock.locked():
                    prompt.feeder = None
        return True

    def _note_change(self, generation: GenerationId) -> None:
        self._engine.find(generation).room.notify()
        self._wake()


def _check_continues(prompt: PromptUpload, chunk: RawChunk) -> None:
    if prompt.is_broken:
        raise PromptCorrupt("an earlier chunk was taken in half: send the prompt again")
    if prompt.content.is_text is not None and prompt.content.is_text != chunk.is_text:
        raise InvalidField("prompt", "text and token ids cannot be mixed in one prompt")
    _check_follows(prompt.content, chunk)


def _check_follows(content: Content, chunk: RawChunk) -> None:
    if chunk.start != content.end:
        kind = "gap" if chunk.start > content.end else "overlap"
        raise PromptCorrupt(
            f"chunk at offset {chunk.start} does not continue the prompt, which ends at "
            f"{content.end} ({kind}): send the prompt again",
            metadata={"offset": str(chunk.start), "expected_offset": str(content.end)},
        )
