"""Translation of the Python client's types to protobuf and back."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_type_hints

from serving.client import formats
from serving.client.types import (
    Delta,
    FinishReason,
    Logprob,
    Message,
    ModelInfo,
    Options,
    Prompt,
    Tokens,
    Tool,
    Usage,
)
from serving.errors import ModelNotFound
from serving.proto import inference_pb2 as pb
from serving.proto.stop_reason import stop_reason

_FINISH: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
# Options that are no fields of the wire, and those that are a chat's.
_OF_THE_CLIENT = ("timeout", "tools", "max_rounds")
_OF_CHATS = ("tool_choice", "parallel_tool_calls")
_FIELDS = get_type_hints(Message).keys()
_MODES = {
    "auto": pb.ToolChoice.MODE_AUTO,
    "none": pb.ToolChoice.MODE_NONE,
    "required": pb.ToolChoice.MODE_REQUIRED,
}
_SAMPLING = frozenset(pb.SamplingParams.DESCRIPTOR.fields_by_name)


def check_names(options: Mapping[str, object]) -> None:
    """Raises TypeError for an option that does not exist."""
    known = get_type_hints(Options)
    for name in options:
        if name not in known:
            raise TypeError(f"{name!r} is no option of an answer; there are {', '.join(known)}")


def request_of(
    prompt: Prompt, continue_last: bool, options: Options, tools: Sequence[Tool] = ()
) -> pb.GenerateRequest:
    """Returns the message for the wire; raises TypeError or ValueError that names the mistake.

    Args:
        prompt: The prompt.
        continue_last: Whether the last message, an assistant's, is the beginning of the answer.
        options: The options; `tools` of them is not looked at.
        tools: The tools that the model may call.
    """
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
        if value is None or name in _OF_THE_CLIENT:
            continue
        if name in _OF_CHATS:
            if not request.HasField("chat"):
                raise TypeError(f"{name} is for chats; give a list of messages")
            _set(request.chat, name, value)
        else:
            _set(request.sampling if name in _SAMPLING else request, name, value)
    if tools:
        if not request.HasField("chat"):
            raise TypeError("tools are for chats; give a list of messages")
        _add_tools(request.chat, tools)
    return request


def tokenize_request_of(
    prompt: Prompt, continue_last: bool, tools: Sequence[Tool] = ()
) -> pb.TokenizeRequest:
    """Returns the message for the wire; raises TypeError that names the mistake."""
    if _kind(prompt) == "text":
        if tools:
            raise TypeError("tools are for chats; give a list of messages")
        return pb.TokenizeRequest(text=str(prompt))
    chat = _chat(prompt, continue_last)
    _add_tools(chat, tools)
    return pb.TokenizeRequest(chat=chat)


def delta_of(chunk: pb.GenerateChunk, weakened: str = "") -> Delta:
    """Returns a chunk of the wire as a Delta; `weakened` comes with the first one's metadata."""
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
        tool_calls=tuple(
            {"id": call.id, "name": call.name, "arguments": call.arguments}
            for call in chunk.tool_calls
        ),
        violation=chunk.violation,
        weakened=weakened,
        stop_reason=stop_reason(chunk),
    )


def check_answers(chunk: pb.GenerateChunk, asked: str) -> None:
    """Raises ModelNotFound if a server's first chunk shows that it has not read a model's name.

    Args:
        chunk: The first chunk of an answer.
        asked: The `model` of its request.
    """
    if asked and not chunk.HasField("adapter"):
        raise ModelNotFound(
            f"the server is older than adapters, and does not know '{asked[:100]}'; leave out model"
        )


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
        capabilities=tuple(info.capabilities),
        adapters=tuple(adapter.name for adapter in info.adapters),
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
        if not (isinstance(message, Mapping) and {"role", "content"} <= message.keys() <= _FIELDS):
            raise TypeError(
                f"messages[{place}] must be a dictionary of 'role' and 'content', and perhaps "
                f"'tool_calls' or 'tool_call_id', not {message!r:.60}"
            )
        try:
            chat.messages.add(**{name: value for name, value in message.items() if value})
        except (TypeError, ValueError) as error:
            raise TypeError(f"messages[{place}] cannot be {message!r:.60}: {error}") from None
    return chat


def _add_tools(chat: pb.Chat, tools: Sequence[Tool]) -> None:
    for tool in tools:
        parameters = "" if tool.parameters is None else formats.text_of(tool.parameters)
        chat.tools.add(
            name=tool.name,
            description=tool.description,
            parameters=parameters,
            strict=tool.strict,
        )


def _tool_choice(choice: Any) -> pb.ToolChoice:
    """Returns a choice for the wire; a list of names requires a call of one of them."""
    if isinstance(choice, str):
        if choice not in _MODES:
            names = ", ".join(map(repr, _MODES))
            raise ValueError(f"it is one of {names}, or a list of names")
        return pb.ToolChoice(mode=_MODES[choice])
    return pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED, allowed=choice)


def _set(message: Any, name: str, value: Any) -> None:
    try:
        if name == "logit_bias":
            message.logit_bias.update(value)
        elif name == "stop":
            message.stop.extend([value] if isinstance(value, str) else value)
        elif name in ("stop_token_ids", "allowed_token_ids"):
            getattr(message, name).extend(value)
        elif name == "response_format":
            message.response_format.CopyFrom(formats.message_of(value))
        elif name == "tool_choice":
            message.tool_choice.CopyFrom(_tool_choice(value))
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
