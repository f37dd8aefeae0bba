"""Requests survive the way through their protos."""

import math
import struct

import pytest

from kvcluster.engine.api import GenerationRequest, TextChunk, TokenChunk
from kvcluster.errors import InvalidField
from kvcluster.router import convert
from kvcluster.rpc.v1 import common_pb2
from kvcluster.rpc.v1 import inference_service_pb2 as pb
from kvcluster.types import SamplingParams, TenantId

FULL_SAMPLING = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    seed=2**64 - 1,
    stop=("\n\n", "ende"),
    stop_token_ids=(1, 2),
    logprobs=0,
    prompt_logprobs=0,
    min_output_tokens=3,
    ignore_eos=True,
    logit_bias=((5, -100.0), (7, 1.5)),
)


@pytest.mark.parametrize("params", [SamplingParams(), FULL_SAMPLING], ids=["default", "full"])
def test_sampling_params_come_back_bit_for_bit(params: SamplingParams) -> None:
    raw = convert.sampling_to_proto(params).SerializeToString()

    assert convert.sampling_from_proto(common_pb2.SamplingParams.FromString(raw)) == params


def test_sampling_that_is_not_set_is_greedy() -> None:
    assert convert.sampling_from_proto(common_pb2.SamplingParams()) == SamplingParams()


def test_not_a_number_is_carried_to_the_engine_which_refuses_it() -> None:
    message = convert.sampling_to_proto(SamplingParams(temperature=math.nan))

    assert math.isnan(convert.sampling_from_proto(message).temperature)


@pytest.mark.parametrize("params", [SamplingParams(seed=-1), SamplingParams(top_k=2**32)])
def test_a_number_outside_its_field_is_refused_by_the_client(params: SamplingParams) -> None:
    with pytest.raises(InvalidField, match="sampling"):
        convert.sampling_to_proto(params)


def test_a_request_comes_back_with_the_tenant_and_deadline_of_its_call() -> None:
    request = GenerationRequest(
        tenant=TenantId("red"),
        model="echo",
        max_output_tokens=7,
        sampling=FULL_SAMPLING,
        policy="exact",
        request_id="a-1:b_2.c",
        input_tokens=0,
        deadline_s=2.5,
        progress_interval_s=0.25,
        disconnect_grace_s=30.5,
        priority=100,
    )

    message = convert.request_to_proto(request)

    back = convert.request_from_proto(message, tenant=TenantId("red"), model="echo", deadline_s=2.5)
    assert back == request


def test_what_is_not_set_in_a_request_has_its_default() -> None:
    message = pb.GenerateRequest(max_output_tokens=1)

    request = convert.request_from_proto(
        message, tenant=TenantId("red"), model="echo", deadline_s=None
    )

    assert request == GenerationRequest(tenant=TenantId("red"), model="echo", max_output_tokens=1)


def test_a_prompt_length_that_is_not_declared_is_none_and_not_zero() -> None:
    message = convert.request_to_proto(GenerationRequest(model="echo", max_output_tokens=1))

    assert not message.HasField("input_tokens")


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_seconds_that_are_no_time_are_refused(seconds: float) -> None:
    with pytest.raises(InvalidField, match="duration"):
        convert.duration(seconds)


def test_offsets_count_bytes_of_text_and_tokens_of_ids() -> None:
    assert convert.text_part(10, "aé").end == 13
    assert convert.token_part(10, bytes(8), field="ids").end == 12


def test_a_chunk_comes_back_with_the_checksum_of_its_bytes() -> None:
    message = convert.part_to_proto(convert.text_part(3, "123456789"))

    part = convert.part_from_proto(message.input, field="chunk.input", offset=message.offset)

    assert part.chunk == TextChunk(3, "123456789")
    assert message.crc32c == 0xE3069283  # the check value in the definition of CRC-32C


def test_ids_in_both_forms_are_the_same_chunk() -> None:
    packed = struct.pack("<3I", 0, 256, 2**32 - 1)
    forms = [
        common_pb2.TokenInput(packed_ids=packed),
        common_pb2.TokenInput(ids=common_pb2.TokenIds(ids=[0, 256, 2**32 - 1])),
    ]

    chunks = [convert.part_from_proto(form, field="prompt").chunk for form in forms]

    assert chunks == [TokenChunk(0, packed)] * 2


@pytest.mark.parametrize("ids", [[-1], [2**32], ["a"], [0.5]])
def test_what_is_no_token_id_is_refused(ids: list[object]) -> None:
    with pytest.raises(InvalidField, match="prompt_ids"):
        convert.pack_ids(ids)
