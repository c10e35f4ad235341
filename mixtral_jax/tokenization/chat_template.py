"""ChatTemplate: a Jinja chat template as published beside a tokenizer.

The template gets the surroundings that transformers documents: a sandboxed environment,
`raise_exception`, `strftime_now`, `tojson`, loop controls and the tag `{% generation %}`.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from mixtral_jax.errors import ChatError, TokenizerError
from mixtral_jax.tokenization.messages import Message, check_text, parsed_json

# This mark behind a message shows where the message ends in the text that a template writes. It
# is a noncharacter, which Unicode keeps out of exchanged text. If text holds it, the last counts.
_END_MARK = "\U0010fffe"


# Characters that a template may write beside messages, and for each character of them. One that
# writes each message before every later one would make a gigabyte of a megabyte.
_MOST_TEXT, _MOST_GROWTH = 2**20, 4
_MOST_REASON = 500  # characters

_SAMPLE_TOOL = {"name": "a", "description": "a", "parameters": {"type": "object", "properties": {}}}
_SAMPLE_CALL: list[Message] = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "aaaaaaaaa", "name": "a", "arguments": "{}"}],
    },
    {"role": "tool", "content": "a", "tool_call_id": "aaaaaaaaa", "name": "a"},
]


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}` ... `{% endgeneration %}`, whose body is rendered as it stands.

    Templates mark with it what the assistant says, for software that trains on that alone. As in
    transformers, the body is a block of its own: variables set in it end with it.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Read the tag, whose name the parser stands on, up to its end tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_rendered")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _rendered(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplate:
    """A Jinja chat template and the special tokens that it may name, such as bos_token."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Compile `source`. Raises TokenizerError if it is no valid template.

        Args:
            source: the Jinja source.
            tokens: text per variable name, e.g. {"eos_token": "</s>"}.
        """
        self.source = source
        self.tokens = dict(tokens)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.filters["tojson"] = _tojson
        try:
            self._template = environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except Exception as error:  # Jinja writes a Python program, whose compiler fails in its way
            raise TokenizerError(
                "the chat template is no valid Jinja template: "
                f"{str(error)[:500] or type(error).__name__}"
            ) from error

        self.takes_tools = "tools" in names
        """True if the template reads the list of tools."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        continue_last: bool = False,
        asks: bool = True,
        tools: Sequence[Mapping[str, object]] = (),
    ) -> str:
        """Return the chat as text, up to where the assistant's answer begins.

        Args:
            messages: what `checked` has returned.
            continue_last: the last message is the beginning of that answer, and the text ends where
                the message does.
            asks: the generation prompt, which begins an answer, is written behind the chat, unless
                the last message is continued.
            tools: what `checked_tools` has returned.

        Raises ChatError if the template itself refuses the chat, writes what is not Unicode or
        much more than the chat has, or does not write the last message as it is.
        """
        chat = [_in_transformers_form(message) for message in messages]
        functions = [{"type": "function", "function": dict(tool)} for tool in tools]
        last = messages[-1]["content"]
        if continue_last:
            chat[-1]["content"] = f"{last}{_END_MARK} "
        try:
            pieces = self._template.generate(
                messages=chat,
                tools=functions or None,
                documents=None,
                add_generation_prompt=asks and not continue_last,
                **self.tokens,
            )
            size = sum(map(_size, messages)) + sum(len(json.dumps(tool)) for tool in functions)
            text = _joined(pieces, _MOST_TEXT + _MOST_GROWTH * size)
        except Exception as error:  # a template computes, and may fail like any program
            reason = str(error)[:_MOST_REASON]  # it may quote a message
            raise ChatError(f"the model's chat template refuses this chat: {reason}") from error
        check_text(text, "what the model's chat template writes")
        return _cut_at_mark(text, last) if continue_last else text

    def sample(self) -> str:
        """Write a few small chats, which show what the template puts around messages.

        The text of each message is "a", and tools and calls are there if the template reads them.
        Chats that the template refuses are left out.
        """
        texts = []
        if self.takes_tools:
            with contextlib.suppress(ChatError):
                texts.append(self.render(_SAMPLE_CALL, tools=[_SAMPLE_TOOL]))
        for roles in ("user", "system user", "user assistant user", "system user assistant user"):
            chat: list[Message] = [{"role": role, "content": "a"} for role in roles.split()]
            try:
                texts.append(self.render(chat))
            except ChatError:
                continue
        return "\n".join(texts)

    def respelled(self, spelling: Mapping[str, str]) -> "ChatTemplate":
        """Return the same template with other text for some words, as {word: new spelling}.

        Raises TokenizerError if a word is still written after that, because the template puts it
        together from parts.
        """
        if not spelling:
            return self
        # Longest first: of several words that match, a tokenizer takes the longest too.
        longest_first = sorted(spelling, key=len, reverse=True)
        words = re.compile("|".join(map(re.escape, longest_first)))

        def respell(text: str) -> str:
            return words.sub(lambda match: spelling[match[0]], text)

        tokens = {name: respell(text) for name, text in self.tokens.items()}
        template = ChatTemplate(respell(self.source), tokens)
        if word := words.search(template.sample()):
            raise TokenizerError(
                f"the chat template puts the control token {word[0]} together from parts, so it "
                "cannot be told from the same text in a message: write it out in the template"
            )
        return template


def _in_transformers_form(message: Message) -> dict[str, object]:
    """Return a message as templates have it, arguments of calls as objects where they are some."""
    made: dict[str, object] = {**message}
    if calls := message.get("tool_calls"):
        made["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": _arguments(call["arguments"])},
            }
            for call in calls
        ]
    return made


def _arguments(text: str) -> object:
    value = parsed_json(text or "{}")
    return value if isinstance(value, dict) else text


def _size(message: Message) -> int:
    """Return the characters of a message, and of what a template may write around it."""
    calls = message.get("tool_calls", ())
    return 256 + len(message["content"]) + sum(256 + len(call["arguments"]) for call in calls)


def _joined(pieces: Iterable[str], max_chars: int) -> str:
    """Return the pieces as one text. Raises ChatError if it has more than `max_chars` characters.

    The sandbox bounds what one piece can be: `range` ends at 100,000.
    """
    written: list[str] = []
    size = 0
    for piece in pieces:
        written.append(piece)
        size += len(piece)
        if size > max_chars:
            raise ChatError(f"it writes more than {max_chars:,} characters")
    return "".join(written)


def _cut_at_mark(text: str, last: str) -> str:
    """Return the text up to the last mark.

    Args:
        text: a chat as a template wrote it, with the mark and a space behind the last message.
        last: the last message.

    Raises ChatError if the text before the mark does not end with the message.
    """
    before, mark, after = text.rpartition(_END_MARK)
    if not after.startswith(" "):  # a template that strips messages has taken the space
        before = before.rstrip()
    if not mark or not before.rstrip().endswith(last.strip()):
        raise ChatError(
            "the last message cannot be continued: the model's chat template does not write it as "
            "it is"
        )
    return before


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would change what the model reads.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
