"""Answers of `mixtral-jax chat`: text in a form, and calls whose results a person gives."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_jax.errors import UserError
from mixtral_jax.generation import generate_tokens
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.specification import Kind, Specification
from mixtral_jax.structure.tool_grammar import ToolUse
from mixtral_jax.structure.tool_reader import ToolReader
from mixtral_jax.structure.wanted import Wanted
from mixtral_jax.tokenization.messages import Message, Tool, ToolCall
from mixtral_jax.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answers:
    """Answers of one model in one form.

    Args:
        model: Computes.
        tokenizer: That of the model.
        sampling: How tokens are drawn.
        max_tokens: Longest answer.
        tools: The functions that it may call.
        form: The form of all answers; None for any answer.
    """

    model: Transformer
    tokenizer: Tokenizer
    sampling: SamplingParams
    max_tokens: int
    tools: tuple[Tool, ...] = ()
    form: Form | None = None

    def answer(self, messages: Sequence[Message]) -> Iterator[str | ToolCall]:
        """Yields the text of the next answer as it comes, and each call when it is whole."""
        reader = ToolReader(self.tokenizer) if self.tools else None
        detokenizer = self.tokenizer.detokenizer()
        ids = self.tokenizer.chat(messages, tools=self.tools)
        for token in generate_tokens(
            self.model,
            ids,
            self.sampling,
            max_tokens=self.max_tokens,
            eos_ids=self.tokenizer.eos_ids,
            form=self.form,
        ):
            text, calls = (detokenizer.push(token), []) if reader is None else reader.push(token)
            if text:
                yield text
            yield from calls
        text, calls = (detokenizer.finish(), []) if reader is None else reader.finish()
        if text:
            yield text
        yield from calls


def form_of(
    model: Transformer, tokenizer: Tokenizer, schema: str | None, tools: tuple[Tool, ...]
) -> Form | None:
    """Returns the form of answers by a JSON Schema, by tools, or by both; raises StructureError."""
    response = None if schema is None else Specification(Kind.JSON_SCHEMA, schema)
    wanted: Wanted | None = response
    if tools:
        wanted = ToolUse(tokenizer.tool_form, tools, response=response)
    if wanted is None:
        return None
    # The user's own files need no process that may die of them.
    with Compiler(tokenizer, model.config.vocab_size, processes=0) as compiler:
        return compiler.compile(wanted, continues=False, salt=b"")


def tools_of(file: Path) -> tuple[Tool, ...]:
    """Returns the tools of a JSON file: a list in OpenAI's form, with or without "function".

    Raises UserError that names the file and the entry.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from None
    if isinstance(entries, dict):
        entries = entries.get("tools", [entries])
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file} has no tools: give a list of functions, as in OpenAI's API")
    return tuple(_tool(entry, f"entry {place} of {file}") for place, entry in enumerate(entries))


def _tool(entry: Any, where: str) -> Tool:
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise UserError(f'{where} is no function: give {{"name": ..., "parameters": {{...}}}}')
    parameters = function.get("parameters")
    return Tool(
        name,
        str(function.get("description") or ""),
        "" if parameters is None else json.dumps(parameters),
    )


def written(call: ToolCall) -> str:
    """Returns a call as Python writes it: get_weather(city="Rome", days=3)."""
    arguments = json.loads(call["arguments"])
    values = ", ".join(
        f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items()
    )
    return f"{call['name']}({values})"


def results(calls: Sequence[ToolCall], ask: Callable[[str], str]) -> list[Message]:
    """Returns the messages of a tool with the result of each call, for which `ask` is called."""
    return [
        {"role": "tool", "content": ask(call["name"]), "tool_call_id": call["id"]} for call in calls
    ]
