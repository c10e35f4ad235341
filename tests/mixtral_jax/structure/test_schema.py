"""Reading of JSON Schemas: what is enforced, what is refused and with which pointer."""

import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.schema import read, read_parameters


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ('{"type": NaN}', "NaN"),
        ('{"type": "string", "type": "number"}', "twice"),
        ("[1]", "object"),
        ("[" * 200 + "]" * 200, "nested"),
        ('{"title": "' + "x" * 300_000 + '"}', "256 KB"),
    ],
)
def test_texts_that_are_no_schema(text: str, words: str) -> None:
    with pytest.raises(StructureError, match=words):
        read(text)


def test_options_of_the_grammar_are_not_the_clients() -> None:
    assert "x-guidance" not in read('{"type": "object", "x-guidance": {"lenient": true}}').text


def test_a_function_without_parameters_takes_an_empty_object() -> None:
    assert read_parameters("").is_enforced
