"""The table from errors to status, and what a client reads back."""

import grpc
import pytest
from google.rpc import error_details_pb2

from kvcluster import errors
from kvcluster.errors import KvClusterError
from kvcluster.router.status import (
    DETAILS_KEY,
    STATUS_CODES,
    error_from_rpc,
    error_of_kind,
    status_from_error,
)
from kvcluster.rpc.v1 import common_pb2

NEVER_SENT = {"INVALID_CONFIG", "SERVER_UNAVAILABLE", "SPILL_FAILED"}
"""A server that is wrongly configured does not run; one that is not there sends nothing; what fails
on the way to disk is told by the service that uses it."""


def leaves(kind: type[KvClusterError]) -> set[type[KvClusterError]]:
    children = kind.__subclasses__()
    return set().union(*map(leaves, children)) if children else {kind}


def returned(error: KvClusterError) -> KvClusterError:
    status = status_from_error(error)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return error_from_rpc(code, status.message, ((DETAILS_KEY, status.SerializeToString()),))


def test_the_reasons_of_the_protos_are_those_of_the_errors() -> None:
    of_errors = {kind.reason for kind in leaves(KvClusterError)} | {KvClusterError.reason}
    of_protos = {
        name.removeprefix("ERROR_REASON_") for name in dict(common_pb2.ErrorReason.items())
    }

    assert of_protos - {"UNSPECIFIED"} == of_errors - NEVER_SENT


def test_every_error_that_is_sent_has_a_status_code_of_its_own() -> None:
    expected = {kind for kind in leaves(KvClusterError) if kind.reason not in NEVER_SENT}

    assert set(STATUS_CODES) == expected


def test_no_two_errors_share_a_reason() -> None:
    reasons = [kind.reason for kind in STATUS_CODES]

    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("kind", STATUS_CODES, ids=lambda kind: kind.__name__)
def test_an_error_comes_back_as_itself(kind: type[KvClusterError]) -> None:
    sent = error_of_kind(kind.__name__, "what is wrong: what to do")
    sent.metadata = {"limit": "3"}
    sent.retry_after_s = 1.5

    received = returned(sent)

    assert type(received) is kind
    assert received.to_record() == sent.to_record()


def test_an_error_without_retry_advice_comes_back_without() -> None:
    assert returned(errors.InvalidField("seed", "want 0 or more")).retry_after_s is None


def test_a_field_violation_is_spelled_out_for_programs() -> None:
    status = status_from_error(errors.InvalidField("seed", "want 0 or more"))
    found = error_details_pb2.BadRequest()

    assert any(detail.Unpack(found) for detail in status.details)
    assert found.field_violations[0].field == "seed"


def test_text_of_the_caller_is_cut_to_what_a_header_holds() -> None:
    status = status_from_error(errors.InvalidField("ü" * 10_000, "ü" * 10_000))

    assert status.ByteSize() < 4096


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServerUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.UNIMPLEMENTED, KvClusterError),
    ],
)
def test_a_status_of_the_transport_becomes_an_error_too(
    code: grpc.StatusCode, kind: type[KvClusterError]
) -> None:
    assert type(error_from_rpc(code, "text", ())) is kind


def test_details_that_cannot_be_read_are_left_out() -> None:
    error = error_from_rpc(grpc.StatusCode.NOT_FOUND, "text", ((DETAILS_KEY, b"\xff"),))

    assert error.message == "NOT_FOUND: text"


def test_an_unknown_reason_of_a_later_server_is_the_root_error() -> None:
    status = status_from_error(errors.Draining("stopping: try another server"))
    info = error_details_pb2.ErrorInfo(reason="LATER", domain="kvcluster.dev")
    status.details[0].Pack(info)

    raw = ((DETAILS_KEY, status.SerializeToString()),)
    error = error_from_rpc(grpc.StatusCode.UNAVAILABLE, "text", raw)

    assert (type(error), error.message) == (KvClusterError, "stopping: try another server")
