"""The body of OpenAI's text completions as clients send it, and its translation into the proto.

A prompt is continued as it is, without a chat template. Several prompts are answered together: the
choices of the first one come first.
"""

from functools import cached_property
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.fields import NOT_SUPPORTED, Harmless, Text, TokenCount, TokenId, only
from serving.gateway.dialect.forms import FormParameters
from serving.gateway.dialect.names import Path
from serving.gateway.dialect.prompt_scores import Asked
from serving.gateway.dialect.prompt_size import PROMPTS
from serving.gateway.dialect.text.prompts import Repeated
from serving.proto import inference_pb2

# Prompts, each of which is a call of its own to the model service, and choices of all of them.
MAX_PROMPTS = 2048
# Characters of one prompt that the choices of a stream repeat together: they are written at once.
MAX_STREAMED_ECHO = 2**22
_CHARACTERS_PER_ID = 4  # about
# OpenAI's values of fields that the client left out; a model's own temperature comes first.
DEFAULT_MAX_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0

# Ids of one prompt; no model's context is longer.
MAX_PROMPT_IDS = 2**17


def _kind(prompt: object) -> str:
    return "text" if isinstance(prompt, str) else "ids"


_Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_IDS, fail_fast=True)]
Prompt = Annotated[Annotated[Text, Tag("text")] | Annotated[_Ids, Tag("ids")], Discriminator(_kind)]


def _prompts(value: object) -> object:
    """Returns a list of prompts, whichever of OpenAI's four forms the value has."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if len(value) > MAX_PROMPT_IDS:
            raise PydanticCustomError(
                "too_long", "a prompt has at most {most} token ids", {"most": MAX_PROMPT_IDS}
            )
        if value and all(isinstance(item, int) for item in value):
            return [value]
        if all(isinstance(item, (str, list)) for item in value):
            return value
    raise PydanticCustomError(
        "prompt_type", "prompt must be a text, a list of token ids, or a list of either"
    )


def _with_choices(prompts: list[Any], info: ValidationInfo) -> list[Any]:
    choices = len(prompts) * (info.data.get("n") or 1)
    if choices > MAX_PROMPTS:
        raise PydanticCustomError(
            "too_long",
            "the prompts have {choices} choices together; ask for at most {most}",
            {"choices": choices, "most": MAX_PROMPTS},
        )
    return prompts


def _as_many_as_n(best_of: int | None, info: ValidationInfo) -> int | None:
    if best_of is not None and best_of != (info.data.get("n") or 1):
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "best_of is not supported yet beyond n, of which all are returned; leave it out",
        )
    return best_of


def _repeatable(echo: bool | None, info: ValidationInfo) -> bool | None:
    """Refuses an echo whose events would be large: each choice of a stream repeats its prompt."""
    if echo and info.data.get("stream"):
        sizes = (
            len(prompt) if isinstance(prompt, str) else len(prompt) * _CHARACTERS_PER_ID
            for prompt in info.data.get("prompt", ())
        )
        size = max(sizes, default=0) * (info.data.get("n") or 1)
        if size > MAX_STREAMED_ECHO:
            raise PydanticCustomError(
                "too_long",
                "a stream would repeat about {size} characters of a prompt for its choices, more "
                "than {most}; ask for fewer choices, or without stream",
                {"size": size, "most": MAX_STREAMED_ECHO},
            )
    return echo


class CompletionRequest(FormParameters):
    """The body of a text completion request."""

    prompt: Annotated[
        list[Prompt],
        Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        AfterValidator(_with_choices),
        BeforeValidator(_prompts, json_schema_input_type=Prompt | list[Prompt]),
    ]
    """A text to be continued, the ids of its tokens, or a list of either."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """The number of likeliest tokens whose log probabilities are returned beside each token's."""
    echo: Annotated[bool | None, AfterValidator(_repeatable)] = None
    """Whether the answer begins with the prompt; its `logprobs` are then those of both."""
    return_token_ids: bool | None = None
    """vLLM's: whether choices have the ids of their prompt and of their own tokens."""
    prompt_logprobs: Asked = None
    """vLLM's: the number of likeliest tokens whose log probabilities are returned beside those of
    each token of the prompt; not with `stream`."""
    suffix: Annotated[Text | None, only("")] = None
    """The text that follows the answer; not for now."""
    best_of: Annotated[TokenCount | None, AfterValidator(_as_many_as_n)] = None
    """Choices to choose from; not for now, so that only the number of `n` is taken."""
    user: Harmless = None
    """The client's own user; means nothing here."""
    metadata: Harmless = None
    """What the client notes; means nothing here."""
    prompt_cache_key: Harmless = None
    """Prompts that share prefixes: they are found by their content."""

    @classmethod
    def place(cls, steps: Path) -> Path:
        """Returns the path of a value in the body; pydantic names the kinds of prompts too."""
        if steps[:1] == ("prompt",) and steps[2:3] and steps[2] in ("text", "ids"):
            return (*steps[:2], *steps[3:])
        return steps

    def sent_path(self, path: Path) -> Path:
        """Returns the client's path of a parameter, from the path that the service names."""
        return ("prompt",) if path in PROMPTS else super().sent_path(path)

    @property
    def returns_ids(self) -> bool:
        """True where the answer has the ids of its tokens."""
        return bool(self.return_token_ids)

    def protos(self) -> list[inference_pb2.GenerateRequest]:
        """Returns the calls of the model service that answer it, one for each prompt.

        Of several calls each has only its prompt and what its cost follows from.
        """
        if len(self.prompt) == 1:
            return [self._proto(self.prompt[0], self.without_prompt())]
        return [
            self._proto(prompt, inference_pb2.GenerateRequest(n=self.n, max_tokens=self.max_tokens))
            for prompt in self.prompt
        ]

    def complete(self, call: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
        """Returns one of the calls of `protos` with all its fields, as it is sent."""
        if len(self.prompt) == 1:
            return call
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self._shared)
        request.MergeFrom(call)
        return request

    @cached_property
    def _shared(self) -> inference_pb2.GenerateRequest:
        """All that the calls of several prompts have alike."""
        return self.without_prompt()

    def fill_in(
        self,
        calls: list[inference_pb2.GenerateRequest],
        defaults: inference_pb2.SamplingParams,
    ) -> None:
        """Gives calls without a temperature OpenAI's, where the model has none of its own."""
        if self.temperature is None and not defaults.HasField("temperature"):
            for call in calls:
                call.sampling.temperature = DEFAULT_TEMPERATURE

    def _proto(
        self, prompt: str | list[int], request: inference_pb2.GenerateRequest
    ) -> inference_pb2.GenerateRequest:
        """Returns the request with the prompt and what a text completion alone has."""
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        if self.max_tokens is None:
            request.max_tokens = DEFAULT_MAX_TOKENS
        if self.logprobs is not None:
            request.top_logprobs = self.logprobs
        request.return_prompt_pieces = bool(self.echo)
        request.return_prompt_ids = self.returns_ids
        of_prompt = [self.prompt_logprobs, self.logprobs if self.echo else None]
        if asked := [count for count in of_prompt if count is not None]:
            request.prompt_logprobs = max(asked)
        return request

    def repeated(self) -> Repeated:
        """Returns what the answer repeats of its prompts."""
        return Repeated(
            texts=[prompt if isinstance(prompt, str) else None for prompt in self.prompt],
            choices=self.choices,
            is_echoed=bool(self.echo),
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )
