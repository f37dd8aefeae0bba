"""Wrong requests, each with the status and reason that it has to get from any engine.

They are sent to a real port that serves the model `echo`, which has a tokenizer and takes at most
LIMIT_TOKENS tokens of context, while at least one generation exists.
"""

import math
import struct
from collections.abc import Awaitable, Callable

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from kvcluster.rpc.v1 import common_pb2
from kvcluster.rpc.v1 import inference_service_pb2 as pb
from kvcluster.rpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.unit.router.serving import PATH, drain, ids_chunk, setup, text_chunk

Code = grpc.StatusCode
Attempt = Callable[[aio.Channel], Awaitable[object]]
LIMIT_TOKENS = 1_000_000
MIB = 1024 * 1024


def uploading(*messages: pb.StreamGenerateRequest) -> Attempt:
    return lambda channel: drain(InferenceServiceStub(channel).StreamGenerate(iter(messages)))


def generating(**fields: object) -> Attempt:
    request = pb.GenerateRequest(
        **{
            "model": "echo",
            "max_output_tokens": 4,
            "prompt": common_pb2.TokenInput(text="hello"),
            **fields,
        }
    )
    return lambda channel: drain(InferenceServiceStub(channel).Generate(request))


def sending(method: str, raw: bytes, **call_options: object) -> Attempt:
    return lambda channel: drain(channel.unary_stream(PATH + method)(raw, **call_options))


def asking(method: str, request: object) -> Attempt:
    return lambda channel: channel.unary_unary(
        PATH + method, request_serializer=type(request).SerializeToString
    )(request)


def resuming(name: str, after_sequence: int = 0) -> Attempt:
    request = pb.ResumeGenerationRequest(name=name, after_sequence=after_sequence)
    return lambda channel: drain(InferenceServiceStub(channel).ResumeGeneration(request))


async def resuming_after_the_end(channel: aio.Channel) -> None:
    stub = InferenceServiceStub(channel)
    asked = pb.ListGenerationsRequest(parent="tenants/default")
    while not (found := await stub.ListGenerations(asked)).generations:
        pass  # the one beside us has not begun
    await resuming(found.generations[0].name, after_sequence=1000)(channel)


async def conflicting(channel: aio.Channel) -> None:
    await generating(request_id="twice")(channel)
    await generating(request_id="twice", max_output_tokens=5)(channel)


def sampling(**fields: object) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(**fields)


HELLO_CRC = 0x9A71BB4C
INVALID_UTF8 = b"\x0a\x04\xff\xfe\xfd\xfc"
"""Field 1 of GenerateRequest, a string."""

BAD_INPUTS: dict[str, tuple[Attempt, Code, str]] = {
    "unknown model": (generating(model="other"), Code.NOT_FOUND, "MODEL_NOT_FOUND"),
    "unknown method": (generating(policy="int5"), Code.INVALID_ARGUMENT, "INVALID_FIELD"),
    "two codecs": (generating(policy="int4 + exact"), Code.INVALID_ARGUMENT, "INVALID_FIELD"),
    "policy in two forms": (
        generating(
            policy="int4", cache_policy=pb.CachePolicy(choices=[pb.PolicyChoice(method="int4")])
        ),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "policy in parts with an unknown argument": (
        generating(
            cache_policy=pb.CachePolicy(
                choices=[
                    pb.PolicyChoice(method="int4", arguments={"r": pb.PolicyValue(number=0.5)})
                ]
            )
        ),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "bound that nothing meets": (
        generating(policy="auto: ratio>=1000"),
        Code.FAILED_PRECONDITION,
        "POLICY_UNSUPPORTED",
    ),
    "no prompt": (generating(prompt=None), Code.INVALID_ARGUMENT, "INVALID_FIELD"),
    "prompt without chunks": (uploading(setup()), Code.INVALID_ARGUMENT, "INVALID_FIELD"),
    "empty chunk": (
        uploading(setup(), text_chunk(0, "")),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "chunk without input": (
        uploading(setup(), pb.StreamGenerateRequest(chunk=pb.PromptChunk())),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "declared prompt over the limit": (
        uploading(setup(input_tokens=LIMIT_TOKENS + 3)),
        Code.INVALID_ARGUMENT,
        "CONTEXT_TOO_LONG",
    ),
    "uploaded prompt over the limit": (
        uploading(setup(), ids_chunk(0, bytes(2 * MIB)), ids_chunk(MIB // 2, bytes(2 * MIB))),
        Code.INVALID_ARGUMENT,
        "CONTEXT_TOO_LONG",
    ),
    "gap between chunks": (
        uploading(setup(), text_chunk(0, "abc"), text_chunk(4, "d")),
        Code.INVALID_ARGUMENT,
        "PROMPT_CORRUPT",
    ),
    "overlap of chunks": (
        uploading(setup(), text_chunk(0, "abc"), text_chunk(2, "cd")),
        Code.INVALID_ARGUMENT,
        "PROMPT_CORRUPT",
    ),
    "first chunk not at 0": (
        uploading(setup(), text_chunk(1, "abc")),
        Code.INVALID_ARGUMENT,
        "PROMPT_CORRUPT",
    ),
    "offset in characters instead of bytes": (
        uploading(setup(), text_chunk(0, "äöü"), text_chunk(3, "d")),
        Code.INVALID_ARGUMENT,
        "PROMPT_CORRUPT",
    ),
    "wrong checksum": (
        uploading(setup(), text_chunk(0, "hello", crc32c=HELLO_CRC ^ 1)),
        Code.INVALID_ARGUMENT,
        "PROMPT_CORRUPT",
    ),
    "wrong checksum of 0": (
        uploading(setup(), text_chunk(0, "hello", crc32c=0)),
        Code.INVALID_ARGUMENT,
        "PROMPT_CORRUPT",
    ),
    "text after ids": (
        uploading(setup(), ids_chunk(0, bytes(8)), text_chunk(2, "c")),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "part of a token id": (
        uploading(setup(), ids_chunk(0, bytes(7))),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "token id outside the vocabulary": (
        uploading(setup(), ids_chunk(0, struct.pack("<I", 2**32 - 1))),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "second setup": (
        uploading(setup(), text_chunk(0, "a"), setup()),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "chunk before setup": (uploading(text_chunk(0, "a")), Code.INVALID_ARGUMENT, "INVALID_FIELD"),
    "no setup": (uploading(), Code.INVALID_ARGUMENT, "INVALID_FIELD"),
    "empty message": (
        uploading(pb.StreamGenerateRequest()),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "prompt in setup": (
        uploading(setup(prompt=common_pb2.TokenInput(text="a"))),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "message over 4 MiB": (
        generating(prompt=common_pb2.TokenInput(text="a" * (4 * MIB))),
        Code.RESOURCE_EXHAUSTED,
        "MESSAGE_TOO_LARGE",
    ),
    "chunk over 4 MiB": (
        uploading(setup(), ids_chunk(0, bytes(4 * MIB))),
        Code.RESOURCE_EXHAUSTED,
        "MESSAGE_TOO_LARGE",
    ),
    "message over the transport's limit": (
        sending("Generate", bytes(9 * MIB)),
        Code.RESOURCE_EXHAUSTED,
        "",
    ),
    "compressed message": (
        sending("Generate", bytes(1000), compression=grpc.Compression.Gzip),
        Code.UNIMPLEMENTED,
        "",
    ),
    "metadata over 16 KiB": (
        sending("Generate", b"", metadata=(("x", "y" * 20_000),)),
        Code.RESOURCE_EXHAUSTED,
        "",
    ),
    "bytes that are no message": (
        sending("Generate", b"\x80\x05\x95garbage"),
        Code.INVALID_ARGUMENT,
        "MALFORMED_MESSAGE",
    ),
    "invalid UTF-8": (
        sending("Generate", INVALID_UTF8),
        Code.INVALID_ARGUMENT,
        "MALFORMED_MESSAGE",
    ),
    "negative temperature": (
        generating(sampling=sampling(temperature=-0.5)),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "temperature that is no number": (
        generating(sampling=sampling(temperature=math.nan)),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "no output tokens": (
        generating(max_output_tokens=0),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "request_id with a space": (
        generating(request_id="a b"),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "request_id of 129 characters": (
        generating(request_id="a" * 129),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "request_id with another body": (conflicting, Code.ALREADY_EXISTS, "REQUEST_ID_CONFLICT"),
    "priority of 101": (generating(priority=101), Code.INVALID_ARGUMENT, "INVALID_FIELD"),
    "negative progress interval": (
        generating(progress_interval=Duration(seconds=-1)),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "grace of two hours": (
        generating(disconnect_grace=Duration(seconds=7200)),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "resume of an unknown generation": (
        resuming("tenants/default/generations/none"),
        Code.NOT_FOUND,
        "GENERATION_NOT_FOUND",
    ),
    "resume after the last event": (
        resuming_after_the_end,
        Code.OUT_OF_RANGE,
        "RESUME_EXPIRED",
    ),
    "name of another form": (
        resuming("generations/g0"),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "cancel of an unknown generation": (
        asking(
            "CancelGeneration", pb.CancelGenerationRequest(name="tenants/default/generations/x")
        ),
        Code.NOT_FOUND,
        "GENERATION_NOT_FOUND",
    ),
    "count of nothing": (
        asking("CountTokens", pb.CountTokensRequest(model="echo")),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "negative page size": (
        asking("ListModels", pb.ListModelsRequest(page_size=-1)),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "page token that is none": (
        asking("ListModels", pb.ListModelsRequest(page_token="é")),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "list of another tenant": (
        asking("ListGenerations", pb.ListGenerationsRequest(parent="tenants/other")),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
    "unknown filter": (
        asking(
            "ListGenerations",
            pb.ListGenerationsRequest(parent="tenants/default", filter="age<3"),
        ),
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
    ),
}
