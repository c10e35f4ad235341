"""Form of answers: a ResponseFormat of the wire becomes what the engine holds an answer to.

Compiling takes milliseconds, and up to seconds for a grammar that is made to be slow, so that it
belongs into a thread.
"""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.schema import check, read
from mixtral_jax.structure.specification import Kind, Specification
from serving.errors import InvalidParameter, Problem
from serving.proto import inference_pb2 as pb

FIELD = "response_format"
CAPABILITIES = tuple(kind.value for kind in Kind)
"""The names by which ModelInfo tells what an answer can be held to."""
MAX_WEAKENED_BYTES = 1024
"""Of a line of metadata, or of a header."""
_PROBLEM = "structure"  # the kind of a Problem
# Bytes: an error travels in metadata, three times, of which a client accepts 8 KB.
_MAX_TEXT, _MAX_POINTER = 600, 200
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerForm:
    """A compiled form, and what is checked when the answer has ended."""

    form: Form
    """For the engine."""
    weakened: tuple[str, ...] = ()
    """The parts that the caller has asked for and that are not enforced, each with its pointer."""
    violation: Callable[[str], str | None] | None = None
    """Returns what is wrong with a whole answer that is not held to all parts; None: nothing."""


class AnswerForms:
    """Compiles the forms of answers of one model. Thread-safe.

    Args:
        compiler: That of the model.
    """

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler

    def form(
        self, response_format: pb.ResponseFormat, *, continues: bool, salt: bytes
    ) -> AnswerForm:
        """Returns the compiled form.

        Args:
            response_format: Of the wire.
            continues: Whether the answer continues the prompt's text.
            salt: Divides what is kept of earlier compilations.

        Raises:
            InvalidParameter: It cannot be enforced; names the keyword and its JSON pointer.
        """
        specification = specification_of(response_format)
        name = f"{FIELD}.{specification.kind.value}"

        def compiled() -> AnswerForm:
            form = self._compiler.compile(specification, continues=continues, salt=salt)
            if specification.kind is not Kind.JSON_SCHEMA or not form.weakened:
                return AnswerForm(form, form.weakened)
            schema = read(specification.text, specification.strict)
            return AnswerForm(form, form.weakened, lambda text: check(text, schema))

        return compiling(name, compiled)


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


def compiling(name: str, work: Callable[[], AnswerForm]) -> AnswerForm:
    """Returns what `work` compiles for the field `name`; whatever it raises ends one request.

    Raises InvalidParameter naming the field and, within it, the JSON pointer.
    """
    try:
        return work()
    except StructureError as error:
        raise invalid(name, error) from None
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:  # a panic of the compiler in Rust is no Exception
        _log.exception("the compiler of grammars failed")
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
    entries = [re.sub(r"[^ -~]", _percent_encoded, entry) for entry in weakened]
    text = "; ".join(entries)
    kept = len(entries)
    while len(text) > MAX_WEAKENED_BYTES:
        kept -= 1
        text = "; ".join([*entries[:kept], f"and {len(entries) - kept} more"])
    return text


def _short(text: str, size: int) -> str:
    """Returns a text of at most `size` bytes; one that was longer ends with an ellipsis."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= size:
        return text
    return encoded[: size - 3].decode("utf-8", "ignore") + "..."


def _percent_encoded(character: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in character.group().encode("utf-8", "replace"))
