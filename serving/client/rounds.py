"""Rounds: a chat in which Python functions are run between the answers of the model.

Plain Python without a connection: `Client` and `AsyncClient` send each request, show the answer's
deltas to the rounds, and run the functions that it calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serving.client.functions import Arguments, Function
from serving.client.translation import check_names, request_of
from serving.client.types import (
    Delta,
    Message,
    Options,
    Prompt,
    Tool,
    ToolCall,
    assistant_message,
)
from serving.proto import inference_pb2 as pb

MAX_ROUNDS = 8
"""Rounds of functions, where the caller says nothing."""


@dataclass(frozen=True)
class Run:
    """A call of a function that is to be run.

    Attributes:
        call: The call.
        function: The function.
        arguments: Its arguments; None where they do not fit.
        mistake: Why they do not fit, for the model.
    """

    call: ToolCall
    function: Function
    arguments: Arguments | None
    mistake: str = ""


class Rounds:
    """The requests of an answer, of which each continues the chat by what functions returned.

    Args:
        prompt: The prompt.
        continue_last: Whether the last message, an assistant's, is the beginning of the answer.
        options: The options.

    Raises:
        TypeError: An option does not exist or has the wrong type.
        ValueError: The value of an option is wrong.

    Attributes:
        request: The next request.
    """

    def __init__(self, prompt: Prompt, continue_last: bool, options: Options) -> None:
        check_names(options)
        self._functions: dict[str, Function] = {}
        tools = [self._tool(tool) for tool in options.get("tools") or ()]
        self._rounds = options.get("max_rounds") or MAX_ROUNDS
        if self._rounds < 1:
            raise ValueError(f"max_rounds is {self._rounds}; give at least 1")
        if self._functions and (options.get("n") or 1) > 1:
            raise ValueError("n is more than 1; functions are run for one choice alone")
        if self._functions and continue_last:
            raise ValueError("continue_last cannot go with functions; give tools as Tool")
        self.request = request_of(prompt, continue_last, options, tools)
        self._text = ""
        self._calls: list[ToolCall] = []
        self._is_cut = False

    @property
    def has_coroutines(self) -> bool:
        """True if a function is to be awaited."""
        return any(function.is_async for function in self._functions.values())

    def note(self, delta: Delta) -> None:
        """Takes in a part of the answer to the request."""
        if self._functions:
            self._text += delta.text
            self._calls += delta.tool_calls
            self._is_cut = delta.finish_reason == "length"

    def runs(self) -> list[Run]:
        """Returns the functions that the whole answer calls.

        Empty where it calls none, or also a tool that the caller runs. Those of an answer that was
        cut are not run: the model had more to say.
        """
        if self._is_cut or not all(call["name"] in self._functions for call in self._calls):
            return []
        return [self._run(call) for call in self._calls]

    def add(self, results: Sequence[str]) -> Delta:
        """Goes on to the next request, with a result for each of `runs`.

        Returns what that adds to the chat.
        """
        messages = [assistant_message(self._text, self._calls)]
        for call, result in zip(self._calls, results, strict=True):
            messages.append({"role": "tool", "content": result, "tool_call_id": call["id"]})
        chat = self.request.chat
        chat.MergeFrom(request_of(messages, False, {}).chat)
        self._rounds -= 1
        mode = pb.ToolChoice.MODE_AUTO if self._rounds else pb.ToolChoice.MODE_NONE
        chat.tool_choice.CopyFrom(pb.ToolChoice(mode=mode))
        self._text, self._calls = "", []
        return _of_messages(messages)

    def _tool(self, tool: Tool | Callable[..., Any]) -> Tool:
        if isinstance(tool, Tool):
            return tool
        function = Function(tool)
        self._functions[function.tool.name] = function
        return function.tool

    def _run(self, call: ToolCall) -> Run:
        function = self._functions[call["name"]]
        try:
            return Run(call, function, function.read(call["arguments"]))
        except ValueError as error:
            return Run(call, function, None, f"Error: the arguments do not fit: {error}")


def explain(error: BaseException, run: Run) -> None:
    """Says in a note of an error of a function which call has raised it."""
    arguments = run.call["arguments"]
    error.add_note(f"in the tool {run.call['name']}, which the model called with {arguments:.200}")


def _of_messages(messages: Sequence[Message]) -> Delta:
    return Delta(
        text="",
        token_ids=(),
        choice=0,
        finish_reason=None,
        usage=None,
        logprobs=(),
        messages=tuple(messages),
    )
