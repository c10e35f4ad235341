"""Values of a body are counted before it is parsed, but not what stands in strings."""

import asyncio
import json

import pytest

from serving.errors import InvalidRequest
from serving.gateway.http.json_structure import (
    MAX_CONTAINERS,
    MAX_KEYS,
    MAX_VALUES,
    JsonStructure,
    check,
)


@pytest.mark.parametrize(
    ("text", "number", "name"),
    [
        ("[],", MAX_CONTAINERS, "objects and lists"),
        ("{},", MAX_CONTAINERS, "objects and lists"),
        ('["x\\"",[],{}],', MAX_CONTAINERS // 3, "objects and lists"),
        ('"a":1,', MAX_KEYS, "keys"),
        ('"":"\\\\",', MAX_KEYS, "keys"),
        ("1,", MAX_VALUES, "values"),
        ('"",', MAX_VALUES, "values"),
    ],
)
def test_values_have_a_number(text: str, number: int, name: str) -> None:
    check(text.encode() * number)
    with pytest.raises(InvalidRequest, match=f"the body has more than .*,.* {name}; send fewer"):
        check(text.encode() * (number + 1) + b"[[[")


@pytest.mark.parametrize("text", ["[{:,", '"[{', "\\[{:,", '\\"[{:,', "\u8a9e[{:,"])
def test_a_text_may_hold_any_number_of_their_marks(text: str) -> None:
    check(json.dumps({"messages": [{"content": text * MAX_VALUES}]}).encode())


def test_a_string_without_end_is_read_once() -> None:
    """Each of its quotes could begin a string: to try them all would take hours."""
    check(b'["' + b'\\"[' * 10**6)
    check(b'["' + b"\\" * 10**6 + b"[" * 10**6)


def test_a_body_is_counted_in_a_thread() -> None:
    async def test() -> None:
        structure = JsonStructure()
        await structure.check(b"[" * 2**16)  # too small to be counted
        with pytest.raises(InvalidRequest):
            await structure.check(b"[" * (2**16 + 1))
        structure.close()

    asyncio.run(test())
