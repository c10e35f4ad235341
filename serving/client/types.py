"""What the Python client takes and gives: plain data, and its translation to the wire and back."""

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
    """One turn of a chat."""

    role: str  # "system", "user" or "assistant"
    content: str


Prompt = Sequence[Message] | str | Sequence[int]  # a chat, a text to be continued, or token ids


class Options(TypedDict, total=False):
    """How to answer; serving/proto/inference.proto has meanings and ranges. None: left out."""

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
    timeout: float | None  # seconds for the whole answer


_SAMPLING = frozenset(pb.SamplingParams.DESCRIPTOR.fields_by_name)


@dataclass(frozen=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """The natural logarithm of a token's probability, and of the likeliest in its place."""

    token_id: int
    token: bytes
    logprob: float
    top: tuple["Logprob", ...] = ()


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What was added to one choice of an answer."""

    text: str
    token_ids: tuple[int, ...]
    choice: int
    finish_reason: FinishReason | None  # on the last of each choice
    usage: Usage | None  # on the last of all
    logprobs: tuple[Logprob, ...]  # one for each of token_ids, with top_logprobs


@dataclass(kw_only=True)
class Choice:
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
        """That of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason


@dataclass(frozen=True, kw_only=True)
class Tokens:
    ids: tuple[int, ...]
    pieces: tuple[bytes, ...]  # what each adds to a text; b"" for control tokens


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    name: str
    type: str
    provider: str
    max_context: int  # tokens of prompt and answer together
    vocab_size: int


def check_names(options: Mapping[str, object]) -> None:
    """Raises TypeError for an option that there is not."""
    known = get_type_hints(Options)
    for name in options:
        if name not in known:
            raise TypeError(f"{name!r} is no option of an answer; there are {', '.join(known)}")


def request_of(prompt: Prompt, continue_last: bool, options: Options) -> pb.GenerateRequest:
    """The message for the wire. Raises TypeError or ValueError naming what is wrong."""
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
    """As `request_of`."""
    if _kind(prompt) == "text":
        return pb.TokenizeRequest(text=str(prompt))
    return pb.TokenizeRequest(chat=_chat(prompt, continue_last))


def delta_of(chunk: pb.GenerateChunk) -> Delta:
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
    """Puts an answer together. Raises EngineFailure if its end is missing."""
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
    return Tokens(ids=tuple(tokens.ids), pieces=tuple(tokens.pieces))


def info_of(info: pb.ModelInfo) -> ModelInfo:
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
    if all(isinstance(part, int) for part in prompt) and len(prompt):
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


def _logprob_of(one: pb.TokenLogprob) -> Logprob:
    return Logprob(
        token_id=one.token_id,
        token=one.token,
        logprob=one.logprob,
        top=tuple(map(_logprob_of, one.top)),
    )
