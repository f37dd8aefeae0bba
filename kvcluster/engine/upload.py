"""The upload of one prompt, and of its retries: a client that retries with the same request_id
sends the prompt again, to be compared and not to be run again.
"""

import asyncio
import hashlib
from array import array
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvcluster.engine.api import GenerationRequest, PromptChunk, TextChunk, TokenChunk
from kvcluster.engine.request import TOKEN_BYTES
from kvcluster.engine.text import PromptEncoder, Tokenizer
from kvcluster.errors import InvalidField, RequestIdConflict, UploadStalled

DIGEST_STRIDE_BYTES = 65_536
THREAD_MIN_CHARS = 16_384
"""Text from this length on is encoded in a thread, so that steps go on meanwhile."""


class RawChunk(NamedTuple):
    """A chunk as it counts for continuity and comparison."""

    is_text: bool
    start: int
    """Bytes of text, or tokens."""
    end: int
    raw: bytes

    def split(self, at: int) -> "tuple[RawChunk, RawChunk]":
        """The parts before and after position `at`, which is inside the chunk."""
        cut = (at - self.start) * (1 if self.is_text else TOKEN_BYTES)
        return (
            self._replace(end=at, raw=self.raw[:cut]),
            self._replace(start=at, raw=self.raw[cut:]),
        )

    def prompt_chunk(self) -> PromptChunk:
        """As it was sent. Of text, whole characters only."""
        if self.is_text:
            return TextChunk(self.start, self.raw.decode())
        return TokenChunk(self.start, self.raw)


def raw_chunk(chunk: PromptChunk) -> RawChunk:
    """Raises: InvalidField for text that has no UTF-8 form and ids that are not whole."""
    if isinstance(chunk, TextChunk):
        try:
            raw = chunk.text.encode()
        except UnicodeEncodeError as broken:
            raise InvalidField(
                "prompt.text", "want valid Unicode, got a lone surrogate"
            ) from broken
        return RawChunk(is_text=True, start=chunk.offset, end=chunk.offset + len(raw), raw=raw)
    num_tokens, rest = divmod(len(chunk.packed_ids), TOKEN_BYTES)
    if rest:
        raise InvalidField(
            "prompt.packed_ids", f"want {TOKEN_BYTES} bytes a token, {rest} are over"
        )
    return RawChunk(
        is_text=False,
        start=chunk.offset,
        end=chunk.offset + num_tokens,
        raw=chunk.packed_ids,
    )


def check_vocabulary(packed_ids: bytes, vocab_size: int) -> None:
    """Raises: InvalidField when an id is not in the vocabulary."""
    ids = np.frombuffer(packed_ids, dtype="<u4")
    if ids.size and (largest := int(ids.max())) >= vocab_size:
        raise InvalidField(
            "prompt.packed_ids",
            f"want ids of the vocabulary, 0 to {vocab_size - 1}, got {largest}",
        )


class Content:
    """What one upload has sent so far, as digests: small, and independent of how it was cut."""

    def __init__(self) -> None:
        self.is_text: bool | None = None
        self.end = 0
        """Bytes of text, or tokens."""
        self._num_bytes = 0
        self._hash = hashlib.blake2b(digest_size=16)

    @property
    def stride(self) -> int:
        """Number of whole strides."""
        return self._num_bytes // DIGEST_STRIDE_BYTES

    def digest(self) -> bytes:
        """Of everything up to the end."""
        return self._hash.digest()

    def add(self, chunk: RawChunk) -> list[bytes]:
        """Returns the digest of everything before it at each end of a stride that it reaches."""
        if chunk.raw:
            self.is_text = chunk.is_text
        self.end = chunk.end
        reached = []
        view = memoryview(chunk.raw)
        while view:
            room = DIGEST_STRIDE_BYTES - self._num_bytes % DIGEST_STRIDE_BYTES
            piece, view = view[:room], view[room:]
            self._hash.update(piece)
            self._num_bytes += len(piece)
            if len(piece) == room:
                reached.append(self.digest())
        return reached


class PromptUpload:
    """The prompt of one generation: what feeds it, and the retries that are compared with it.

    Upload 0 is the first. Each retry has a number of its own; it feeds the prompt only when the
    upload that did is gone, from where that one stopped, and only when it was equal up to there.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.lock = asyncio.Lock()
        """Held while a chunk is taken in: chunks are encoded in order."""
        self.is_complete = False
        self.is_broken = False
        """A chunk is taken in half: the encoder's state is not known."""
        self.is_cancelled = False
        """Its owner ended the generation by name."""
        self.feeder: int | None = 0
        """The upload that is run; None: it is gone, and the next retry takes over."""
        self.content = Content()
        self._strides: list[bytes] = []
        self._retries: dict[int, Content] = {}
        self._num_uploads = 1
        self._encoder: PromptEncoder | None = None
        self._num_encoded_chars = 0

    @property
    def end(self) -> int:
        return self.content.end

    @property
    def has_retries(self) -> bool:
        """Whether a retry is under way."""
        return bool(self._retries)

    def add_retry(self) -> int:
        """Expect the prompt once more, from its beginning. Returns the number of that upload."""
        upload = self._num_uploads
        self._num_uploads += 1
        self._retries[upload] = Content()
        return upload

    def retry(self, upload: int) -> Content:
        """Raises: UploadStalled for an upload that is over."""
        found = self._retries.get(upload)
        if found is None:
            raise UploadStalled("this upload was given up: send the prompt again")
        return found

    def add(self, chunk: RawChunk) -> None:
        """The feeder's chunk has been taken in."""
        self._strides += self.content.add(chunk)

    def leave(self, upload: int) -> bool:
        """The upload is over. True: nobody is left who could complete the prompt."""
        self._retries.pop(upload, None)
        if self.is_complete:
            return False
        if upload == self.feeder:
            self.feeder = None
        return self.feeder is None and (self.is_broken or not self._retries)

    def compare(self, upload: int, chunk: RawChunk) -> None:
        """Compare a retry's next chunk, which ends where the content does or before.

        Exact at each end of a stride, in `finish_retry` and in `take_over`; nothing depends on
        what a retry sent before one of them.
        Raises: RequestIdConflict.
        """
        retry = self.retry(upload)
        first = retry.stride
        reached = retry.add(chunk)
        is_mixed = self.content.is_text is not None and chunk.is_text != self.content.is_text
        if is_mixed or reached != self._strides[first : first + len(reached)]:
            raise self.conflict()

    def finish_retry(self, upload: int) -> None:
        """A retry has sent all of its prompt. Raises: RequestIdConflict."""
        self._check_equal(self.retry(upload))
        del self._retries[upload]

    def take_over(self, upload: int) -> None:
        """Make a retry, compared up to the end of the content, the feeder.

        Raises: RequestIdConflict."""
        self._check_equal(self.retry(upload))
        del self._retries[upload]
        self.feeder = upload

    def conflict(self) -> RequestIdConflict:
        return RequestIdConflict(
            f"request_id {self.request.request_id!r} was used with another prompt: use a new one"
        )

    def _check_equal(self, retry: Content) -> None:
        if retry.end != self.end or retry.digest() != self.content.digest():
            raise self.conflict()

    async def encode(self, chunk: PromptChunk, tokenizer: Tokenizer | None) -> bytes:
        """The packed ids that the chunk makes certain. Raises: InvalidField."""
        if not isinstance(chunk, TextChunk):
            return chunk.packed_ids
        if tokenizer is None:
            raise InvalidField("prompt.text", "this model has no tokenizer: send token ids")
        if self._encoder is None:
            self._encoder = tokenizer.prompt_encoder()
        return await self._encoded(self._encoder, chunk.text)

    async def finish(self) -> bytes:
        """The packed ids that were held back."""
        encoder, self._encoder = self._encoder, None
        if encoder is None:
            return b""
        return await self._in_turn(lambda: array("I", encoder.finish()).tobytes())

    async def _encoded(self, encoder: PromptEncoder, text: str) -> bytes:
        self._num_encoded_chars += len(text)
        return await self._in_turn(
            lambda: array("I", encoder.push(text)).tobytes(), num_chars=len(text)
        )

    async def _in_turn(self, encode: Callable[[], bytes], num_chars: int | None = None) -> bytes:
        # How much an encoder holds back is its own business: no more than it was given.
        if (self._num_encoded_chars if num_chars is None else num_chars) < THREAD_MIN_CHARS:
            return encode()
        return await asyncio.to_thread(encode)
