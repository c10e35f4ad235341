"""The number of values in a body of JSON, counted before it is parsed.

A parser makes an object of each value, at some hundred nanoseconds, and holds the interpreter's
lock meanwhile: 4 MiB of nested lists take it 0.6 s, in which nobody else is answered. A request has
no use for as many values; a text with as many commas is another matter, so that what stands in
strings is not counted.
"""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor

from serving.errors import InvalidRequest

# Bytes of a body that is parsed without being counted: it cannot hold too much.
SMALL = 2**16
# A chat has at most 2,048 messages with an object each, and some more for the parts of a content.
MAX_CONTAINERS = 2**15
MAX_KEYS = 2**15
# Two prompts of 128k token ids have as many.
MAX_VALUES = 2**18

_COUNTED = (
    ("objects and lists", MAX_CONTAINERS, b"[{"),
    ("keys", MAX_KEYS, b":"),
    ("values", MAX_VALUES, b","),
)
# A string, up to the end of the body if it has no end of its own; or what separates values. It
# never goes back: each character is read once.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|([\[{])|(:)|(,)', re.DOTALL)


class JsonStructure:
    """Counts the values of bodies in a thread of its own, one body at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "json-structure")

    async def check(self, body: bytes) -> None:
        """Raises InvalidRequest if a body has more values than a request can use.

        Args:
            body: JSON; if it is malformed it may pass.
        """
        if len(body) > SMALL:
            # Also where counting takes no time, the bodies of many clients are parsed in turn, and
            # other requests between them.
            await asyncio.get_running_loop().run_in_executor(self._thread, check, body)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def check(body: bytes) -> None:
    """Does the same at once."""
    if all(_rough(body, marks) <= limit for _, limit, marks in _COUNTED):
        return
    room = [0, *(limit for _, limit, _ in _COUNTED)]
    for token in _TOKEN.finditer(body):
        if kind := token.lastindex:
            room[kind] -= 1
            if room[kind] < 0:
                name, limit, _ = _COUNTED[kind - 1]
                raise InvalidRequest(f"the body has more than {limit:,} {name}; send fewer")


def _rough(body: bytes, marks: bytes) -> int:
    """Returns how often one of the characters stands in a body, in strings or not."""
    return sum(body.count(bytes([mark])) for mark in marks)
