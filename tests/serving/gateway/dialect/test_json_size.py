"""The number of a body's values is bounded before it is parsed."""

import json

import pytest

from serving.errors import InvalidRequest
from serving.gateway.dialect.json_size import MAX_VALUES, check_values


@pytest.mark.parametrize("value", ["1", "[]", "{}", "1.5", '"a"', "null"])
def test_a_list_has_so_many_values_and_no_more(value: str) -> None:
    # A list begins with a bracket, and each of its values but the first stands behind a comma.
    most = MAX_VALUES if value not in ("[]", "{}") else MAX_VALUES // 2
    check_values(b"[" + b",".join([value.encode()] * most) + b"]")
    with pytest.raises(InvalidRequest, match="the body has too many values"):
        check_values(b"[" + b",".join([value.encode()] * (most + 2)) + b"]")


def test_commas_and_brackets_of_texts_are_no_values() -> None:
    """Nor do escaped quotation marks end a text."""
    text = 'a,[{"\\,"' * MAX_VALUES
    assert json.loads(json.dumps({"content": text})) == {"content": text}
    check_values(json.dumps({"content": text}).encode())
