"""Bounds of requests: the largest size of every field of the contract, checked before it is read.

A field without a row here is refused by `Bounds.check`, and a test walks the contract, so that a
field added later needs a row. What a message costs before it is checked is the parsing of its
bytes, which `create_server` bounds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from mixtral_jax.sampling_params import MAX_LOGIT_BIAS
from serving.errors import ContextTooLong, InvalidParameter
from serving.proto import inference_pb2 as pb

# Each choice is a sequence of its own in the engine.
MAX_CHOICES = 16
# Before min_tokens the ids that end a choice are biased too, so their number is limited.
MAX_STOP_IDS = 16
# They become a mask over the vocabulary.
MAX_ALLOWED_IDS = 1024
# Each token's text is searched for each of the stop texts.
MAX_STOPS, MAX_STOP_BYTES = 16, 256
# Each message passes through the chat template; the gateway has the same limit.
MAX_MESSAGES = 2048
MAX_LOGPROBS = 20
MAX_CALLER_BYTES, MAX_SALT_BYTES = 256, 32
# The gateway takes 256 characters.
MAX_MODEL_BYTES = 1024
_MAX_ROLE_BYTES = 32
# A schema is walked, and an expression or a grammar compiled, for each request.
MAX_SCHEMA_BYTES, MAX_GRAMMAR_BYTES = 2**18, 2**16
# Each text of a choice is an alternative of a grammar.
MAX_TEXTS, MAX_TEXT_BYTES = 2**12, 2**12
# The number of functions that OpenAI's API takes.
MAX_TOOLS, MAX_TOOL_NAME_BYTES = 128, 64
# An agent may repeat calls of a model that called many tools at the same time.
MAX_TOOL_CALLS, MAX_TOOL_CALL_NAME_BYTES = 128, 1024
# Some servers keep signatures of thoughts in the ids of calls; the gateway takes 8192 characters.
MAX_TOOL_CALL_ID_BYTES = 2**15


@dataclass(frozen=True)
class Bound:
    """The bound of one field. What does not apply to its type is None."""

    entries: int | None = None
    """Largest number of entries of a list or a map."""
    unit: str = "entries"
    """Plural of what an entry is called."""
    size: int | None = None
    """Most bytes, in UTF-8, of a text or of each text of a list."""
    range: tuple[int, int] | None = None
    """Smallest and largest number, where the number says how much is computed."""
    is_prompt: bool = False
    """Whether what exceeds the bound is a prompt that no context of this server can hold."""


# A switch, or a number whose value costs nothing; SamplingParams checks its range.
_FIXED = Bound()
# A message, whose own fields have rows.
_MESSAGE = Bound()


def table(context: int, prompt_bytes: int) -> Mapping[str, Bound]:
    """Returns the bound of each field of every request, by the field's message and name.

    Args:
        context: Tokens that the server's context holds.
        prompt_bytes: Most bytes of a prompt.
    """
    prompt = Bound(size=prompt_bytes, is_prompt=True)
    schema, grammar = Bound(size=MAX_SCHEMA_BYTES), Bound(size=MAX_GRAMMAR_BYTES)
    call_id = Bound(size=MAX_TOOL_CALL_ID_BYTES)
    return {
        "GenerateRequest.chat": _MESSAGE,
        "GenerateRequest.token_ids": _MESSAGE,
        "GenerateRequest.text": prompt,
        "GenerateRequest.sampling": _MESSAGE,
        "GenerateRequest.max_tokens": _FIXED,  # the context ends an answer as well
        "GenerateRequest.stop": Bound(entries=MAX_STOPS, unit="texts", size=MAX_STOP_BYTES),
        "GenerateRequest.n": Bound(range=(1, MAX_CHOICES)),
        "GenerateRequest.min_tokens": _FIXED,  # at most max_tokens
        "GenerateRequest.ignore_eos": _FIXED,
        "GenerateRequest.stop_token_ids": Bound(entries=MAX_STOP_IDS, unit="ids"),
        "GenerateRequest.top_logprobs": Bound(range=(0, MAX_LOGPROBS)),
        "GenerateRequest.caller": Bound(size=MAX_CALLER_BYTES),
        "GenerateRequest.cache_salt": Bound(size=MAX_SALT_BYTES),
        "GenerateRequest.priority": _FIXED,
        "GenerateRequest.suspect": _FIXED,
        "GenerateRequest.response_format": _MESSAGE,
        "GenerateRequest.model": Bound(size=MAX_MODEL_BYTES),
        "GenerateRequest.prompt_logprobs": Bound(range=(0, MAX_LOGPROBS)),
        "GenerateRequest.allowed_token_ids": Bound(entries=MAX_ALLOWED_IDS, unit="ids"),
        "GenerateRequest.include_stop": _FIXED,
        "GenerateRequest.return_prompt_ids": _FIXED,
        "GenerateRequest.return_prompt_pieces": _FIXED,
        "GenerateRequest.prediction": Bound(size=prompt_bytes),
        "ResponseFormat.json_object": _MESSAGE,
        "ResponseFormat.json_schema": schema,
        "ResponseFormat.regex": grammar,
        "ResponseFormat.choice": _MESSAGE,
        "ResponseFormat.lark": grammar,
        "ResponseFormat.gbnf": grammar,
        "ResponseFormat.strict": _FIXED,
        "Texts.texts": Bound(entries=MAX_TEXTS, unit="texts", size=MAX_TEXT_BYTES),
        "Chat.messages": Bound(entries=MAX_MESSAGES, unit="messages"),
        "Chat.continue_last": _FIXED,
        "Chat.tools": Bound(entries=MAX_TOOLS, unit="tools"),
        "Chat.tool_choice": _MESSAGE,
        "Chat.parallel_tool_calls": _FIXED,
        "Chat.add_generation_prompt": _FIXED,
        "ChatMessage.role": Bound(size=_MAX_ROLE_BYTES),
        "ChatMessage.content": prompt,
        "ChatMessage.tool_calls": Bound(entries=MAX_TOOL_CALLS, unit="calls"),
        "ChatMessage.tool_call_id": call_id,
        "ToolCall.id": call_id,
        # A model may have written any name into the history.
        "ToolCall.name": Bound(size=MAX_TOOL_CALL_NAME_BYTES),
        "ToolCall.arguments": prompt,
        "Tool.name": Bound(size=MAX_TOOL_NAME_BYTES),
        "Tool.description": prompt,
        "Tool.parameters": schema,
        "Tool.strict": _FIXED,
        "ToolChoice.mode": _FIXED,
        "ToolChoice.allowed": Bound(entries=MAX_TOOLS, unit="names", size=MAX_TOOL_NAME_BYTES),
        "TokenIds.ids": Bound(entries=context, unit="tokens", is_prompt=True),
        "SamplingParams.temperature": _FIXED,
        "SamplingParams.top_p": _FIXED,
        "SamplingParams.seed": _FIXED,
        "SamplingParams.top_k": _FIXED,
        "SamplingParams.min_p": _FIXED,
        "SamplingParams.presence_penalty": _FIXED,
        "SamplingParams.frequency_penalty": _FIXED,
        "SamplingParams.repetition_penalty": _FIXED,
        "SamplingParams.logit_bias": Bound(entries=MAX_LOGIT_BIAS),
        "TokenizeRequest.chat": _MESSAGE,
        "TokenizeRequest.text": prompt,
        "TokenizeRequest.add_special_tokens": _FIXED,
        "DetokenizeRequest.ids": Bound(entries=context, unit="ids"),
    }


class Bounds:
    """Holds requests against `table`.

    Args:
        context: Tokens that the server's context holds.
        prompt_bytes: Most bytes of a prompt.
    """

    def __init__(self, context: int, prompt_bytes: int) -> None:
        self._context = context
        self._prompt_bytes = prompt_bytes
        package = pb.DESCRIPTOR.package
        rows = table(context, prompt_bytes)
        self._rows = {f"{package}.{name}": bound for name, bound in rows.items()}

    def check(self, message: Message) -> None:
        """Raises InvalidParameter or ContextTooLong, naming the first field that is too large.

        No field is read further than its bound. Its time is that of copying the message's texts.
        """
        for field, value in message.ListFields():
            bound = self._rows.get(field.full_name)
            assert bound is not None, f"{field.full_name} has no bound"
            if bound.entries is not None and len(value) > bound.entries:
                raise self._too_many(field, bound, len(value))
            if bound.range is not None:
                _check_range(field.name, value, *bound.range)
            for text in _texts(field, value):
                self._check_size(field, bound, text)
            for child in _messages(field, value):
                self.check(child)

    def check_prompt(self, name: str, size: int) -> None:
        """Raises ContextTooLong for a prompt, called `name`, of more bytes than a context holds."""
        if size > self._prompt_bytes:
            raise ContextTooLong.of(
                self._context, f"{name} {size:,} bytes, more than so many tokens can hold"
            )

    def _too_many(self, field: FieldDescriptor, bound: Bound, count: int) -> Exception:
        if bound.is_prompt:
            return ContextTooLong.of(self._context, f"the prompt has {count:,} {bound.unit}")
        return InvalidParameter(
            f"{field.name} has {count:,} {bound.unit}; give at most {bound.entries:,}"
        )

    def _check_size(self, field: FieldDescriptor, bound: Bound, text: str | bytes) -> None:
        assert bound.size is not None, f"{field.full_name} has no bound of its bytes"
        # A text has at least as many bytes as characters, and is not encoded to find that out.
        size = len(text)
        if size <= bound.size and isinstance(text, str):
            size = len(text.encode())
        if size <= bound.size:
            return
        if bound.is_prompt:
            self.check_prompt(f"{field.name} has", size)
        raise InvalidParameter(f"{field.name} has {size:,} bytes; give at most {bound.size:,}")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidParameter(f"{name} is {value}; it must be within {low} and {high}")


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _texts(field: FieldDescriptor, value: Any) -> Iterable[str | bytes]:
    """Returns the texts of a field; none for a field of numbers or messages."""
    if field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        return ()
    return (value,) if isinstance(value, str | bytes) else value


def _messages(field: FieldDescriptor, value: Any) -> Iterable[Message]:
    """Returns the messages of a field; none for a map, whose keys and values are numbers."""
    if field.message_type is None or _is_map(field):
        return ()
    return (value,) if isinstance(value, Message) else value
