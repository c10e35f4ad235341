"""Form of answers: what a request of the wire asks of its answer becomes what the engine reads.

Compiling takes milliseconds, and up to seconds for a grammar that is made to be slow, so that it
belongs into a thread.
"""

import logging
import re
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.specification import Kind, Specification
from mixtral_jax.structure.tool_grammar import Mode, ToolUse
from mixtral_jax.structure.trial.process import NotStarted
from mixtral_jax.tokenization.messages import ToolCall
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.errors import InvalidParameter, Problem, Unavailable
from serving.proto import inference_pb2 as pb
from serving.service.answer.tool_use import (
    FIELD,
    TOOLS,
    call_check,
    field_of_response,
    has_tools,
    is_held,
    text_check,
    use_of,
)
from serving.service.answer.tool_use import field_of as tool_field_of

CAPABILITIES = (*(kind.value for kind in Kind), "tools")
"""The names by which ModelInfo tells what an answer can be held to."""
MAX_WEAKENED_BYTES = 1024
"""Of a line of metadata, or of a header."""
_PROBLEM = "structure"  # the kind of a Problem
# Bytes: an error travels in metadata, three times, of which a client accepts 8 KB.
_MAX_TEXT, _MAX_POINTER = 600, 200
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerForm:
    """A compiled form, how an answer in it is read, and what is checked when it has ended."""

    form: Form
    """For the engine."""
    weakened: tuple[str, ...] = ()
    """The parts that the caller has asked for and that are not enforced, each with its pointer."""
    violation: Callable[[str], str | None] | None = None
    """Returns what is wrong with a text that is not held to all parts; None: nothing."""
    call_violation: Callable[[ToolCall], str | None] | None = None
    """Returns what is wrong with a call that is not held to all parts; None: nothing."""
    holds_text: bool = True
    """Whether text is held to a form; else calls of tools alone are."""
    may_call: bool = False
    """Whether the answer may call tools."""
    must_call: bool = False
    """Whether it does nothing else."""


class AnswerForms:
    """Compiles the forms of answers of one model. Thread-safe.

    Args:
        compiler: That of the model.
        tokenizer: That of the model.
    """

    def __init__(self, compiler: Compiler, tokenizer: Tokenizer) -> None:
        self._compiler = compiler
        self._tokenizer = tokenizer

    def form(self, message: pb.GenerateRequest, *, continues: bool) -> AnswerForm | None:
        """Returns the compiled form of an answer; None where nothing is asked of it.

        Args:
            message: Of the wire.
            continues: Whether the answer continues the prompt's text.

        Raises:
            InvalidParameter: It cannot be enforced; names the keyword and its JSON pointer.
        """
        response = None
        if message.HasField(FIELD):
            response = specification_of(message.response_format)
        if has_tools(message.chat):
            use = use_of(message.chat, self._tokenizer.tool_form, response)
            form = self._tool_form(use, continues, message.cache_salt)
            if form is not None:
                return form
        if response is None:
            return None
        return self._response_form(response, continues, message.cache_salt)

    def _response_form(self, response: Specification, continues: bool, salt: bytes) -> AnswerForm:
        def compiled() -> AnswerForm:
            form = self._compiler.compile(response, continues=continues, salt=salt)
            check = partial(self._compiler.check, salt=salt)
            return AnswerForm(form, form.weakened, text_check(form, check))

        return compiling(field_of_response(response), compiled)

    def _tool_form(self, use: ToolUse, continues: bool, salt: bytes) -> AnswerForm | None:
        """Returns the form of an answer that may call tools; None if it may not."""
        name = TOOLS

        def compiled() -> AnswerForm | None:
            nonlocal name
            try:
                if not is_held(use):
                    return None
                form = self._compiler.compile(use, continues=continues, salt=salt)
            except StructureError as error:
                name = tool_field_of(error, use)
                raise
            may_call = bool(use.callable_tools())
            check = partial(self._compiler.check, salt=salt)
            return AnswerForm(
                form,
                form.weakened,
                text_check(form, check),
                call_check(form, check),
                holds_text=use.response is not None,
                may_call=may_call,
                must_call=use.mode is Mode.REQUIRED,
            )

        return compiling(lambda: name, compiled)


def specification_of(response_format: pb.ResponseFormat) -> Specification:
    """Returns what a caller asks for; raises InvalidParameter if it is no one thing."""
    kind = response_format.WhichOneof("kind")
    if kind is None:
        names = ", ".join(kind.value for kind in Kind)
        raise InvalidParameter(f"{FIELD} is empty; set one of {names}, or leave it out")
    if response_format.strict and kind != Kind.JSON_SCHEMA.value:
        raise InvalidParameter(f"{FIELD}.strict is for json_schema; leave it out with {kind}")
    match kind:
        case "json_object":
            return Specification(Kind.JSON_OBJECT)
        case "choice":
            return Specification(Kind.CHOICE, choices=tuple(response_format.choice.texts))
        case _:
            text = getattr(response_format, kind)
            return Specification(Kind(kind), text, strict=response_format.strict)


def compiling(name: str | Callable[[], str], work: Callable[[], _Result]) -> _Result:
    """Returns what `work` compiles for the field `name`; whatever it raises ends one request.

    Raises InvalidParameter naming the field and, within it, the JSON pointer, and Unavailable where
    the fault is not the request's.
    """
    try:
        return work()
    except StructureError as error:
        raise invalid(name if isinstance(name, str) else name(), error) from None
    except (KeyboardInterrupt, SystemExit, MemoryError, InvalidParameter):
        raise
    except (NotStarted, CancelledError) as error:
        _log.error("nothing can be compiled: %s", error)
        raise Unavailable("grammars cannot be compiled just now; try again shortly") from None
    except BaseException:  # a panic of the compiler in Rust is no Exception
        _log.exception("the compiler of grammars failed")
        name = name if isinstance(name, str) else name()
        raise InvalidParameter(f"{name} cannot be compiled; simplify it") from None


def invalid(name: str, error: StructureError) -> InvalidParameter:
    """Returns the error for a field in which a part is wrong or cannot be enforced."""
    text, pointer = _short(f"{name}: {error}", _MAX_TEXT), _short(error.pointer, _MAX_POINTER)
    if pointer not in text:
        text += f" (at {pointer})"
    return InvalidParameter(text, [Problem(_PROBLEM, tuple(name.split(".")), text, None, pointer)])


def header(weakened: Iterable[str]) -> str:
    """Returns a list for metadata or a header: printable ASCII of at most MAX_WEAKENED_BYTES.

    Other characters are written as in URIs (RFC 3986, section 2.1). Entries that have no room are
    counted at the end.
    """
    entries = tuple(weakened)
    texts: list[str] = []  # the line after each entry, with the number of those that have no room
    line = ""
    for count, entry in enumerate(entries, start=1):
        line += ("; " if line else "") + re.sub(r"[^ -~]", _percent_encoded, entry)
        if len(line) > MAX_WEAKENED_BYTES:
            break
        rest = len(entries) - count
        texts.append(f"{line}; and {rest} more" if rest else line)
    whole = (text for text in reversed(texts) if len(text) <= MAX_WEAKENED_BYTES)
    return next(whole, f"and {len(entries)} more" if entries else "")


def _short(text: str, size: int) -> str:
    """Returns a text of at most `size` bytes; one that was longer ends with an ellipsis."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= size:
        return text
    return encoded[: size - 3].decode("utf-8", "ignore") + "..."


def _percent_encoded(character: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in character.group().encode("utf-8", "replace"))
