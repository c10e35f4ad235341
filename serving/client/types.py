"""Types of the Python client: plain data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from serving.client import formats
from serving.errors import EngineFailure

FinishReason = Literal["stop", "length", "tool_calls"]


class ToolCall(TypedDict):
    """A call of a tool by the model.

    Attributes:
        id: Names the call; its result has the same.
        name: The tool's.
        arguments: An object in JSON.
    """

    id: str
    name: str
    arguments: str


class Message(TypedDict):
    """One turn of a chat.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        content: The text; of a tool, the result of a call.
        tool_calls: Of an assistant: the calls of tools, beside or in place of a text.
        tool_call_id: Of a tool: the id of the call.
    """

    role: str
    content: str
    tool_calls: NotRequired[Sequence[ToolCall]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call, and that the caller runs.

    Attributes:
        name: Letters, digits, `_`, `.` and `-`; at most 64.
        description: For the model.
        parameters: The JSON Schema of the arguments, an object; None for no arguments.
        strict: Refuses parameters of which a part cannot be enforced.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


Prompt = Sequence[Message] | str | Sequence[int]  # a chat, a text to be continued, or token ids


class Options(TypedDict, total=False):
    """Options of an answer, whose meanings and ranges stand in serving/proto/inference.proto.

    An option that is None counts as left out. `model` is the name of the served model or of an
    adapter, and the served model where it is left out. `timeout` is in seconds, for a whole answer
    of the model. Those from `tools` on are for chats:

    * `tools` are Python functions, which the client runs, or `Tool`s, which the caller runs.
    * `tool_choice` is "auto", "none" or "required", or a list of names, of which one is called.
      Where functions are run it is for the first answer; later ones are "auto".
    * `max_rounds` is how often functions are run before the model must answer; 8 by default.
    """

    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    n: int | None
    min_tokens: int | None
    ignore_eos: bool | None
    stop_token_ids: Sequence[int] | None
    allowed_token_ids: Sequence[int] | None
    include_stop: bool | None
    top_logprobs: int | None
    response_format: formats.ResponseFormat | None
    timeout: float | None
    tools: Sequence[Tool | Callable[..., Any]] | None
    tool_choice: Literal["auto", "none", "required"] | Sequence[str] | None
    parallel_tool_calls: bool | None
    max_rounds: int | None


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that an answer has cost: those of its rendered prompt, and those generated."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """The log-probability of a token.

    Attributes:
        token_id: Its id.
        token: Its bytes, which may be only a piece of a character.
        logprob: The natural logarithm of its probability.
        top: The likeliest tokens in its place, likeliest first.
    """

    token_id: int
    token: bytes
    logprob: float
    top: tuple["Logprob", ...] = ()


@dataclass(frozen=True, kw_only=True)
class Delta:
    """An addition to one choice of an answer.

    Attributes:
        text: The new text.
        token_ids: The ids of the new tokens.
        choice: The number of the choice.
        finish_reason: On the last delta of each choice.
        stop_reason: On the last delta of a choice that a text of `stop` or an id of
            `stop_token_ids` ended: that text, or that id.
        usage: On the last delta of all; where functions were run, of each answer.
        logprobs: An entry for each of `token_ids`, where `top_logprobs` was asked for.
        tool_calls: Calls that are complete now.
        violation: On the last delta of a choice: how it misses a part of its schema that is not
            enforced.
        weakened: On the first delta: the parts of the caller's schemas that are not enforced.
        messages: On a delta of its own, when functions were run: what they add to the chat, the
            assistant's message with the calls and a tool's message with each result.
    """

    text: str
    token_ids: tuple[int, ...]
    choice: int
    finish_reason: FinishReason | None
    usage: Usage | None
    logprobs: tuple[Logprob, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    violation: str = ""
    weakened: str = ""
    messages: tuple[Message, ...] = ()
    stop_reason: str | int | None = None


@dataclass(kw_only=True)
class Choice:
    """One choice of a whole answer. `violation` and `stop_reason` are as in Delta."""

    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    violation: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[Logprob] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer.

    Attributes:
        choices: The choices; where functions were run, of the last answer.
        usage: The tokens of it all.
        weakened: The parts of the caller's schemas that are not enforced.
        earlier: The messages that runs of functions added to the chat before the last answer.
    """

    choices: tuple[Choice, ...]
    usage: Usage
    weakened: str = ""
    earlier: tuple[Message, ...] = ()

    @property
    def text(self) -> str:
        """Returns the text of the first choice."""
        return self.choices[0].text

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Returns the calls of the first choice."""
        return self.choices[0].tool_calls

    @property
    def messages(self) -> list[Message]:
        """Returns all that was added to the chat, the first choice's message last."""
        return [*self.earlier, assistant_message(self.text, self.tool_calls)]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Returns the finish reason of the first choice."""
        return self.choices[0].finish_reason


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a prompt.

    Attributes:
        ids: Their ids.
        pieces: The bytes that each of them adds to a text; b"" for control tokens.
    """

    ids: tuple[int, ...]
    pieces: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The served model.

    Attributes:
        name: The served name.
        type: The kind of requests that it answers: "chat-completions".
        provider: The maker of the model.
        max_context: Tokens that prompt and answer may have together.
        vocab_size: The number of token ids.
        capabilities: What answers can be held to, such as "json_schema", and "tools".
        adapters: The names of the adapters that `model` may name.
    """

    name: str
    type: str
    provider: str
    max_context: int
    vocab_size: int
    capabilities: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


def assistant_message(text: str, calls: Sequence[ToolCall]) -> Message:
    """Returns an answer as a message of the chat that goes on."""
    message: Message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = list(calls)
    return message


def completion_of(deltas: Iterable[Delta]) -> Completion:
    """Joins the deltas of an answer; raises EngineFailure if its end is missing."""
    choices: dict[int, Choice] = {}
    usages: list[Usage] = []
    earlier: list[Message] = []
    weakened = ""
    for delta in deltas:
        if delta.messages:
            earlier += delta.messages
            choices.clear()
            continue
        choice = choices.setdefault(delta.choice, Choice())
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        choice.tool_calls += delta.tool_calls
        choice.violation = delta.violation or choice.violation
        choice.finish_reason = delta.finish_reason or choice.finish_reason
        if delta.stop_reason is not None:
            choice.stop_reason = delta.stop_reason
        weakened = weakened or delta.weakened
        usages += [delta.usage] if delta.usage else []
    if not choices or not all(choice.finish_reason for choice in choices.values()):
        raise EngineFailure("the server ended its answer without a reason to finish")
    usage = Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
    )
    ordered = tuple(choices[i] for i in sorted(choices))
    return Completion(choices=ordered, usage=usage, weakened=weakened, earlier=tuple(earlier))
