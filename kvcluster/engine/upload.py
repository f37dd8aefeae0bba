"""The upload of one prompt, and of its copies: a client that retries with the same request_id
sends the prompt again, to be compared and not to be run again.
"""

import asyncio
import hashlib
from array import array
from typing import NamedTuple, NoReturn

import numpy as np

from kvcluster.engine.api import GenerationRequest, PromptChunk, TextChunk
from kvcluster.engine.request import TOKEN_BYTES
from kvcluster.engine.text import PromptEncoder, Tokenizer
from kvcluster.errors import InvalidField, RequestIdConflict

DIGEST_STRIDE_BYTES = 65_536
MAX_COPIES = 16
"""Copies of one prompt that may be on their way; of more, the oldest is no longer compared."""
THREAD_MIN_CHARS = 16_384
"""Text from this length on is encoded in a thread, so that steps go on meanwhile."""


class RawChunk(NamedTuple):
    """A chunk as it counts for continuity and comparison."""

    is_text: bool
    start: int
    """Bytes of text, or tokens."""
    end: int
    raw: bytes


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


class ContentDigest:
    """Digests of a byte stream, one per stride, whatever the pieces it comes in.

    So two uploads that are cut differently can be compared while both are on their way.
    """

    def __init__(self, *, stride_bytes: int = DIGEST_STRIDE_BYTES) -> None:
        self.strides: list[bytes] = []
        self._stride_bytes = stride_bytes
        self._hash = hashlib.blake2b(digest_size=16)
        self._room = stride_bytes

    def update(self, raw: bytes) -> None:
        view = memoryview(raw)
        while view:
            piece, view = view[: self._room], view[self._room :]
            self._hash.update(piece)
            self._room -= len(piece)
            if not self._room:
                self._close_stride()

    def finish(self) -> None:
        """Close the last stride, however long it is."""
        self._close_stride()

    def _close_stride(self) -> None:
        self.strides.append(self._hash.digest())
        self._hash = hashlib.blake2b(digest_size=16)
        self._room = self._stride_bytes


class PromptCopy:
    """One upload's content so far."""

    def __init__(self) -> None:
        self.is_text: bool | None = None
        self.end = 0
        self.digest = ContentDigest()

    def add(self, chunk: RawChunk) -> None:
        self.is_text = chunk.is_text
        self.end = chunk.end
        self.digest.update(chunk.raw)


class PromptUpload(PromptCopy):
    """The upload that is run, and the copies that are compared with it."""

    def __init__(self, request: GenerationRequest) -> None:
        super().__init__()
        self.request = request
        self.lock = asyncio.Lock()
        """Held while a chunk is taken in: chunks are encoded in order."""
        self.is_complete = False
        self.is_broken = False
        """A chunk was taken in half: the encoder's state is not known."""
        self.copies: list[PromptCopy] = []
        self._encoder: PromptEncoder | None = None

    def add_copy(self) -> None:
        """Expect the prompt once more, from its beginning."""
        self.copies.append(PromptCopy())
        del self.copies[:-MAX_COPIES]

    def copy_at(self, chunk: RawChunk) -> PromptCopy | None:
        """The copy that the chunk continues; None when it continues the upload itself, or none."""
        if not self.is_complete and chunk.start == self.end:
            return None
        return next((copy for copy in self.copies if copy.end == chunk.start), None)

    def compare(self, copy: PromptCopy) -> None:
        """Raises: RequestIdConflict where the copy differs. The copy is not ahead of the upload,
        or the upload is complete."""
        pairs = zip(copy.digest.strides, self.digest.strides, strict=False)
        if copy.end > self.end or any(mine != its for mine, its in pairs):
            self._refuse(copy)

    def finish_copy(self) -> None:
        """A copy is complete. Raises: RequestIdConflict when none of them is the whole prompt."""
        copy = next((copy for copy in self.copies if copy.end == self.end), None)
        if copy is None:
            self._refuse(self.copies[0])
        copy.digest.finish()
        if copy.is_text != self.is_text or copy.digest.strides != self.digest.strides:
            self._refuse(copy)
        self.copies.remove(copy)

    def _refuse(self, copy: PromptCopy) -> NoReturn:
        self.copies.remove(copy)
        raise RequestIdConflict(
            f"request_id {self.request.request_id!r} was used with another prompt: use a new one"
        )

    async def encode(self, chunk: PromptChunk, tokenizer: Tokenizer | None) -> bytes:
        """The packed ids that the chunk makes certain. Raises: InvalidField."""
        if not isinstance(chunk, TextChunk):
            return chunk.packed_ids
        if tokenizer is None:
            raise InvalidField("prompt.text", "this model has no tokenizer: send token ids")
        if self._encoder is None:
            self._encoder = tokenizer.prompt_encoder()
        return await self._encoded(self._encoder, chunk.text)

    def finish(self) -> bytes:
        """The packed ids that were held back. Closes the upload's digest."""
        self.digest.finish()
        encoder, self._encoder = self._encoder, None
        return array("I", encoder.finish()).tobytes() if encoder else b""

    async def _encoded(self, encoder: PromptEncoder, text: str) -> bytes:
        if len(text) < THREAD_MIN_CHARS:
            return array("I", encoder.push(text)).tobytes()
        return await asyncio.to_thread(lambda: array("I", encoder.push(text)).tobytes())
