"""The client's half of UploadContext: one setup, then chunks, then half-close."""

import asyncio
from collections.abc import AsyncIterator

from kvcluster.engine.api import PromptChunk
from kvcluster.errors import InvalidField, PromptCorrupt, UploadStalled
from kvcluster.router.convert import checksum, part_from_proto
from kvcluster.router.messages import Parsed, unwrap
from kvcluster.router.upload import CANCEL_SETTLES_S
from kvcluster.rpc.v1 import context_service_pb2 as pb
from kvcluster.rpc.v1 import inference_service_pb2


class ContextUpload:
    """The messages of one call, in order. Iterate `chunks` after `setup`."""

    def __init__(
        self,
        messages: AsyncIterator[Parsed[pb.UploadContextRequest]],
        *,
        idle_timeout_s: float,
    ) -> None:
        self._messages = messages
        self._idle_timeout_s = idle_timeout_s

    async def setup(self) -> pb.UploadContextRequest.Setup:
        """The first message. Raises InvalidField when it is none or another, UploadStalled."""
        message = await self._next()
        if message is None or message.WhichOneof("payload") != "setup":
            raise InvalidField("setup", "must be the first message of the stream, before any chunk")
        return message.setup

    async def chunks(self) -> AsyncIterator[PromptChunk]:
        """The chunks up to the half-close; the engine checks that they follow each other.

        Raises: PromptCorrupt (checksum), InvalidField, UploadStalled, and what `messages.parser_of`
        returns.
        """
        while (message := await self._next()) is not None:
            if message.WhichOneof("payload") != "chunk":
                raise InvalidField("chunk", "every message after the first must be a chunk")
            yield _checked(message.chunk)
        # A client that breaks off must not be taken for one that has finished.
        await asyncio.sleep(CANCEL_SETTLES_S)

    async def _next(self) -> pb.UploadContextRequest | None:
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                return unwrap(await anext(self._messages))
        except StopAsyncIteration:
            return None
        except TimeoutError:
            raise UploadStalled(
                f"no chunk for {self._idle_timeout_s:g} s: what came is kept, ask how far it is "
                "and go on there"
            ) from None


def _checked(message: inference_service_pb2.PromptChunk) -> PromptChunk:
    part = part_from_proto(message.input, field="chunk.input", offset=message.offset)
    if message.HasField("crc32c") and message.crc32c != checksum(part.raw):
        raise PromptCorrupt(
            f"chunk.crc32c: the chunk at offset {message.offset} was damaged on the way: "
            "send it again",
            metadata={"offset": str(message.offset)},
        )
    return part.chunk
