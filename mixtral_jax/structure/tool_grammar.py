"""Grammars of tool calls: the form of the model, the names that may be called, and their arguments.

Such a grammar is one in Lark's notation for the form, and one JSON Schema for the arguments of each
function. https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.grammar import WHITESPACE, grammar_of, tried_specification
from mixtral_jax.structure.schema import Schema, checks_of, read_parameters, settle
from mixtral_jax.structure.specification import Grammar, Kind, Specification
from mixtral_jax.tokenization.messages import Tool
from mixtral_jax.tokenization.tool_form import Piece, Slot, ToolForm

# White space in arguments. The first is that of Mistral's formats: nothing but ", " and
# ": " lets most of a call be forced. In the second a small model has its own line breaks, few
# enough that it cannot write nothing else.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_BOUNDED = {"whitespace_pattern": WHITESPACE}
OF_RESPONSE = "an answer without calls"  # begins what is said of a response's form
_TAG = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")  # that a text of calls begins with
_JSON = set('{["-0123456789tfn')  # what JSON begins with


class Mode(Enum):
    """Choice between answers that call tools and answers that do not."""

    AUTO = "auto"  # it may
    NONE = "none"  # it does not
    REQUIRED = "required"  # it does


@dataclass(frozen=True)
class ToolUse:
    """Tools that an answer may call, as a caller asks for it. Plain data."""

    form: ToolForm
    """The model's form of calls: `Tokenizer.tool_form`."""
    tools: tuple[Tool, ...]
    """As the prompt has them."""
    mode: Mode = Mode.AUTO
    allowed: tuple[str, ...] = ()
    """Names of those that may be called; empty for all of them."""
    parallel: bool = True
    """Whether one answer may have several calls."""
    response: Specification | None = None
    """What an answer that calls nothing must match."""

    def callable_tools(self) -> tuple[Tool, ...]:
        """Returns the tools that may be called.

        Raises StructureError for allowed names that no tool has, and for calls that are required
        where there is nothing to call.
        """
        known = {tool.name for tool in self.tools}
        for name in self.allowed:
            if name not in known:
                raise StructureError(
                    f"tool_choice names the function {name[:100]!r}, which is none of tools"
                )
        if self.mode is Mode.REQUIRED and not self.tools:
            raise StructureError("tool_choice requires a call, and there are no tools: send some")
        if self.mode is Mode.NONE:
            return ()
        return tuple(t for t in self.tools if not self.allowed or t.name in self.allowed)


Attempt = Callable[[Grammar], object]
"""Function that compiles a grammar; raises StructureError if it is refused."""


def tried_tools(use: ToolUse, *, space: bool, attempt: Attempt) -> Grammar:
    """Returns the grammar of an answer to a prompt with tools after it was tried.

    Where the compiler refuses it, each schema is tried alone, and the rules that it refuses are
    left out of those that are not strict. The arguments are those of `tool_grammar` otherwise.

    Raises StructureError as `tool_grammar` does, and for a schema that is refused.
    """
    grammar = tool_grammar(use, space=space) or text_grammar(use.form, space=space)
    try:
        attempt(grammar)
        return grammar
    except StructureError:
        settled = tool_grammar(use, space=space, attempt=attempt)
        if settled is None or settled == grammar:
            raise
    attempt(settled)
    return settled


def tool_grammar(use: ToolUse, *, space: bool, attempt: Attempt | None = None) -> Grammar | None:
    """Returns the grammar of an answer that may call tools; None if it calls none.

    Where a control id begins calls and nothing is asked of other answers, the grammar begins after
    that id, and text before it is free. Its time grows with the schemas that a caller sent.

    Args:
        use: what the caller asked for.
        space: whether a space must stand before an answer that begins with text.
        attempt: tries each schema alone; None where that is not needed.

    Raises StructureError for unknown names and for parameters that are wrong, or strict and not
    enforceable; its pointer is one within the parameters, whose function the message names, or
    within the form of an answer without calls, which the message then names.
    """
    tools = use.callable_tools()
    if not tools:
        return None
    schemas = [_schema(tool, use.form, attempt) for tool in tools]
    weakened = tuple(
        f"{tool.name}#{rule}"
        for tool, schema in zip(tools, schemas, strict=True)
        for rule in schema.weakened
    )
    checks = tuple(
        check
        for tool, schema in zip(tools, schemas, strict=True)
        for check in checks_of(schema, tool.name)
    )
    form, trigger = use.form, use.form.trigger_id
    rules = _call_rules(form, tools, several=use.parallel and not form.at_most_one)
    grammars: list[dict[str, Any]] = [
        {"name": f"arguments_{place}", **_arguments(schema, form)}
        for place, schema in enumerate(schemas)
    ]
    begins_after = None
    ways = ["calls"]
    if use.mode is Mode.REQUIRED:
        pass
    elif use.response is not None:
        response, answer = _response(use.response, form, attempt)
        grammars.append(answer)
        weakened += response.weakened
        checks += response.checks
        ways.append("@response")
    elif trigger is not None:
        begins_after = trigger
    elif form.text_may_precede:
        ways = ["before after_trigger", "OTHER"]
        rules += _rules_around(form.trigger_text)
    else:
        ways.append("OTHER")
        rules += f"OTHER: /{_no_beginning(form.trigger_text)}/\n"
    lead = '" " ' if space else ""
    ways = [way if way == "calls" and trigger is not None else f"{lead}{way}" for way in ways]
    first = {"name": "answer", "lark_grammar": f"start: {' | '.join(ways)}\n{rules}"}
    return Grammar(json.dumps({"grammars": [first, *grammars]}), begins_after, weakened, checks)


def text_grammar(form: ToolForm, *, space: bool) -> Grammar:
    """Returns the grammar of an answer that calls nothing although its prompt shows tools.

    No control id is in it, and no text by which calls are recognised where they may stand. Where
    that text begins with a tag, such as <tool_call>, the tag stands nowhere: a model that could
    write it would go on with something that is nearly a call.

    Args:
        form: the model's form of calls.
        space: whether a space must stand before the answer.
    """
    trigger, lead = form.trigger_text, '" " ' if space else ""
    tag = _TAG.match(trigger)
    if not trigger:
        rule = "OTHER: /(?s:.*)/"
    elif tag is not None:
        rule = _without(tag[0])
    elif form.text_may_precede:
        rule = _without(trigger)
    else:
        rule = f"OTHER: /{_no_beginning(trigger)}/"
    return Grammar(f"start: {lead}OTHER\n{rule}\n")


def _schema(tool: Tool, form: ToolForm, attempt: Attempt | None) -> Schema:
    def compiles(schema: Schema) -> None:
        if attempt is not None:
            attempt(Grammar(json.dumps({"grammars": [_arguments(schema, form)]})))

    try:
        return settle(tool.parameters, compiles, tool.strict, read_parameters)
    except StructureError as error:
        raise StructureError(
            f"parameters of the function {tool.name}: {error}", error.pointer
        ) from error


def _arguments(schema: Schema, form: ToolForm) -> dict[str, Any]:
    """Returns the grammar of arguments in the model's form."""
    value = json.loads(schema.text)
    if not isinstance(value, dict):
        value = {"type": "object"}
    options = _COMPACT if form.is_compact else _BOUNDED
    return {"json_schema": {**value, "x-guidance": options}}


def _call_rules(form: ToolForm, tools: Sequence[Tool], *, several: bool) -> str:
    """Returns the rules of `calls`.

    Each function has a rule of its own with its name written out, so that the name decides whose
    arguments follow. A text that begins calls is one word, which ends where no other text can go
    on; the first call has a rule without it.
    """
    trigger = form.trigger_text
    begin: Sequence[Piece] = [trigger] if trigger else form.begin
    first = _without_text(form.call) if trigger else form.call
    more = f" ({_words(form.separator)} call)*" if several else ""
    lines = [
        f"calls: {_words(begin)} after_trigger",
        f"after_trigger: first{more} {_words(form.end)}",
    ]
    for rule, pieces in (("first", first), ("call", form.call)):
        lines.append(f"{rule}: {' | '.join(f'{rule}_{place}' for place in range(len(tools)))}")
        for place, tool in enumerate(tools):
            lines.append(f"{rule}_{place}: {_words(pieces, tool.name, place)}")
    if form.has_ids:
        lines.append("ID: /[a-zA-Z0-9]{9}/")
    return "\n".join(lines) + "\n"


def _rules_around(trigger: str) -> str:
    """Returns the rules of a text that ends with its first trigger, and of one that has none."""
    return f"before[suffix={_literal(trigger)}]: /(?s:.*)/\n{_without(trigger)}\n"


def _without_text(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Returns the pieces without the text at their beginning."""
    return next(pieces[i:] for i, piece in enumerate(pieces) if not isinstance(piece, str))


def _words(pieces: Sequence[Piece], name: str = "", place: int = 0) -> str:
    """Returns pieces in Lark's notation; a name is one word with the text around it."""
    words: list[str] = []
    text = ""
    for piece in (*pieces, None):
        if isinstance(piece, str):
            text += piece
        elif piece is Slot.NAME:
            text += name
        else:
            words += [_literal(text)] if text else []
            text = ""
            if isinstance(piece, int):
                words.append(f"<[{piece}]>")
            elif piece is not None:
                words.append("ID" if piece is Slot.ID else f"@arguments_{place}")
    return " ".join(words)


def _response(
    response: Specification, form: ToolForm, attempt: Attempt | None
) -> tuple[Grammar, dict[str, Any]]:
    """Returns what an answer without calls must match, and its grammar named `response`."""
    if form.trigger_id is None and (
        response.kind not in (Kind.JSON_OBJECT, Kind.JSON_SCHEMA) or form.trigger_text[0] in _JSON
    ):
        raise StructureError(
            f"{OF_RESPONSE}: this model writes calls as text, which could not be told from a "
            f"{response.kind.value}: ask for a json_schema beside tools, or for no tools"
        )
    try:
        if attempt is None:
            grammar = grammar_of(response, space=False)
        else:
            grammar = tried_specification(response, space=False, attempt=attempt)
    except StructureError as error:
        raise StructureError(f"{OF_RESPONSE}: {error}", error.pointer) from error
    if not grammar.text.startswith("{"):
        return grammar, {"name": "response", "lark_grammar": grammar.text}
    (only,) = json.loads(grammar.text)["grammars"]
    return grammar, {"name": "response", **only}


def _literal(text: str) -> str:
    """Returns a text as a string of Lark, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _without(text: str) -> str:
    """Returns the rule of every text in which `text` stands nowhere.

    The complement alone also has what is no UTF-8, so that `text` could be written and then nothing
    but bytes that no token has would end the answer.
    """
    return f"OTHER: /(?s:.*)/ & ~/(?s:.*){_escaped(text)}(?s:.*)/"


def _no_beginning(text: str) -> str:
    """Returns an expression for every text that does not begin with `text`."""
    expression = ""
    for character in reversed(text):
        escaped = _escaped(character)
        tail = f"{escaped}{expression}|" if expression else ""
        expression = f"({tail}[^{escaped}](?s:.*))?"
    return expression


def _escaped(text: str) -> str:
    """Returns an expression for a text."""
    return "".join(f"\\x{{{ord(character):X}}}" for character in text)
