"""A prompt cut into parts that fit a message: what a client uploads.

Text is cut between characters, ids between ids; a prompt that is still being produced is taken
piece by piece, no faster than it is sent.
"""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

from kvcluster.errors import InvalidField
from kvcluster.router.convert import BYTES_PER_ID, PromptPart, pack_ids, text_part, token_part

PART_BYTES = 1024 * 1024
_MAX_BYTES_PER_CHARACTER = 4
_BYTES = (bytes, bytearray, memoryview)

Prompt: TypeAlias = str | Iterable[str] | AsyncIterable[str]
TokenIds: TypeAlias = bytes | bytearray | memoryview | Sequence[int]
"""Little-endian u32 bytes, or numbers."""
PromptIds: TypeAlias = TokenIds | Iterator[TokenIds] | AsyncIterable[TokenIds]

PieceT = TypeVar("PieceT")


async def parts_of(
    prompt: Prompt | None, prompt_ids: PromptIds | None, *, part_bytes: int = PART_BYTES
) -> AsyncIterator[PromptPart]:
    """The parts of the one prompt that is given, with their offsets.

    Raises: InvalidField when none or both are given, or one is no text or no ids.
    """
    _check_one_given(prompt, prompt_ids)
    offset = 0
    if prompt is not None:
        step = part_bytes // _MAX_BYTES_PER_CHARACTER
        async for text in _pieces((prompt,) if isinstance(prompt, str) else prompt):
            for start in range(0, len(text), step):
                part = text_part(offset, text[start : start + step])
                offset = part.end
                yield part
    elif prompt_ids is not None:
        step = part_bytes - part_bytes % BYTES_PER_ID
        async for ids in _id_pieces(prompt_ids):
            packed = _packed(ids)
            for start in range(0, len(packed), step):
                part = token_part(offset, packed[start : start + step], field="prompt_ids")
                offset = part.end
                yield part


def whole(prompt: str | None, prompt_ids: TokenIds | None) -> PromptPart:
    """The prompt in one part, whatever its size. Raises as `parts_of`."""
    _check_one_given(prompt, prompt_ids)
    if prompt is not None:
        return text_part(0, prompt)
    return token_part(0, _packed(prompt_ids or b""), field="prompt_ids")


def num_tokens_in(prompt_ids: PromptIds | None) -> int | None:
    """How many ids there are; None while that is not known."""
    if isinstance(prompt_ids, _BYTES):
        return memoryview(prompt_ids).nbytes // BYTES_PER_ID
    return len(prompt_ids) if isinstance(prompt_ids, Sequence) else None


def _check_one_given(prompt: object, prompt_ids: object) -> None:
    if (prompt is None) == (prompt_ids is None):
        raise InvalidField("prompt", "give either prompt or prompt_ids")


def _id_pieces(prompt_ids: PromptIds) -> AsyncIterator[TokenIds]:
    if isinstance(prompt_ids, (*_BYTES, Sequence)):
        return _pieces((prompt_ids,))
    return _pieces(prompt_ids)


def _packed(ids: TokenIds) -> bytes:
    return bytes(ids) if isinstance(ids, _BYTES) else pack_ids(ids)


async def _pieces(source: Iterable[PieceT] | AsyncIterable[PieceT]) -> AsyncIterator[PieceT]:
    if isinstance(source, AsyncIterable):
        async for piece in source:
            yield piece
    else:
        for piece in source:
            yield piece
