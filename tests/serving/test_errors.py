"""Errors cross gRPC with their name and the details that Google's clients read."""

import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from serving.errors import (
    DETAILS_METADATA,
    ERROR_METADATA,
    LEAVES,
    EngineFailure,
    InvalidParameter,
    Overloaded,
    Problem,
    ServingError,
    from_grpc,
    to_grpc,
)


def details_of(error: ServingError) -> status_pb2.Status:
    content = dict(to_grpc(error))[DETAILS_METADATA]
    assert isinstance(content, bytes)
    return status_pb2.Status.FromString(content)


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_every_error_comes_back_as_itself(name: str) -> None:
    error = LEAVES[name]("top_p is wrong; give another")
    again = from_grpc(error.grpc_status, str(error), to_grpc(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert (again.retry_after, again.retry_after_ms) == (error.retry_after, error.retry_after_ms)
    status = details_of(error)
    assert code_pb2.Code.Name(status.code) == error.grpc_status
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details) == (error.retry_after is not None)


def test_the_time_to_wait_crosses() -> None:
    error = Overloaded("wait", retry_after=12.3456)
    assert (error.retry_after, error.retry_after_ms) == (13, 12_346)
    (detail,) = details_of(error).details
    retry = error_details_pb2.RetryInfo()
    assert detail.Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 12_346
    again = from_grpc("RESOURCE_EXHAUSTED", "wait", to_grpc(error))
    assert (again.retry_after, again.retry_after_ms) == (13, 12_346)
    assert Overloaded("wait").retry_after_ms == 1000
    assert EngineFailure("broken").retry_after_ms is None


def test_wrong_parameters_cross_by_name() -> None:
    (detail,) = details_of(InvalidParameter("top_p is 1.5; it must be within 0 and 1")).details
    bad = error_details_pb2.BadRequest()
    assert detail.Unpack(bad)
    (violation,) = bad.field_violations
    assert violation.field == "top_p"
    assert violation.description == "top_p is 1.5; it must be within 0 and 1"
    problems = [
        Problem("x", ("stop", "0"), "is empty", ""),
        Problem("x", ("n",), "is 0", 0),
        Problem("x", ("response_format", "json_schema"), "has `not`", None, "/a.b/not#"),
    ]
    error = InvalidParameter("three mistakes", problems)
    again = from_grpc("INVALID_ARGUMENT", "three mistakes", to_grpc(error))
    assert isinstance(again, InvalidParameter)
    assert [(problem.path, problem.message, problem.pointer) for problem in again.problems] == [
        (("body", "stop", "0"), "is empty", ""),
        (("body", "n"), "is 0", ""),
        (("body", "response_format", "json_schema"), "has `not`", "/a.b/not#"),
    ]


def test_what_others_write_into_the_metadata_does_no_harm() -> None:
    for content in (b"\xff\xff\xff", b"", "text"):
        metadata = ((ERROR_METADATA, "Overloaded"), (DETAILS_METADATA, content))
        assert type(from_grpc("RESOURCE_EXHAUSTED", "full", metadata)) is Overloaded
    assert type(from_grpc("DATA_LOSS", "?")) is EngineFailure
