"""Answers of each route as bytes, recorded in tests/golden/wire and told in docs/wire.md.

`python -m tests.support.wire` writes them anew.
"""

import contextlib
import http.client
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.fakes import PATIENCE, Stack, running_stack
from tests.support.gateway import BEARER, address

RECORDS = Path(__file__).parents[1] / "golden" / "wire"
CALL = '!call:f:{"a":1} !call:f:{}'
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
_BROKEN_OFF = "(broken off)\n"
# What differs each time -> what stands for it.
_VARYING = [
    (r"[0-9a-f]{32}", "ID"),
    (r'"(created|created_at|completed_at)":\d+', r'"\1":0'),
]


@dataclass(frozen=True)
class Route:
    """A column of the table: how each of its requests is written."""

    path: str
    others: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Further paths that answer with the same bytes, and fields of their clients' requests."""
    prompt: str = "messages"
    """The field that has the prompt."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of every request, as the vendor's clients send them."""
    max_tokens: str = "max_tokens"
    has_tools: bool = True
    dialect: str = "openai"
    """The vendor whose tools and options of a stream it has."""

    def body(self, text: str, **parameters: Any) -> dict[str, Any]:
        """Returns the body of a request whose last message or prompt is `text`."""
        messages: Any = [{"role": "user", "content": text}]
        return {self.prompt: messages if self.prompt == "messages" else text} | (
            self.extra | parameters
        )

    def tools(self) -> dict[str, Any]:
        """Returns the parameters that offer a tool and ask for its call."""
        if self.dialect == "anthropic":
            tool = {"name": "f", "input_schema": {"type": "object"}}
            return {"tools": [tool], "tool_choice": {"type": "any"}}
        nested = {"type": "function", "function": FUNCTION}
        flat = {"type": "function", **FUNCTION}
        choice = "any" if "random_seed" in self.extra else "required"
        return {"tools": [flat if self.prompt == "input" else nested], "tool_choice": choice}


_ANY = {"model": "azureai"}
_CLAUDE = {"model": "azureai", "max_tokens": 64}
# The name of a column, and of the file of its records -> its requests.
ROUTES = {
    "azure": Route("/chat/completions", (("/models/chat/completions", {}),)),
    "chat": Route(
        "/v1/chat/completions",
        (
            ("/v1/chat/completions", {"random_seed": 1}),  # Mistral's clients
            ("/openai/v1/chat/completions", _ANY),
            ("/openai/deployments/azureai/chat/completions?api-version=2024-06-01", {}),
        ),
        extra=_ANY,
    ),
    "azure-texts": Route("/completions", prompt="prompt", has_tools=False),
    "texts": Route(
        "/v1/completions",
        (
            ("/openai/v1/completions", _ANY),
            ("/openai/deployments/azureai/completions?api-version=2024-06-01", {}),
        ),
        prompt="prompt",
        has_tools=False,
    ),
    "responses": Route(
        "/v1/responses",
        (
            ("/responses", _ANY),
            ("/openai/v1/responses", _ANY),
            ("/openai/responses?api-version=2025-04-01-preview", _ANY),
        ),
        prompt="input",
        extra=_ANY,
        max_tokens="max_output_tokens",
    ),
    "messages": Route(
        "/v1/messages",
        (("/anthropic/v1/messages", _CLAUDE),),
        extra=_CLAUDE,
        dialect="anthropic",
    ),
}


def requests(route: Route) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the requests of a column, with the names of their records."""
    stream = {"stream": True}
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    yield "error", route.body("one", temperature=7)
    yield "too long", route.body("!fail:ContextTooLong")
    yield "whole", route.body("one two")
    yield "stream", route.body("one two", **stream)
    if route.prompt != "input" and route.dialect == "openai":
        yield "usage", route.body("one", **with_usage)
    yield "cut", route.body("one two", **{route.max_tokens: 1})
    yield "cut stream", route.body("one two", **{route.max_tokens: 1}, **stream)
    yield "broken", route.body("one !fail:EngineFailure", **stream)
    if route.has_tools:
        yield "calls", route.body(CALL, **route.tools())
        yield "calls stream", route.body(CALL, **route.tools(), **stream)


def records(stack: Stack, route: Route) -> dict[str, str]:
    """Returns the answers of a column by their names: status, type and body."""
    return {name: record(stack, route.path, body) for name, body in requests(route)}


def beating_record(stack: Stack, route: Route) -> dict[str, str]:
    """Returns the record of a stream with a heartbeat, from a gateway that sends them at once."""
    waiting = route.body("one !wait two", stream=True)
    return {"heartbeat": _one_beat(record(stack, route.path, waiting, releases=True))}


def record(stack: Stack, path: str, body: dict[str, Any], *, releases: bool = False) -> str:
    """Returns the answer to a request, without what differs each time.

    Args:
        stack: The gateway.
        path: The path of the request.
        body: Its body.
        releases: Whether the scripted service goes on after the first bytes of the answer that
            have come while it waited.
    """
    connection = http.client.HTTPConnection(*address(stack), timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), BEARER)
        with connection.getresponse() as response:
            kind = response.headers["content-type"]
            text = f"{response.status} {kind}\n"
            try:
                if releases:
                    read = b""
                    while len(re.findall(rb'"choices":\[\]|: heartbeat|event: ping', read)) < 3:
                        read += response.read1()
                    stack.service.release()
                    text += read.decode()
                text += response.read().decode()
            except http.client.IncompleteRead as broken:
                text += broken.partial.decode() + _BROKEN_OFF
    stack.service.reset()
    for varying, stands in _VARYING:
        text = re.sub(varying, stands, text)
    return text.rstrip("\n") + "\n"


def _one_beat(answer: str) -> str:
    """Returns a stream whose heartbeats stand once, however many there were.

    A slow machine lets some come behind the wait too, and these are left out.
    """
    events: list[str] = []
    has_waited = False
    for event in answer.split("\n\n"):
        has_waited = has_waited or '" two"' in event
        if not (is_beat(event) and (has_waited or any(map(is_beat, events[-1:])))):
            events.append(event)
    return "\n\n".join(events)


def is_beat(event: str) -> bool:
    """Returns whether an event of a stream is a heartbeat."""
    return event.startswith((":", "event: ping")) or (
        '"choices":[]' in event and "usage" not in event
    )


def written(answers: dict[str, str]) -> str:
    """Returns the records of a column as their file has them."""
    return "".join(f"=== {name}\n{answer}" for name, answer in answers.items())


def kept(name: str) -> dict[str, str]:
    """Returns the records of a column from its file."""
    text = (RECORDS / f"{name}.txt").read_text(encoding="utf-8")
    parts = re.split(r"^=== (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


if __name__ == "__main__":
    with running_stack() as plain:
        answered = {row: records(plain, asked) for row, asked in ROUTES.items()}
    with running_stack(heartbeat_seconds=0.01) as often:
        for row, asked in ROUTES.items():
            answered[row] |= beating_record(often, asked)
            (RECORDS / f"{row}.txt").write_text(written(answered[row]), encoding="utf-8")
