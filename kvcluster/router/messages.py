"""Reading request messages without raising.

grpc answers an exception in a deserializer with INTERNAL and no details. So ours returns the error
as a value, and the call is ended with the status that says what was wrong.
"""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message

from kvcluster.errors import KvClusterError, MalformedMessage, MessageTooLarge

MessageT = TypeVar("MessageT", bound=Message)
Parsed: TypeAlias = MessageT | KvClusterError
"""A request message, or why its bytes are none."""


def parser_of(kind: type[MessageT], *, max_bytes: int) -> Callable[[bytes], Parsed[MessageT]]:
    """A deserializer for `kind` that returns MessageTooLarge or MalformedMessage, never raises."""

    def parse(raw: bytes) -> Parsed[MessageT]:
        if len(raw) > max_bytes:
            return MessageTooLarge(
                f"a message of {len(raw)} bytes is over the limit of {max_bytes}: "
                "send the prompt in smaller chunks",
                metadata={"limit_bytes": str(max_bytes), "message_bytes": str(len(raw))},
            )
        try:
            return kind.FromString(raw)
        except DecodeError:
            return MalformedMessage(
                f"the bytes are no valid {kind.DESCRIPTOR.name}: "
                "check the proto version, and that every string is UTF-8"
            )

    return parse


def unwrap(parsed: Parsed[MessageT]) -> MessageT:
    """The message. Raises the error that stands in its place."""
    if isinstance(parsed, KvClusterError):
        raise parsed
    return parsed
