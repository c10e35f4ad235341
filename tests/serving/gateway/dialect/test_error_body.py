"""The body of an answer that is not 2xx."""

import json
import math

import pytest

from serving.errors import LEAVES, InvalidParameter, Problem, ServingError
from serving.gateway.dialect.error_body import error_body


@pytest.mark.parametrize("leaf", [ServingError, *LEAVES.values()])
def test_an_error_says_the_same_wherever_a_client_looks(leaf: type[ServingError]) -> None:
    body = error_body(leaf("what is wrong")).model_dump()
    inner = body.pop("error")
    detail = body.pop("detail")
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
