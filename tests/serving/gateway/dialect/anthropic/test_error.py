"""Errors on the paths of Anthropic's clients."""

import pytest

from serving.errors import (
    LEAVES,
    InvalidParameter,
    Problem,
    ServingError,
    UnsupportedParameter,
)
from serving.gateway.dialect.anthropic.error import (
    anthropic_error,
    anthropic_headers,
    anthropic_status,
    is_anthropic_path,
)
from tests.support.gateway import ANTHROPIC_TYPES


@pytest.mark.parametrize("leaf", [ServingError, *LEAVES.values()])
def test_a_client_reads_one_object(leaf: type[ServingError]) -> None:
    error = leaf("what is wrong")
    status = {422: 400, 424: 500}.get(leaf.http_status, leaf.http_status)
    assert anthropic_status(error) == status
    assert anthropic_error(error, "0a").model_dump() == {
        "type": "error",
        "error": {
            "type": ANTHROPIC_TYPES.get(status, "invalid_request_error"),
            "message": "what is wrong",
        },
        "request_id": "req_0a",
    }
    assert anthropic_error(error).request_id is None


def test_a_model_that_failed_is_not_asked_again() -> None:
    failed = LEAVES["EngineFailure"]("m")
    assert anthropic_headers(failed) == {"x-should-retry": "false"}
    assert anthropic_headers(LEAVES["Unavailable"]("m")) == {}


def test_each_problem_is_told_behind_its_place() -> None:
    path = ("body", "messages", "0", "content")
    own = Problem("a", ("body", "top_k"), "top_k is 17; it must be smaller", None)
    error = InvalidParameter("m", [Problem("missing", path, "Field required", None), own])
    told = anthropic_error(error).error.message
    assert told == "messages.0.content: Field required; top_k is 17; it must be smaller"


def test_a_thread_is_refused_so_that_the_package_goes_on_without_one() -> None:
    problem = Problem("k", ("body", "thread"), "thread is not supported", None)
    told = anthropic_error(UnsupportedParameter("m", [problem])).model_dump()["error"]
    assert told["details"] == {
        "error_code": "thread_unsupported_request",
        "unsupported": ["thread"],
    }


@pytest.mark.parametrize(
    ("path", "is_theirs"),
    [
        ("/v1/messages", True),
        ("/v1/messages/count_tokens", True),
        ("/v1/messages/batches", True),
        ("/anthropic/v1/anything", True),
        ("/v1/messagesx", False),
        ("/v1/chat/completions", False),
        ("/anthropic", False),
    ],
)
def test_paths(path: str, is_theirs: bool) -> None:
    assert is_anthropic_path(path) == is_theirs
