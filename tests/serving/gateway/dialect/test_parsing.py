"""Malformed bodies, and what a refusal shows of them."""

import pytest

from serving.errors import InvalidParameter, InvalidRequest
from serving.gateway.dialect.chat.request import ChatRequest
from serving.gateway.dialect.openai import check_unknown
from serving.gateway.dialect.parsing import MAX_NESTING, MAX_PROBLEMS, read
from tests.support.chats import asked


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"hello"',
        b"null",
        b"\xff",
        b'{"messages": NaN}',
        b'{"messages": "\\ud800"}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_malformed(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(body, ChatRequest, check_unknown)
    assert type(caught.value) is InvalidRequest


def test_a_body_may_begin_with_a_byte_order_mark() -> None:
    text = '{"messages": [{"role": "user", "content": "\ufeffhi"}]}'
    for body in (text.encode(), text.encode("utf-8-sig")):
        request = read(body, ChatRequest, check_unknown)
        assert request.messages[0].content == "\ufeffhi"
    with pytest.raises(InvalidRequest, match="not JSON"):
        read(text.encode("utf-8-sig") + b"x", ChatRequest, check_unknown)


@pytest.mark.parametrize("begin, end", [("[", "]"), ('{"a":', "}")])
def test_what_nests_too_deeply_is_called_so(begin: str, end: str) -> None:
    def nested(depth: int) -> bytes:
        inner = begin * (depth - 1) + "1" + end * (depth - 1)
        return f'{{"messages": [{{"role": "user", "content": "a"}}], "x": {inner}}}'.encode()

    read(nested(MAX_NESTING), ChatRequest, check_unknown)
    for depth in (MAX_NESTING + 2, 10_000):
        with pytest.raises(InvalidRequest, match="at most 200 deep"):
            read(nested(depth), ChatRequest, check_unknown)


def test_a_mistake_beside_a_missing_feature_is_a_mistake() -> None:
    with pytest.raises(InvalidParameter) as caught:
        asked(functions=[{}], top_p=2, unknown=check_unknown)
    assert type(caught.value) is InvalidParameter
    assert {problem.path for problem in caught.value.problems} == {
        ("body", "top_p"),
        ("body", "functions"),
    }


def test_what_a_refusal_shows_of_the_request_is_bounded() -> None:
    long = "x" * 10_000
    with pytest.raises(InvalidRequest) as refused:
        asked(**{f"{long}{i}": 1 for i in range(100)})
    assert len(str(refused.value)) < 5_000
    for parameters in (
        {"messages": [{"role": "wizard", "content": "a"}] * 1_000},
        {"logit_bias": {f"{long}{i}": 0 for i in range(100)}},
    ):
        with pytest.raises(InvalidParameter) as caught:
            asked(check_unknown, **parameters)
        assert len(caught.value.problems) == MAX_PROBLEMS
        assert sum(len(step) for each in caught.value.problems for step in each.path) < 2_000
