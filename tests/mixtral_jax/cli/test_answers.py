"""Answers of the chat in the terminal, by the toy with random weights."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import mixtral_jax
from mixtral_jax import SamplingParams
from mixtral_jax.cli.answers import Answers, form_of, results, tools_of, written
from mixtral_jax.errors import StructureError, UserError
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.tool_grammar import Mode, ToolUse, tool_grammar
from mixtral_jax.tokenization.messages import Tool
from tests.support.tools import ROME, SUM

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 50}},
    "required": ["n"],
    "additionalProperties": False,
}
WILD = SamplingParams(temperature=1.5, seed=3)
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def toy() -> Any:
    return mixtral_jax.load("tiny-random", mesh=None)


def test_an_answer_in_a_form(toy: Any) -> None:
    form = form_of(*toy, json.dumps(SCHEMA), ())
    answer = "".join(map(str, Answers(*toy, WILD, 100, (), form).answer(HELLO)))
    jsonschema.validate(json.loads(answer), SCHEMA)
    with pytest.raises(StructureError):
        form_of(*toy, '{"type": "blue"}', ())
    assert form_of(*toy, None, ()) is None


def test_an_answer_that_calls(toy: Any) -> None:
    model, tokenizer = toy
    now = Tool("now")  # the toy's context has room for a short one
    use = ToolUse(tokenizer.tool_form, (now,), Mode.REQUIRED, parallel=False)
    grammar = tool_grammar(use, space=False)
    assert grammar is not None
    with Compiler(tokenizer, model.config.vocab_size, processes=0) as compiler:
        form = compiler.compile(grammar, continues=False, salt=b"")
    (call,) = Answers(*toy, WILD, 100, (now,), form).answer(HELLO)
    assert isinstance(call, dict)
    assert (call["name"], json.loads(call["arguments"])) == ("now", {})


def test_calls_and_results_as_a_person_reads_them() -> None:
    assert written(ROME) == 'get_weather(city="Rome", days=3)'
    assert results([ROME, SUM], lambda name: f"of {name}") == [
        {"role": "tool", "content": "of get_weather", "tool_call_id": ROME["id"]},
        {"role": "tool", "content": "of add", "tool_call_id": SUM["id"]},
    ]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}],
        [{"name": "now", "parameters": {"type": "object"}}],
        {"tools": [{"name": "now", "parameters": {"type": "object"}}]},
    ],
)
def test_files_of_tools(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    (tool,) = tools_of(file)
    assert (tool.name, json.loads(tool.parameters)) == ("now", {"type": "object"})


@pytest.mark.parametrize("content", ["{", "[]", "3", "[3]", '[{"function": {}}]'])
def test_what_is_no_file_of_tools(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tools.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="tools.json"):
        tools_of(file)
