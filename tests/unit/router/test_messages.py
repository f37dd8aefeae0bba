"""A deserializer that never raises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.errors import MalformedMessage, MessageTooLarge
from kvcluster.router.messages import parser_of, unwrap
from kvcluster.rpc.v1 import inference_service_pb2 as pb

parse = parser_of(pb.StreamGenerateRequest, max_bytes=1000)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_malformed(raw: bytes) -> None:
    assert isinstance(parse(raw), pb.StreamGenerateRequest | MalformedMessage)


def test_a_message_at_the_limit_is_read_and_one_byte_more_is_not() -> None:
    raw = pb.StreamGenerateRequest(setup=pb.GenerateRequest(model="echo")).SerializeToString()

    at_limit = parser_of(pb.StreamGenerateRequest, max_bytes=len(raw))(raw)
    over = parser_of(pb.StreamGenerateRequest, max_bytes=len(raw) - 1)(raw)

    assert isinstance(at_limit, pb.StreamGenerateRequest)
    assert isinstance(over, MessageTooLarge)


def test_unwrapping_raises_the_error_that_stands_for_the_message() -> None:
    with pytest.raises(MalformedMessage, match="StreamGenerateRequest"):
        unwrap(parse(b"\xff"))
