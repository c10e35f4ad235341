"""Types of the Python client: plain data, and its translation to protobuf and back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_type_hints

from serving.errors import EngineFailure
from serving.proto import inference_pb2 as pb

FinishReason = Literal["stop", "length"]
_FINISH: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


class Message(TypedDict):
    """One turn of a chat.

    Attributes:
        role: "system", "user" or "assistant".
        content: The text.
    """

    role: str
    content: str


Prompt = Sequence[Message] | str | Sequence[int]  # a chat, a text to be continued, or token ids


class Options(TypedDict, total=False):
    """Options of an answer, whose meanings and ranges stand in serving/proto/inference.proto.

    An option that is None counts as left out. `timeout` is in seconds, for the whole answer.
    """

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
    top_logprobs: int | None
    timeout: float | None


_SAMPLING = frozenset(pb.SamplingParams.DESCRIPTOR.fields_by_name)


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
        usage: On the last delta of all.
        logprobs: An entry for each of `token_ids`, where `top_logprobs` was asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    choice: int
    finish_reason: FinishReason | None
    usage: Usage | None
    logprobs: tuple[Logprob, ...]


@dataclass(kw_only=True)
class Choice:
    """One choice of a whole answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[Logprob] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer."""

    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Returns the text of the first choice."""
        return self.choices[0].text

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
    """

    name: str
    type: str
    provider: str
    max_context: int
    vocab_size: int


def check_names(options: Mapping[str, object]) -> None:
    """Raises TypeError for an option that does not exist."""
    known = get_type_hints(Options)
    for name in options:
        if name not in known:
            raise TypeError(f"{name!r} is no option of an answer; there are {', '.join(known)}")


def request_of(prompt: Prompt, continue_last: bool, options: Options) -> pb.GenerateRequest:
    """Returns the message for the wire; raises TypeError or ValueError that names the mistake."""
    check_names(options)
    content: Any = prompt
    match _kind(prompt):
        case "chat":
            request = pb.GenerateRequest(chat=_chat(content, continue_last))
        case "text":
            request = pb.GenerateRequest(text=content)
        case "token_ids":
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=content))
    if continue_last and not request.HasField("chat"):
        raise TypeError("continue_last is for chats; a text or token ids are continued anyway")
    for name, value in options.items():
        if value is not None and name != "timeout":
            _set(request.sampling if name in _SAMPLING else request, name, value)
    return request


def tokenize_request_of(prompt: Prompt, continue_last: bool) -> pb.TokenizeRequest:
    """Returns the message for the wire; raises TypeError that names the mistake."""
    if _kind(prompt) == "text":
        return pb.TokenizeRequest(text=str(prompt))
    return pb.TokenizeRequest(chat=_chat(prompt, continue_last))


def delta_of(chunk: pb.GenerateChunk) -> Delta:
    """Returns a chunk of the wire as a Delta."""
    usage = None
    if chunk.HasField("usage"):
        usage = Usage(
            prompt_tokens=chunk.usage.prompt_tokens,
            completion_tokens=chunk.usage.completion_tokens,
        )
    return Delta(
        text=chunk.text,
        token_ids=tuple(chunk.token_ids),
        choice=chunk.choice,
        finish_reason=_FINISH.get(chunk.finish_reason),
        usage=usage,
        logprobs=tuple(map(_logprob_of, chunk.logprobs)),
    )


def completion_of(deltas: Iterable[Delta]) -> Completion:
    """Joins the deltas of an answer; raises EngineFailure if its end is missing."""
    choices: dict[int, Choice] = {}
    usage = None
    for delta in deltas:
        choice = choices.setdefault(delta.choice, Choice())
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        choice.finish_reason = delta.finish_reason or choice.finish_reason
        usage = delta.usage or usage
    if usage is None:
        raise EngineFailure("the server ended its answer without a reason to finish")
    return Completion(choices=tuple(choices[i] for i in sorted(choices)), usage=usage)


def tokens_of(tokens: pb.Tokens) -> Tokens:
    """Returns a message of the wire as Tokens."""
    return Tokens(ids=tuple(tokens.ids), pieces=tuple(tokens.pieces))


def info_of(info: pb.ModelInfo) -> ModelInfo:
    """Returns a message of the wire as a ModelInfo."""
    return ModelInfo(
        name=info.name,
        type=info.type,
        provider=info.provider,
        max_context=info.max_context,
        vocab_size=info.vocab_size,
    )


def _kind(prompt: Any) -> Literal["chat", "text", "token_ids"]:
    if isinstance(prompt, str):
        return "text"
    if all(isinstance(token, int) for token in prompt) and len(prompt):
        return "token_ids"
    return "chat"


def _chat(messages: Any, continue_last: bool) -> pb.Chat:
    chat = pb.Chat(continue_last=continue_last)
    for place, message in enumerate(messages):
        if not (isinstance(message, Mapping) and message.keys() == {"role", "content"}):
            raise TypeError(
                f"messages[{place}] must be a dictionary of 'role' and 'content', "
                f"not {message!r:.60}"
            )
        chat.messages.add(role=message["role"], content=message["content"])
    return chat


def _set(message: Any, name: str, value: Any) -> None:
    try:
        if name == "logit_bias":
            message.logit_bias.update(value)
        elif name == "stop":
            message.stop.extend([value] if isinstance(value, str) else value)
        elif name == "stop_token_ids":
            message.stop_token_ids.extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} cannot be {value!r}: {error}") from None


def _logprob_of(token: pb.TokenLogprob) -> Logprob:
    return Logprob(
        token_id=token.token_id,
        token=token.token,
        logprob=token.logprob,
        top=tuple(map(_logprob_of, token.top)),
    )
