"""Grammars of calls: what they allow, what they force, and what they refuse."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.form import form_of
from mixtral_jax.structure.matcher import Guide, Matcher
from mixtral_jax.structure.specification import Kind, Specification
from mixtral_jax.structure.tool_grammar import (
    OF_RESPONSE,
    Mode,
    ToolUse,
    tool_grammar,
    tried_tools,
)
from mixtral_jax.tokenization.messages import Tool
from mixtral_jax.tokenization.tokenizer import Tokenizer, load
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.mixtral_jax.tokenization.test_tool_template import BLOCKS
from tests.support.tokenizers import MISTRAL_NAMES, SPECS, write
from tests.support.tools import TOOLS, called_ids

BYTES = ByteTokenizer()
GUIDE = Guide(BYTES, BYTES.vocab_size)


def follow(matcher: Matcher, ids: Sequence[int]) -> int:
    """Takes in the ids, and returns how many of them were forced; those must be the same."""
    count = place = 0
    while place < len(ids):
        forced = matcher.forced()
        if not forced:
            matcher.consume([ids[place]])
            place += 1
            continue
        assert forced == tuple(ids[place : place + len(forced)])
        matcher.consume(forced)
        place += len(forced)
        count += len(forced)
    return count


@pytest.mark.parametrize("name", [*MISTRAL_NAMES, "bytes"])
@pytest.mark.parametrize("mode", [Mode.AUTO, Mode.REQUIRED])
def test_calls_as_the_format_writes_them_match_and_forced_ids_are_the_formats(
    name: str, mode: Mode, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[name]
    calls = ["Rome"] if tokenizer.tool_form.at_most_one else ["Rome", "sum"]
    ids = called_ids(tokenizer, *calls)
    use = ToolUse(tokenizer.tool_form, TOOLS, mode)
    grammar = tool_grammar(use, space=tokenizer.dummy_space)
    assert grammar is not None
    matcher = Guide(tokenizer, tokenizer.vocab_size).matcher(grammar.text)
    forced = follow(matcher, ids)
    assert matcher.may_end
    if name == "v3":
        assert forced >= len(ids) / 2


def accepts(use: ToolUse, text: str) -> bool:
    grammar = tool_grammar(use, space=False)
    assert grammar is not None
    matcher = GUIDE.matcher(grammar.text)
    try:
        matcher.consume(BYTES.encode(text)[1:])
    except StructureError:
        return False
    return matcher.may_end


ONE = '<tool_call>[{"name": "add", "arguments": {"a": 1, "b": 2}}]</tool_call>'
TWO = ONE.replace("]<", f", {ONE[len('<tool_call>[') :]}"[: -len("</tool_call>")] + "<")


@pytest.mark.parametrize(
    ("text", "auto", "required", "single", "named"),
    [
        (ONE, True, True, True, True),
        (TWO, True, True, False, True),
        ("Hello", True, False, True, False),
        ("", True, False, True, False),
        ("<tool_call>", True, False, True, False),  # not yet a call
        ('<tool_call>[{"name": "sub", "arguments": {}}]</tool_call>', *[False] * 4),
        (ONE.replace("2", '"2"'), *[False] * 4),
        (ONE.replace(', "b": 2', ""), *[False] * 4),
        (f"Hello {ONE}", True, False, True, False),  # text
        (f"{ONE} Hello", *[False] * 4),
        (ONE.replace(": 1", ":\n1"), True, True, True, True),
        (ONE.replace(": 1", ":" + 9 * " " + "1"), *[False] * 4),
        ('<tool_call>[{"name": "get_weather", "arguments": {"city": "", "days": 0}}]</tool_call>',
         True, True, True, False),
    ],
)  # fmt: skip
def test_what_an_answer_may_be(
    text: str, auto: bool, required: bool, single: bool, named: bool
) -> None:
    form = BYTES.tool_form
    assert accepts(ToolUse(form, TOOLS), text) is auto
    assert accepts(ToolUse(form, TOOLS, Mode.REQUIRED), text) is required
    assert accepts(ToolUse(form, TOOLS, parallel=False), text) is single
    assert accepts(ToolUse(form, TOOLS, Mode.REQUIRED, allowed=("add",)), text) is named


def test_an_answer_calls_or_has_the_form_that_was_asked_for() -> None:
    response = Specification(Kind.JSON_OBJECT)
    use = ToolUse(BYTES.tool_form, TOOLS, response=response)
    assert accepts(use, ONE)
    assert accepts(use, '{"a": 1}')
    assert not accepts(use, "Hello")
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
    use = ToolUse(BYTES.tool_form, TOOLS, response=Specification(Kind.JSON_SCHEMA, schema))
    assert accepts(use, '{"a": 1}')
    assert not accepts(use, '{"a": "1"}')


def test_a_form_of_text_may_have_text_before_its_calls(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path, SPECS["byte-level"], BLOCKS))
    grammar = tool_grammar(ToolUse(tokenizer.tool_form, TOOLS), space=False)
    assert grammar is not None
    guide = Guide(tokenizer, tokenizer.vocab_size)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    for text, is_right in (
        ("Hello", True),
        (call, True),
        (f"{call}\n{call}", True),
        (f"I look.\n{call}", True),
        ("I <tool_call>", True),  # not yet a call
        (f"I {call} look", False),
        (call.replace("add", "sub"), False),
        (f"I {call[:-5]}", False),
    ):
        matcher = guide.matcher(grammar.text)
        try:
            matcher.consume(tokenizer.encode(text))
            assert matcher.may_end is is_right, text
        except StructureError:
            assert not is_right, text


def test_natively_called_tools_stand_beside_any_form_of_the_response(
    all_tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = all_tokenizers["v3"]
    guide = Guide(tokenizer, tokenizer.vocab_size)
    for response, text in (
        (Specification(Kind.REGEX, "[a-z]+"), "yes"),
        (Specification(Kind.CHOICE, choices=("yes", "no")), "yes"),
        (Specification(Kind.LARK, 'start: "yes"'), "yes"),
        (Specification(Kind.JSON_OBJECT), '{"a": 1}'),
    ):
        use = ToolUse(tokenizer.tool_form, TOOLS, response=response)
        grammar = tool_grammar(use, space=True)
        assert grammar is not None
        assert grammar.begins_after is None
        for ids in (tokenizer.encode(text)[1:], called_ids(tokenizer, "Rome")):
            matcher = guide.matcher(grammar.text)
            matcher.consume(ids)
            assert matcher.may_end


def test_text_before_the_control_id_of_calls_is_free(
    all_tokenizers: dict[str, Tokenizer],
) -> None:
    form = all_tokenizers["v3"].tool_form
    auto = tool_grammar(ToolUse(form, TOOLS), space=True)
    required = tool_grammar(ToolUse(form, TOOLS, Mode.REQUIRED), space=True)
    assert auto is not None
    assert auto.begins_after == 5
    assert required is not None
    assert required.begins_after is None


def test_a_text_that_must_call_nothing_has_no_beginning_of_calls(tmp_path: Path) -> None:
    """The prompt shows tools, and a model might write the text of its form of calls."""
    blocks = load(write(tmp_path, SPECS["byte-level"], BLOCKS))
    for tokenizer in (BYTES, blocks):
        guide = Guide(tokenizer, tokenizer.vocab_size)
        use = ToolUse(tokenizer.tool_form, TOOLS, Mode.NONE)
        grammar = tried_tools(use, space=False, attempt=partial(form_of, guide=guide))
        for text, is_right in (
            ("Hello", True),
            ("", True),
            ("<tool", True),
            ("a < b, and <b>c</b>", True),
            (tokenizer.tool_form.trigger_text, False),
            ("<tool_call>", False),
            ('<tool_call>[{"name": ["add"]}]</tool_call>', False),
            (f"I look. {tokenizer.tool_form.trigger_text}", False),
        ):
            matcher = guide.matcher(grammar.text)
            ids = tokenizer.encode(text)[len(tokenizer.encode("")) :]
            if is_right:
                matcher.consume(ids)
                assert matcher.may_end, (tokenizer.tool_form, text)
            else:  # the token that would complete the tag is never allowed
                with pytest.raises(StructureError):
                    matcher.consume(ids)


def test_without_calls_there_is_no_grammar() -> None:
    assert tool_grammar(ToolUse(BYTES.tool_form, TOOLS, Mode.NONE), space=False) is None
    assert tool_grammar(ToolUse(BYTES.tool_form, ()), space=False) is None


@pytest.mark.parametrize(
    ("use", "complaint", "pointer"),
    [
        (ToolUse(BYTES.tool_form, TOOLS, allowed=("sub",)), "names the function 'sub'", ""),
        (ToolUse(BYTES.tool_form, (), Mode.REQUIRED), "requires a call", ""),
        (ToolUse(BYTES.tool_form, (Tool("f", parameters="{"),)), "of the function f: ", ""),
        (
            ToolUse(BYTES.tool_form, TOOLS, response=Specification(Kind.REGEX, "a")),
            "could not be told from a regex",
            "",
        ),
    ],
)
def test_what_is_wrong_is_named(use: ToolUse, complaint: str, pointer: str) -> None:
    with pytest.raises(StructureError, match=complaint) as caught:
        tool_grammar(use, space=False)
    assert caught.value.pointer == pointer


CONTRADICTION = {
    "type": "object",
    "properties": {"a": {"type": "string", "format": "date", "pattern": "^x"}},
    "required": ["a"],
}
POINTER = "/properties/a/format"


def test_a_rule_that_the_compiler_refuses_is_left_out_of_its_function_alone() -> None:
    odd = Tool("odd", parameters=json.dumps(CONTRADICTION))
    use = ToolUse(BYTES.tool_form, (odd, *TOOLS), Mode.REQUIRED)
    grammar = tried_tools(use, space=False, attempt=partial(form_of, guide=GUIDE))
    assert [entry.partition(": ")[0] for entry in grammar.weakened] == [f"odd#{POINTER}"]
    (check,) = grammar.checks
    assert (check.tool, json.loads(check.schema)) == ("odd", CONTRADICTION)
    strict = ToolUse(BYTES.tool_form, (replace(odd, strict=True), *TOOLS))
    with pytest.raises(StructureError, match="of the function odd: ") as caught:
        tried_tools(strict, space=False, attempt=partial(form_of, guide=GUIDE))
    assert caught.value.pointer == POINTER


def test_a_rule_of_the_response_is_left_out_beside_tools() -> None:
    schema = Specification(Kind.JSON_SCHEMA, json.dumps(CONTRADICTION))
    use = ToolUse(BYTES.tool_form, TOOLS, response=schema)
    grammar = tried_tools(use, space=False, attempt=partial(form_of, guide=GUIDE))
    assert [entry.partition(": ")[0] for entry in grammar.weakened] == [POINTER]
    assert [check.tool for check in grammar.checks] == [""]
    strict = ToolUse(BYTES.tool_form, TOOLS, response=replace(schema, strict=True))
    with pytest.raises(StructureError, match=f"^{OF_RESPONSE}: ") as caught:
        tried_tools(strict, space=False, attempt=partial(form_of, guide=GUIDE))
    assert caught.value.pointer == POINTER
