"""Messages to the process that has the accounts: a line of JSON for each.

    ["begin", id, name, limits]                         a request begins, of a caller without limits
    ["open", id, name, limits]      -> [] or [error]    of one with limits
    ["enter", id, count, running]   -> [] or [error]
    ["take", id, tokens]            -> [] or [error]
    ["correct", id, tokens]
    ["note", id, used]                                  what it has used so far
    ["settle", id, used or null]                        it ends
    ["allowances", name, limits]    -> [allowances]
    ["figures", pid, text]                              those of the process, for Prometheus
    ["sums", pid, text]             -> [text]           the same, and of all processes; and
    ["report", name or null]        -> [rows] or [error]: each is the last of its connection

An id is a number that the process has used for no other request. An error is {"error": NAME,
"text": ..., "seconds": after which to try again}.
"""

import json
from dataclasses import astuple
from typing import Any

from serving.access.caller import Caller, CallerLimits
from serving.errors import InvalidRequest, Overloaded, ServingError, Unavailable

_ERRORS = {kind.__name__: kind for kind in (InvalidRequest, Overloaded, Unavailable)}


def line_of(*message: object) -> bytes:
    """Returns a message as it is sent."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def values_of_caller(caller: Caller) -> tuple[str, tuple[int | None, ...]]:
    """Returns what the accounts know of a caller."""
    return caller.name, astuple(caller.limits)


def caller_of(name: str, limits: list[int | None]) -> Caller:
    """Returns the caller that `values_of_caller` has written."""
    return Caller(name, limits=CallerLimits(*limits))


def error_of(error: ServingError) -> dict[str, object]:
    """Returns an error as an answer has it."""
    kind = type(error).__name__
    return {
        "error": kind if kind in _ERRORS else Unavailable.__name__,
        "text": str(error),
        "seconds": (error.retry_after_ms or 0) / 1000,
    }


def read_answer(line: bytes) -> list[Any]:
    """Returns the values of an answer; raises the error that it is."""
    values: list[Any] = json.loads(line)
    match values:
        case [{"error": kind, "text": text, "seconds": seconds}]:
            raise Overloaded(text, seconds) if kind == Overloaded.__name__ else _ERRORS[kind](text)
    return values
