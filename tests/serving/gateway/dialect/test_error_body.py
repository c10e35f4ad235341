"""The body of an answer that is not 2xx."""

import json
import math

import pytest

from serving.errors import (
    LEAVES,
    ContextTooLong,
    InvalidParameter,
    Problem,
    ServingError,
    UnsupportedParameter,
)
from serving.gateway.dialect.error_body import error_body, openai_error, openai_status
from tests.support.gateway import OPENAI_TYPES


@pytest.mark.parametrize("leaf", [ServingError, *LEAVES.values()])
def test_an_error_says_the_same_wherever_a_client_looks(leaf: type[ServingError]) -> None:
    body = error_body(leaf("what is wrong")).model_dump()
    inner = body.pop("error")
    detail = body.pop("detail")
    kind = inner.pop("type")
    assert kind == openai_error(leaf("what is wrong")).error.type
    assert inner == body
    assert (inner["code"], inner["status"]) == (leaf.azure_code, leaf.http_status)
    if leaf.http_status == 422:
        assert json.loads(inner["message"]) == {"detail": detail}
        assert detail == [
            {"type": leaf.azure_code, "loc": ["body"], "msg": "what is wrong", "input": None}
        ]
    else:
        assert inner["message"] == detail == "what is wrong"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("red", "red"),
        ({"type": "json_object"}, {"type": "json_object"}),
        (False, False),
        ("x" * 198, "x" * 198),
        ("x" * 199, None),
        (["x" * 199], None),
        (math.inf, None),
        ([math.nan], None),
        ([10**5000], None),
    ],
)
def test_only_short_values_are_shown_back(value: object, shown: object) -> None:
    error = InvalidParameter("m", [Problem("kind", ("body", "wine"), "m", value)])
    (detail,) = error_body(error).model_dump()["detail"]
    assert detail == {"type": "kind", "loc": ["body", "wine"], "msg": "m", "input": shown}


@pytest.mark.parametrize("leaf", [ServingError, *LEAVES.values()])
def test_openais_clients_read_one_object(leaf: type[ServingError]) -> None:
    error = leaf("what is wrong")
    assert openai_error(error).model_dump() == {
        "error": {
            "message": "what is wrong",
            "type": OPENAI_TYPES.get(leaf.http_status, "invalid_request_error"),
            "param": getattr(leaf, "parameter", None),
            "code": leaf.openai_code,
        }
    }
    assert openai_status(error) == (400 if leaf.http_status == 422 else leaf.http_status)


@pytest.mark.parametrize(
    ("kind", "path", "code", "param"),
    [
        ("missing", ("messages",), "missing_required_parameter", "messages"),
        ("less_than_equal", ("temperature",), "invalid_value", "temperature"),
        ("int_parsing", ("max_tokens",), "invalid_type", "max_tokens"),
        ("string_type", ("messages", "0", "content"), "invalid_type", "messages[0].content"),
        (
            "extra_forbidden",
            ("structured_outputs", "x"),
            "unknown_parameter",
            "structured_outputs.x",
        ),
        ("parameter_not_supported", ("stop", "12"), "unsupported_parameter", "stop[12]"),
        ("anything", (), "invalid_value", None),
    ],
)
def test_a_wrong_parameter_is_named_as_openai_names_it(
    kind: str, path: tuple[str, ...], code: str, param: str | None
) -> None:
    error = InvalidParameter("m", [Problem(kind, ("body", *path), "it is wrong", 5)])
    told = openai_error(error).error
    assert (told.code, told.param) == (code, param)
    assert told.message == (f"{param}: it is wrong" if param else "it is wrong")


def test_each_problem_is_told_and_a_name_is_not_told_twice() -> None:
    own = Problem("a", ("body", "n"), "n is 17; it must be within 1 and 16", None)
    other = Problem("b", ("body", "top_p"), "too large", None)
    told = openai_error(UnsupportedParameter("m", [own, other])).error
    assert told.message == "n is 17; it must be within 1 and 16; top_p: too large"
    assert (told.param, told.code) == ("n", "unsupported_parameter")


def test_a_context_that_is_too_short_is_told_in_openais_words() -> None:
    error = ContextTooLong.of(4096, "the prompt has 5000 tokens")
    error.parameter = "messages"
    told = openai_error(error).error
    assert told.message.startswith("This model's maximum context length is 4096 tokens. However, ")
    assert (told.code, told.param) == ("context_length_exceeded", "messages")
