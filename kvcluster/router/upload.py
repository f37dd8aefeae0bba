"""The client's half of StreamGenerate: one setup, then chunks that continue each other.

Reads one message ahead of nobody: the next is taken when the engine has accepted the last.
"""

import asyncio
from collections.abc import AsyncIterator

from kvcluster.engine.api import PromptChunk
from kvcluster.errors import InvalidField, PromptCorrupt, UploadStalled
from kvcluster.router.convert import PromptPart, checksum, part_from_proto
from kvcluster.router.messages import Parsed, unwrap
from kvcluster.rpc.v1 import inference_service_pb2 as pb

# A client that breaks off looks for a moment like one that has finished: grpc reports the end of
# the messages first and cancels the call right after. Long enough for the second to arrive.
CANCEL_SETTLES_S = 0.01


class Upload:
    """The messages of one StreamGenerate call, in order. Iterate `chunks` after `setup`."""

    def __init__(
        self,
        messages: AsyncIterator[Parsed[pb.StreamGenerateRequest]],
        *,
        idle_timeout_s: float,
    ) -> None:
        self._messages = messages
        self._idle_timeout_s = idle_timeout_s
        self._is_length_declared = False

    async def setup(self) -> pb.GenerateRequest:
        """The first message. Raises InvalidField when it is none or another, UploadStalled."""
        message = await self._next()
        if message is None or message.WhichOneof("payload") != "setup":
            raise InvalidField("setup", "must be the first message of the stream, before any chunk")
        if message.setup.HasField("prompt"):
            raise InvalidField("setup.prompt", "must be empty: send the prompt as chunks")
        self._is_length_declared = message.setup.HasField("input_tokens")
        return message.setup

    async def chunks(self) -> AsyncIterator[PromptChunk]:
        """The prompt up to the half-close.

        Raises: PromptCorrupt (gap, overlap, checksum), InvalidField, UploadStalled, and what
        `messages.parser_of` returns.
        """
        last: PromptPart | None = None
        while (message := await self._next()) is not None:
            if message.WhichOneof("payload") != "chunk":
                raise InvalidField("chunk", "every message after the first must be a chunk")
            last = _checked(message.chunk, last)
            yield last.chunk
        # The engine refuses a prompt that is shorter than was declared.
        if not self._is_length_declared:
            await asyncio.sleep(CANCEL_SETTLES_S)

    async def _next(self) -> pb.StreamGenerateRequest | None:
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                return unwrap(await anext(self._messages))
        except StopAsyncIteration:
            return None
        except TimeoutError:
            raise UploadStalled(
                f"no prompt chunk for {self._idle_timeout_s:g} s: send the prompt again, "
                "without pauses"
            ) from None


def _checked(message: pb.PromptChunk, last: PromptPart | None) -> PromptPart:
    """The part in `message`, if it continues `last` and its bytes are those that were sent."""
    part = part_from_proto(message.input, field="chunk.input", offset=message.offset)
    if last is not None and type(last.chunk) is not type(part.chunk):
        raise InvalidField("chunk.input", "text and token ids cannot be mixed in one prompt")
    expected = last.end if last is not None else 0
    if message.offset != expected:
        fault = "a gap" if message.offset > expected else "an overlap"
        raise PromptCorrupt(
            f"chunk.offset: want {expected}, where the last chunk ended, got {message.offset}, "
            f"{fault}: send the prompt again",
            metadata={"expected_offset": str(expected), "offset": str(message.offset)},
        )
    if message.HasField("crc32c") and message.crc32c != checksum(part.raw):
        raise PromptCorrupt(
            f"chunk.crc32c: the chunk at offset {message.offset} was damaged on the way: "
            "send the prompt again",
            metadata={"offset": str(message.offset)},
        )
    return part
