"""A ResponseFormat of the wire becomes a form, or an error that names the field and the pointer."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.specification import Kind, Specification
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.errors import InvalidParameter, to_grpc
from serving.proto import inference_pb2 as pb
from serving.service.answer.form import (
    MAX_WEAKENED_BYTES,
    AnswerForms,
    header,
    specification_of,
)

TOKENIZER = ByteTokenizer()
NUMBER = (
    '{"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], '
    '"additionalProperties": false}'
)


class Failing(Compiler):
    """Raises an error in place of compiling."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(TOKENIZER, TOKENIZER.vocab_size, processes=0)
        self._error = error

    def compile(self, specification: Specification, *, continues: bool, salt: bytes) -> Form:
        raise self._error


class Panic(BaseException):
    """An error as Rust's panics are in Python: no Exception."""


@pytest.fixture(scope="module")
def forms() -> Iterator[AnswerForms]:
    with Compiler(TOKENIZER, TOKENIZER.vocab_size, processes=0) as compiler:
        yield AnswerForms(compiler, TOKENIZER)


def asking(response_format: pb.ResponseFormat) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="x", response_format=response_format)


def allowed(form: Form, text: str) -> set[str]:
    """The letters that may follow a text; "" is the end."""
    matcher = form.matcher()
    matcher.consume([TOKENIZER.encode(letter)[-1] for letter in text])
    mask = np.zeros(-(-TOKENIZER.vocab_size // 32), np.int32)
    matcher.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return {TOKENIZER.token_bytes(int(i)).decode("utf-8", "replace") for i in np.flatnonzero(bits)}


@pytest.mark.parametrize(
    ("asked", "before", "letters"),
    [
        (pb.ResponseFormat(json_object=pb.JsonObject()), "", {"{"}),
        (pb.ResponseFormat(json_schema=NUMBER), '{"n": 7', {"}"}),
        (pb.ResponseFormat(json_schema=NUMBER, strict=True), '{"n": 7}', {""}),
        (pb.ResponseFormat(regex="[ab]c"), "", {"a", "b"}),
        (pb.ResponseFormat(choice=pb.Texts(texts=["yes", "no"])), "n", {"o"}),
        (pb.ResponseFormat(lark='start: "x" /[0-3]/'), "x", {"0", "1", "2", "3"}),
        (pb.ResponseFormat(gbnf='root ::= "x" [0-3]'), "x", {"0", "1", "2", "3"}),
    ],
    ids=["object", "schema", "strict", "regex", "choice", "lark", "gbnf"],
)
def test_each_kind_allows_what_it_says(
    forms: AnswerForms, asked: pb.ResponseFormat, before: str, letters: set[str]
) -> None:
    form = forms.form(asking(asked), continues=True)
    assert form is not None and form.holds_text and not form.may_call
    found = allowed(form.form, before)
    assert letters <= found and not {"z", "<"} & found
    assert found - letters <= {" ", "\n", "\t", "\r", ""}  # white space between tokens of JSON


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (pb.ResponseFormat(), "^response_format is empty; set one of json_object, json_schema,"),
        (
            pb.ResponseFormat(regex="a", strict=True),
            "^response_format.strict is for json_schema; leave it out with regex$",
        ),
    ],
)
def test_what_is_no_kind_is_refused(asked: pb.ResponseFormat, text: str) -> None:
    with pytest.raises(InvalidParameter, match=text):
        specification_of(asked)


def test_the_kinds_of_the_wire_are_those_of_the_library() -> None:
    names = {field.name for field in pb.ResponseFormat.DESCRIPTOR.oneofs_by_name["kind"].fields}
    assert names == {kind.value for kind in Kind}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (pb.ResponseFormat(json_schema="{"), "response_format.json_schema"),
        (pb.ResponseFormat(regex="(a"), "response_format.regex"),
        (pb.ResponseFormat(lark="start: b"), "response_format.lark"),
    ],
)
def test_the_wrong_field_is_named(forms: AnswerForms, asked: pb.ResponseFormat, field: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        forms.form(asking(asked), continues=False)
    (problem,) = caught.value.problems
    assert ".".join(problem.path) == field
    assert str(caught.value).startswith(f"{field}: ")


def refusal(error: BaseException) -> InvalidParameter:
    asked = pb.ResponseFormat(json_schema="{}")
    with Failing(error) as failing, pytest.raises(InvalidParameter) as caught:
        AnswerForms(failing, TOKENIZER).form(asking(asked), continues=False)
    return caught.value


def test_a_refusal_has_the_keyword_and_its_pointer() -> None:
    error = refusal(StructureError("`not` cannot be enforced", "/properties/a/not"))
    assert str(error) == (
        "response_format.json_schema: `not` cannot be enforced (at /properties/a/not)"
    )
    assert error.problems[0].pointer == "/properties/a/not"
    error = refusal(StructureError("/properties/a/not: it cannot be enforced", "/properties/a/not"))
    assert str(error) == "response_format.json_schema: /properties/a/not: it cannot be enforced"


def test_a_refusal_of_much_text_has_room_in_the_metadata() -> None:
    """A client of gRPC takes 8 KB of it, in which text beyond ASCII is three times as long."""
    error = refusal(StructureError("\u00e9" * 100_000, "/\u00e9" * 100_000))
    assert len(str(error).encode()) < 900
    details = dict(to_grpc(error))["grpc-status-details-bin"]
    assert 3 * len(str(error).encode()) + len(details) * 4 / 3 < 7000


def test_a_panic_of_the_compiler_ends_its_request_alone() -> None:
    assert str(refusal(Panic("stack"))) == (
        "response_format.json_schema cannot be compiled; simplify it"
    )
    asked = pb.ResponseFormat(regex="a")
    with Failing(MemoryError()) as failing, pytest.raises(MemoryError):
        AnswerForms(failing, TOKENIZER).form(asking(asked), continues=False)


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ((), ""),
        (("/a: uniqueItems",), "/a: uniqueItems"),
        (("/a: x", "/\u00e9\n: y"), "/a: x; /%C3%A9%0A: y"),
        (("/" + "a" * 1023,), "/" + "a" * 1023),
        (("/" + "a" * 1024,), "and 1 more"),
        (("/a", "/" + "b" * 1024, "/c"), "/a; and 2 more"),
    ],
)
def test_weakened_parts_are_a_line_of_ascii(entries: Sequence[str], line: str) -> None:
    assert header(entries) == line
    assert len(line) <= MAX_WEAKENED_BYTES


def test_a_line_of_many_parts_is_made_in_one_pass() -> None:
    """128 tools may have a hundred each, and the event loop waits for it."""
    line = header("f#/properties/a: not enforced: " + "x" * 400 for _ in range(50_000))
    assert line.endswith("; and 49998 more") and len(line) <= MAX_WEAKENED_BYTES
