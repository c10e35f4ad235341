"""What clients send: the body of a chat request, and its translation into the proto.

    read_chat   bytes       -> ChatRequest, or the error that names what is wrong
    to_proto    ChatRequest -> GenerateRequest

The types take what the clients of Azure, OpenAI and Mistral really send: numbers and booleans as
strings, null for anything optional, text as a string or as parts. What a parameter asks for and we
do not have is refused by name, never dropped in silence.
"""

import enum
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from serving.errors import InvalidParameter, InvalidRequest, Problem, UnsupportedParameter
from serving.proto import inference_pb2

# The kind of a problem that is a feature we do not have, rather than a mistake.
_NOT_HAD = UnsupportedParameter.azure_code


class Extras(enum.Enum):
    """What happens to parameters outside Azure's list, as the header `extra-parameters` says."""

    REFUSE = "error"
    DROP = "drop"
    PASS = "pass-through"
    # No value of the header: clients of /v1 send what their own API has, and unasked.
    LENIENT = "lenient"

    @classmethod
    def from_header(cls, value: str | None) -> "Extras":
        """Raises InvalidRequest for a value that the header does not have."""
        # "allow" and "ignore" stand in older revisions of Microsoft's pages.
        names = {"error": cls.REFUSE, "drop": cls.DROP, "pass-through": cls.PASS}
        names |= {"allow": cls.PASS, "ignore": cls.DROP}
        policy = names.get((value or "error").strip().lower())
        if policy is None:
            raise InvalidRequest(
                f"the header extra-parameters is {value!r}; it must be 'error', 'drop' or "
                "'pass-through'"
            )
        return policy


def only(*harmless: object) -> AfterValidator:
    """Of a feature we do not have: lets pass None and the values that do not ask for it."""

    def check(value: object, info: ValidationInfo) -> object:
        if value is None or value in harmless:
            return value
        raise PydanticCustomError(
            _NOT_HAD,
            "{parameter} is not supported yet with this value; leave it out",
            {"parameter": info.field_name},
        )

    return AfterValidator(check)


def _text_of(content: object) -> object:
    """Joins the parts of a message; a text-only model must refuse the other kinds by name."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                _NOT_HAD,
                "this model reads text only, not content of type '{kind}'",
                {"kind": str(kind)[:40]},
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("string_type", "a part of type 'text' needs a string 'text'")
        texts.append(part["text"])
    return "\n".join(texts)


def _spoken(content: str | None, info: ValidationInfo) -> str | None:
    role = info.data.get("role")
    if content is None and role not in (None, "assistant"):
        raise PydanticCustomError(
            "missing", "a message of the role {role} needs a content", {"role": role}
        )
    return content


def _with_logprobs(count: int | None, info: ValidationInfo) -> int | None:
    if count and not info.data.get("logprobs"):
        raise PydanticCustomError("missing", "top_logprobs needs logprobs to be true")
    return count


def _format_name(value: object) -> object:
    # Early clients nest it once more: {"type": {"type": "text"}}.
    while isinstance(value, dict) and "type" in value:
        value = value["type"]
    return value


def _stop_texts(value: object) -> object:
    if isinstance(value, str):
        value = [value]
    # An empty text would end every answer before it began; it is sent to mean none.
    return [text for text in value if text != ""] if isinstance(value, list) else value


Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenCount = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Message(BaseModel):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is OpenAI's newer name for `system`."""
    content: Annotated[str | None, BeforeValidator(_text_of), AfterValidator(_spoken)] = Field(
        default=None, validate_default=True
    )
    """A string, or a list of parts of type text. Only an assistant may leave it out."""
    tool_calls: Annotated[list[Any] | None, only([])] = None
    """Calls of tools that the assistant asked for; none for now."""


class StreamOptions(BaseModel):
    """OpenAI's wishes for a stream."""

    include_usage: bool | None = None
    """Moves the usage from the last chunk into one of its own, without choices."""


class ChatRequest(BaseModel):
    """The body of a chat completion request."""

    messages: Annotated[list[Message], Field(min_length=1)]
    """The conversation, in the order in which it was said."""
    model: str | None = None
    """Accepted for the sake of clients; the endpoint serves one model."""
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    """0 takes the likeliest token. Azure's range ends at 1, OpenAI's at 2."""
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    """Keeps the likeliest tokens whose probabilities add up to this."""
    max_tokens: TokenCount | None = None
    """Tokens to generate at most; as many as the context holds where absent."""
    max_completion_tokens: TokenCount | None = None
    """OpenAI's newer name for `max_tokens`, which wins if both are given."""
    stop: Annotated[list[str] | None, BeforeValidator(_stop_texts)] = None
    """A text or a list of texts before which the answer ends."""
    seed: Int64 | None = None
    """Makes sampling repeatable."""
    random_seed: Int64 | None = None
    """Mistral's name for `seed`, which wins if both are given."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events."""
    stream_options: StreamOptions | None = None
    """OpenAI's wishes for a stream."""

    presence_penalty: Penalty | None = None
    """Taken off the logit of a token that the answer holds already."""
    frequency_penalty: Penalty | None = None
    """Taken off for each time that the answer holds it."""
    response_format: Annotated[str | None, BeforeValidator(_format_name), only("text")] = None
    """Sent as an object with a `type`; only `text` for now."""
    tools: Annotated[list[Any] | None, only([])] = None
    """Functions that the model may call; none for now."""
    tool_choice: Annotated[Any, only("none", "auto")] = None
    """Means nothing without tools."""
    modalities: Annotated[list[str] | None, only([], ["text"])] = None
    """What the answer is made of."""
    safe_prompt: Annotated[bool | None, only(False)] = None
    """Mistral's safety prompt; not for now."""

    n: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Choices to generate; one where absent. The service says how many are too many."""
    logprobs: bool | None = None
    """Whether to return the log probability of each token."""
    top_logprobs: Annotated[
        Annotated[int, Field(ge=0, le=20)] | None, AfterValidator(_with_logprobs)
    ] = None
    """How many of the likeliest tokens to return beside it."""
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)]
        | None
    ) = None
    """Token id to a number added to its logit."""
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """vLLM's: keeps so many of the likeliest tokens; -1 or 0 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """vLLM's: keeps tokens of at least this part of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """vLLM's: divides the positive logits of tokens in prompt and answer."""
    min_tokens: TokenCount | None = None
    """vLLM's: the model does not end its answer before so many tokens."""
    ignore_eos: bool | None = None
    """vLLM's: goes on where the model would end its answer."""
    stop_token_ids: list[TokenId] | None = None
    """vLLM's: ids of tokens after which the answer ends."""


# Parameters that clients must ask to have passed on, though we know them: they are not in Azure's
# API. All other fields of ChatRequest are, or are other names of what is, and need no header.
_EXTRAS = {
    *("n", "logprobs", "top_logprobs", "logit_bias", "safe_prompt"),
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"),
}


def read_chat(body: bytes, extras: Extras) -> ChatRequest:
    """Reads a request; raises InvalidRequest, InvalidParameter or UnsupportedParameter."""
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest("the body must be a JSON object with the key 'messages'")
    unknown = [name for name in values if name not in ChatRequest.model_fields]
    extra = [name for name in values if name in _EXTRAS or name in unknown]
    if extras is Extras.REFUSE and extra:
        # Microsoft's sentence to the letter: LiteLLM reads the list out of it and tries again.
        raise InvalidRequest(
            f"Extra parameters {extra!r} are not allowed when extra-parameters is not set or set "
            "to be 'error'. Set extra-parameters to 'pass-through' to pass to the model."
        )
    if extras is Extras.PASS and unknown:
        message = "Extra inputs are not permitted"
        raise InvalidParameter(
            message,
            [Problem("extra_forbidden", ("body", key), message, values[key]) for key in unknown],
        )
    if extras is Extras.DROP:
        values = {name: value for name, value in values.items() if name not in extra}
    try:
        return ChatRequest.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> InvalidParameter:
    problems = [_problem(details) for details in error.errors(include_url=False)]
    is_feature = all(problem.kind == _NOT_HAD for problem in problems)
    leaf = UnsupportedParameter if is_feature else InvalidParameter
    return leaf("; ".join(problem.message for problem in problems), problems)


def _problem(details: ErrorDetails) -> Problem:
    # Upstream's own sample code joins the path with dots, so all of it must be text.
    path = ("body", *(str(step) for step in details["loc"]))
    return Problem(details["type"], path, details["msg"], details["input"])


def to_proto(chat: ChatRequest) -> inference_pb2.GenerateRequest:
    """What the model service is asked; what the client left out stays absent."""
    limit = chat.max_tokens if chat.max_tokens is not None else chat.max_completion_tokens
    seed = chat.seed if chat.seed is not None else chat.random_seed
    return inference_pb2.GenerateRequest(
        chat=inference_pb2.Chat(
            messages=[
                inference_pb2.ChatMessage(
                    role="system" if message.role == "developer" else message.role,
                    content=message.content or "",
                )
                for message in chat.messages
            ]
        ),
        sampling=inference_pb2.SamplingParams(
            temperature=chat.temperature,
            top_p=chat.top_p,
            seed=seed,
            top_k=max(0, chat.top_k or 0),
            min_p=chat.min_p,
            presence_penalty=chat.presence_penalty,
            frequency_penalty=chat.frequency_penalty,
            repetition_penalty=chat.repetition_penalty,
            logit_bias=chat.logit_bias or {},
        ),
        max_tokens=limit,
        stop=chat.stop or [],
        n=chat.n,
        min_tokens=chat.min_tokens,
        ignore_eos=chat.ignore_eos,
        stop_token_ids=chat.stop_token_ids or [],
        top_logprobs=chat.top_logprobs or 0 if chat.logprobs else None,
    )
