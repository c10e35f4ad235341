"""Tools of the wire: what may be called, and which field a mistake is in."""

import json
from collections.abc import Iterator

import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.tokenization.mistral import MistralTokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.errors import InvalidParameter
from serving.proto import inference_pb2 as pb
from serving.service.answer.form import AnswerForm, AnswerForms
from serving.service.answer.tool_use import messages_of, tools_of
from tests.mixtral_jax.structure.test_tool_grammar import called_ids
from tests.support.tokenizers import MISTRAL_FILES
from tests.support.tools import ADD, ROME, TOOLS, WEATHER

Mode = pb.ToolChoice.Mode
V3: Tokenizer = MistralTokenizer(MISTRAL_FILES["v3"])
BYTES: Tokenizer = ByteTokenizer()
PROTO = [
    pb.Tool(name=t.name, description=t.description, parameters=t.parameters, strict=t.strict)
    for t in TOOLS
]


@pytest.fixture(scope="module")
def v3() -> Iterator[AnswerForms]:
    with Compiler(V3, V3.vocab_size, processes=0) as compiler:
        yield AnswerForms(compiler, V3)


@pytest.fixture(scope="module")
def toy() -> Iterator[AnswerForms]:
    with Compiler(BYTES, BYTES.vocab_size, processes=0) as compiler:
        yield AnswerForms(compiler, BYTES)


def asking(
    mode: pb.ToolChoice.Mode | None = None,
    *,
    allowed: tuple[str, ...] = (),
    tools: list[pb.Tool] = PROTO,
    **fields: object,
) -> pb.GenerateRequest:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="x")], tools=tools)
    if mode is not None:
        chat.tool_choice.CopyFrom(pb.ToolChoice(mode=mode, allowed=allowed))
    return pb.GenerateRequest(chat=chat, **fields)


def accepts(form: AnswerForm | None, ids: list[int]) -> bool:
    """Whether the grammar lets an answer have these ids, and then end."""
    assert form is not None
    if form.form.begins_after is not None:
        if form.form.begins_after not in ids:
            return True  # nothing is masked
        ids = ids[ids.index(form.form.begins_after) :]
    matcher = form.form.matcher()
    try:
        matcher.consume(ids)
    except StructureError:
        return False
    return matcher.may_end


TEXT = V3.encode("It is hot.")[1:]


@pytest.mark.parametrize(
    ("message", "rome", "text"),
    [
        (asking(), True, True),
        (asking(Mode.MODE_UNSPECIFIED), True, True),
        (asking(Mode.MODE_AUTO), True, True),
        (asking(Mode.MODE_NONE), False, True),
        (asking(Mode.MODE_REQUIRED), True, False),
        (asking(Mode.MODE_REQUIRED, allowed=("get_weather",)), True, False),
        (asking(Mode.MODE_AUTO, allowed=("add",)), False, True),
    ],
)
def test_the_choice_says_what_an_answer_may_be(
    v3: AnswerForms, message: pb.GenerateRequest, rome: bool, text: bool
) -> None:
    form = v3.form(message, continues=False)
    assert accepts(form, called_ids(V3, "Rome")) is rome
    assert accepts(form, TEXT) is text
    assert form is not None and not form.holds_text
    assert form.may_call is (message.chat.tool_choice.mode != Mode.MODE_NONE)


def test_the_toy_that_may_not_call_cannot_begin_to(toy: AnswerForms) -> None:
    form = toy.form(asking(Mode.MODE_NONE), continues=False)
    assert not accepts(form, called_ids(BYTES, "Rome"))
    assert accepts(form, BYTES.encode("It is <hot>.")[1:])


def test_several_calls_are_allowed_unless_they_are_not(v3: AnswerForms) -> None:
    both = called_ids(V3, "Rome", "sum")
    assert accepts(v3.form(asking(), continues=False), both)
    message = asking()
    message.chat.parallel_tool_calls = False
    assert not accepts(v3.form(message, continues=False), both)


def test_a_model_without_training_makes_one_call_unless_more_are_asked_for(
    toy: AnswerForms,
) -> None:
    both = called_ids(BYTES, "Rome", "sum")
    assert accepts(toy.form(asking(), continues=False), called_ids(BYTES, "Rome"))
    assert not accepts(toy.form(asking(), continues=False), both)
    message = asking()
    message.chat.parallel_tool_calls = True
    assert accepts(toy.form(message, continues=False), both)


def test_with_a_form_an_answer_calls_or_matches_it(v3: AnswerForms) -> None:
    schema = '{"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}'
    form = v3.form(asking(response_format=pb.ResponseFormat(json_schema=schema)), continues=False)
    assert accepts(form, called_ids(V3, "Rome"))
    assert accepts(form, V3.encode('{"n": 7}')[1:])
    assert not accepts(form, TEXT)
    assert form is not None and form.holds_text and form.may_call
    message = asking(Mode.MODE_NONE, response_format=pb.ResponseFormat(json_schema=schema))
    form = v3.form(message, continues=False)
    assert accepts(form, V3.encode('{"n": 7}')[1:])
    assert not accepts(form, called_ids(V3, "Rome"))
    assert form is not None and form.holds_text and not form.may_call


def test_without_tools_nothing_is_asked(v3: AnswerForms) -> None:
    assert v3.form(asking(Mode.MODE_AUTO, tools=[]), continues=False) is None


BAD = json.dumps({"type": "object", "properties": {"a": {"type": "blue"}}})


@pytest.mark.parametrize(
    ("message", "field", "pointer", "text"),
    [
        (asking(Mode.MODE_REQUIRED, tools=[]), "chat.tool_choice", "", "there are no tools"),
        (asking(Mode.MODE_AUTO, allowed=("fly",)), "chat.tool_choice", "", "'fly'"),
        (
            asking(tools=[PROTO[0], pb.Tool(name="bad", parameters=BAD)]),
            "chat.tools.1.parameters",
            "/properties/a/type",
            "parameters of the function bad",
        ),
        (
            asking(response_format=pb.ResponseFormat(json_schema=BAD)),
            "response_format.json_schema",
            "/properties/a/type",
            "",
        ),
    ],
)
def test_a_mistake_is_named_by_its_field_and_pointer(
    v3: AnswerForms, message: pb.GenerateRequest, field: str, pointer: str, text: str
) -> None:
    with pytest.raises(InvalidParameter) as caught:
        v3.form(message, continues=False)
    (problem,) = caught.value.problems
    assert (".".join(problem.path), problem.pointer) == (field, pointer)
    assert text in str(caught.value) and str(caught.value).startswith(field)


def test_an_unknown_mode_is_refused(v3: AnswerForms) -> None:
    with pytest.raises(InvalidParameter, match="^chat.tool_choice.mode is 9"):
        v3.form(asking(9), continues=False)  # type: ignore[arg-type]


def test_messages_and_tools_arrive_as_tokenizers_read_them() -> None:
    call = pb.ToolCall(**ROME)
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role="user", content="x"),
            pb.ChatMessage(role="assistant", tool_calls=[call]),
            pb.ChatMessage(role="tool", content="hot", tool_call_id=ROME["id"]),
        ],
        tools=PROTO,
    )
    assert messages_of(chat) == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [ROME]},
        {"role": "tool", "content": "hot", "tool_call_id": ROME["id"]},
    ]
    assert tools_of(chat) == (WEATHER, ADD)
