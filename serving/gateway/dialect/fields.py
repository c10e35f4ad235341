"""The fields that every kind of request has, and what they mean in the proto.

The types take what the clients of Azure, OpenAI and Mistral really send: numbers and booleans as
strings, null for anything optional. Every list, map, text and number has a bound, which is checked
before the value is walked; a test fails for a field without one. A feature that a field asks for
and we do not have is refused by name (`only`), never dropped in silence.
"""

import enum
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.errors import (
    ContextTooLong,
    InvalidParameter,
    InvalidRequest,
    ModelNotFound,
    UnsupportedParameter,
)
from serving.gateway.dialect.names import Path, renamed
from serving.proto import inference_pb2

# Characters of a text of a prompt: a body (http/body.py) has no more bytes.
MAX_TEXT = 4 * 2**20
# Characters of a name.
MAX_NAME = 256
# Texts, and ids, that may end an answer; the service allows no more.
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
# Ids that may be all that an answer has; the service allows no more.
MAX_ALLOWED_IDS = 1024
# Parts of the content of one message or item.
MAX_PARTS = 1024
# Tools, and calls of tools: as many as OpenAI's API allows.
MAX_TOOLS = 128
# Token ids with a bias.
MAX_BIASES = 300
# The kind of a problem that is a feature we do not have, rather than a mistake.
NOT_SUPPORTED = UnsupportedParameter.azure_code


class Described(BaseModel):
    """A type whose attributes' docstrings are their descriptions in the OpenAPI document."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


def join_texts(content: object, keys: Mapping[str, str]) -> object:
    """Joins the parts of a content; a text-only model must refuse the other kinds by name.

    Args:
        content: A list of parts; anything else is returned as it is.
        keys: The types of parts that hold text, and the key of it in each.
    """
    if not isinstance(content, list):
        return content
    if len(content) > MAX_PARTS:
        raise PydanticCustomError(
            "too_long", "a content has at most {most} parts", {"most": MAX_PARTS}
        )
    texts = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        key = keys.get(kind) if isinstance(kind, str) else None
        if key is None:
            raise PydanticCustomError(
                NOT_SUPPORTED,
                "this model reads text only, not content of type '{kind}'",
                # A list of a hundred thousand may stand here, which is not written out.
                {"kind": kind[:40] if isinstance(kind, str) else type(kind).__name__},
            )
        if not isinstance(item.get(key), str):
            raise PydanticCustomError(
                "string_type",
                "a part of type '{kind}' needs a string '{key}'",
                {"kind": kind, "key": key},
            )
        texts.append(item[key])
    return "\n".join(texts)


def is_none(value: object) -> bool:
    """Returns whether a value is None, for keys that must then be absent rather than null."""
    return value is None


def only(*harmless: object) -> AfterValidator:
    """Returns a check for a feature we do not have, which passes values that do not ask for it.

    Args:
        harmless: These values, beside None. All others are refused as UnsupportedParameter.
    """

    def check(value: object, info: ValidationInfo) -> object:
        if value is None or value in harmless:
            return value
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "{parameter} is not supported yet with this value; leave it out",
            {"parameter": info.field_name},
        )

    return AfterValidator(check)


def at_most(length: int) -> BeforeValidator:
    """Returns a check that a list or a map has at most `length` members, before any is looked at.

    pydantic has the check for lists itself, but counts the members of a map when it has read them.
    """

    def check(value: object) -> object:
        if isinstance(value, (list, dict)) and len(value) > length:
            raise PydanticCustomError(
                "too_long",
                "there are {given} members; at most {most}",
                {"given": len(value), "most": length},
            )
        return value

    return BeforeValidator(check)


def _stop_texts(value: object) -> object:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or len(value) > MAX_STOPS:
        return value
    # An empty text would end every answer before it began; it is sent to mean none.
    return [text for text in value if text != ""]


Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenCount = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Name = Annotated[str, Field(max_length=MAX_NAME)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
ServiceTier = Literal[
    "auto", "default", "priority", "fast", "scale", "flex", "batch", "standard_only"
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopTexts = Annotated[
    Annotated[list[Annotated[str, Field(max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOPS)],
    BeforeValidator(_stop_texts, json_schema_input_type=str | list[str]),
]
Never = Annotated[Any, only()]
# A field that means nothing here: its value is thrown away unread.
Harmless = Annotated[None, BeforeValidator(lambda value: None, json_schema_input_type=Any)]


class StreamUsage(enum.Enum):
    """The chunks of a stream that have its usage."""

    LAST = "the last chunk of the choices"
    OWN = "a chunk of its own at the end, without choices"
    ALL = "every chunk of the choices, with what is spent so far, and one of its own"
    NONE = "none"


class StreamOptions(Described):
    """OpenAI's options of a stream."""

    include_usage: bool | None = None
    """Moves the usage from the last chunk into one of its own, without choices; where it is not
    true beside other options, or false, the stream has no usage."""
    include_obfuscation: Annotated[bool | None, only(False)] = None
    """Whether events are filled up to hide the lengths of texts; not supported."""
    continuous_usage_stats: bool | None = None
    """vLLM's: whether, with `include_usage`, every chunk has the usage so far."""


def _of_a_stream(options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
    # Without a field it asks for nothing, and some clients send that.
    if options is not None and options.model_fields_set and not info.data.get("stream", True):
        raise PydanticCustomError(
            "stream_options",
            "stream_options is for streams; leave it out, or set stream to true",
        )
    return options


class Body(Described):
    """The body of a request."""

    @classmethod
    def place(cls, steps: Path) -> Path:
        """Returns the path of a value in the body, from the steps that pydantic names."""
        return steps


class Parameters(Body):
    """The fields that a request of any kind may have.

    Attributes:
        prompt_field: The name of the field that has the prompt.
    """

    prompt_field: ClassVar[str] = "prompt"

    model: Name | None = None
    """Who is to answer: the served model, which is meant where it is absent, or an adapter."""
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    """0 takes the likeliest token. Azure's range ends at 1, OpenAI's at 2."""
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    """Keeps the likeliest tokens whose probabilities add up to this."""
    max_tokens: TokenCount | None = None
    """Tokens to generate at most."""
    stop: StopTexts | None = None
    """A text or a list of texts before which the answer ends."""
    seed: Int64 | None = None
    """Makes sampling repeatable."""
    random_seed: Int64 | None = None
    """Mistral's name for `seed`, which wins if both are given."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events."""
    stream_options: Annotated[StreamOptions | None, AfterValidator(_of_a_stream)] = None
    """OpenAI's options of a stream; refused without `stream`."""
    presence_penalty: Penalty | None = None
    """Taken off the logit of a token that the answer holds already."""
    frequency_penalty: Penalty | None = None
    """Taken off the logit of a token for each time that the answer holds it."""

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Choices to generate; 1 where absent. The service may allow fewer."""
    logit_bias: (
        Annotated[
            dict[TokenId, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
            at_most(MAX_BIASES),
        ]
        | None
    ) = None
    """Token id to a number added to its logit."""
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """vLLM's: the number of likeliest tokens to keep; -1 or 0 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """vLLM's: keeps tokens of at least this share of the likeliest token's probability."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """vLLM's: divides the positive logits of tokens in prompt and answer."""
    min_tokens: TokenCount | None = None
    """vLLM's: the number of tokens before which the model does not end its answer."""
    ignore_eos: bool | None = None
    """vLLM's: goes on where the model would end its answer."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    """vLLM's: ids of tokens after which the answer ends."""
    allowed_token_ids: Annotated[
        list[TokenId] | None, Field(min_length=1, max_length=MAX_ALLOWED_IDS)
    ] = None
    """vLLM's: the only ids of tokens that the answer may have."""
    include_stop_str_in_output: bool | None = None
    """vLLM's: whether the text of `stop` that ends the answer is the end of its text."""
    priority: Int64 | None = None
    """vLLM's: above 0 the request is answered when no other waits."""
    service_tier: ServiceTier | None = None
    """OpenAI's: `flex` and `batch` are answered when no other waits; Mistral's `standard_only`."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """vLLM's: computed prefixes are shared with the caller's requests of the same salt only."""

    def ask_deployment(self, name: str | None) -> None:
        """Asks for the model that the path names, whatever the body says.

        Args:
            name: The deployment of Azure OpenAI's path; None where the path has none.

        Raises:
            ModelNotFound: The name is longer than any model's.
        """
        if name is None:
            return
        if len(name) > MAX_NAME:
            raise ModelNotFound(f"The model '{name[:100]}...' does not exist")
        self.model = name

    @property
    def choices(self) -> int:
        """The number of choices that are asked for with each prompt."""
        return self.n or 1

    @property
    def scheduling_priority(self) -> inference_pb2.Priority:
        """The class that `priority` or `service_tier` asks for; batch if either does."""
        if (self.priority or 0) > 0 or self.service_tier in ("flex", "batch"):
            return inference_pb2.PRIORITY_BATCH
        return inference_pb2.PRIORITY_INTERACTIVE

    @property
    def stream_usage(self) -> StreamUsage:
        """The chunks of a stream that have its usage.

        Clients that know `stream_options` get what they ask for by it. All others find the usage in
        the last chunk, where Azure's and Mistral's APIs have it.
        """
        options = self.stream_options
        if options is None:
            return StreamUsage.LAST
        if not options.include_usage:
            return StreamUsage.NONE
        return StreamUsage.ALL if options.continuous_usage_stats else StreamUsage.OWN

    @property
    def returns_ids(self) -> bool:
        """True where the answer has the ids of its tokens."""
        return False

    def as_sent(self, error: InvalidRequest) -> InvalidRequest:
        """Returns a refusal of the service with the names of the fields that the client used."""
        if isinstance(error, ContextTooLong):
            error.parameter = error.parameter or self.prompt_field
        if isinstance(error, InvalidParameter):
            return renamed(error, self.sent_path)
        return error

    def sent_path(self, path: Path) -> Path:
        """Returns the client's path of a parameter, from the path that the service names."""
        return path

    def protos(self) -> list[inference_pb2.GenerateRequest]:
        """Returns the calls of the model service that answer the request, one for each prompt.

        Of several calls each has only its prompt and what its cost follows from, because what they
        share may be long; `complete` adds the rest.
        """
        raise NotImplementedError

    def complete(self, call: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
        """Returns one of the calls of `protos` with all its fields, as it is sent."""
        return call

    def fill_in(
        self,
        calls: list[inference_pb2.GenerateRequest],
        defaults: inference_pb2.SamplingParams,
    ) -> None:
        """Fills in what the vendor's API has for absent fields, but where the model has its own.

        Args:
            calls: The calls of the request.
            defaults: The sampling parameters of the model, which the service fills in itself.
        """

    def without_prompt(self) -> inference_pb2.GenerateRequest:
        """Returns the call without its prompt; fields that the client left out stay absent."""
        return inference_pb2.GenerateRequest(
            sampling=inference_pb2.SamplingParams(
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed if self.seed is not None else self.random_seed,
                top_k=None if self.top_k is None else max(0, self.top_k),
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=self.logit_bias or {},
            ),
            max_tokens=self.max_tokens,
            stop=self.stop or [],
            n=self.n,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids or [],
            allowed_token_ids=self.allowed_token_ids or [],
            include_stop=self.include_stop_str_in_output,
            model=self.model or "",
        )
