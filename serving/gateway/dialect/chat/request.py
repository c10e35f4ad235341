"""The body of a chat request as clients send it, and its translation into the proto.

Fields of every kind of request stand in fields.py, the messages in messages.py; this file has those
that only a chat has.
"""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.chat.messages import (
    Message,
    Prediction,
    check_order,
    conversation,
)
from serving.gateway.dialect.chat.tools import Choice, Tools, add_tools
from serving.gateway.dialect.chat.turn_end import check_turn_end, set_turn_end
from serving.gateway.dialect.fields import MAX_TOOLS, Harmless, Name, Never, TokenCount, only
from serving.gateway.dialect.forms import FormParameters
from serving.gateway.dialect.names import Path
from serving.gateway.dialect.prompt_scores import Asked
from serving.proto import inference_pb2

MAX_MESSAGES = 2048
_MAX_MODALITIES = 4


def _with_logprobs(count: int | None, info: ValidationInfo) -> int | None:
    if count and not info.data.get("logprobs"):
        raise PydanticCustomError("missing", "top_logprobs needs logprobs to be true")
    return count


class ChatRequest(FormParameters):
    """The body of a chat completion request."""

    prompt_field = "messages"

    messages: Annotated[
        list[Message],
        Field(min_length=1, max_length=MAX_MESSAGES),
        AfterValidator(check_order),
    ]
    """The conversation, in the order in which it was said."""
    max_completion_tokens: TokenCount | None = None
    """OpenAI's newer name for `max_tokens`, which wins if both are given."""
    tools: Tools = None
    """Functions that the model may call."""
    tool_choice: Choice | None = None
    """`auto`, `none`, `required` (Mistral's `any`), or a function; OpenAI's `allowed_tools`."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may call several; true where absent, unless one function is named."""
    functions: Annotated[Annotated[list[Any], Field(max_length=MAX_TOOLS)] | None, only([])] = None
    """OpenAI's older name for `tools`; not supported."""
    function_call: Annotated[Any, only("none", "auto")] = None
    """OpenAI's older name for `tool_choice`; not supported."""
    modalities: Annotated[
        Annotated[list[Name], Field(max_length=_MAX_MODALITIES)] | None, only([], ["text"])
    ] = None
    """The forms that the answer may have; only `text` for now."""
    audio: Never = None
    """OpenAI's options of a spoken answer; not for now."""
    prompt_mode: Never = None
    """Mistral's system prompt of models that reason; not supported."""
    guardrails: Annotated[Any, only([])] = None
    """Mistral's checks of prompt and answer; not supported."""
    moderation: Never = None
    """OpenAI's checks of prompt and answer; not supported."""
    web_search_options: Never = None
    """OpenAI's search of the web; not supported."""
    store: Annotated[bool | None, only(False)] = None
    """Whether OpenAI keeps the answer; not supported."""
    prompt_logprobs: Asked = None
    """vLLM's: the number of likeliest tokens whose log probabilities are returned beside those of
    each token of the prompt; not with `stream`. Mistral's true is not supported."""
    top_prompt_logprobs: Annotated[TokenCount | None, only(0)] = None
    """Mistral's likeliest tokens beside them; not supported."""
    user: Harmless = None
    """The client's own user; means nothing here, like the fields that follow."""
    safety_identifier: Harmless = None
    """OpenAI's newer name for `user`."""
    metadata: Harmless = None
    """What the client notes."""
    prompt_cache_key: Harmless = None
    """Prompts that share prefixes: they are found by their content."""
    prompt_cache_retention: Harmless = None
    """The time for which prefixes are kept."""
    prompt_cache_options: Harmless = None
    """Options of prefixes."""
    prediction: Prediction | None = None
    """OpenAI's guess of the answer, such as a text of which it changes a little: it can only make
    the answer faster, with `serve --speculate lookup`."""
    reasoning_effort: Harmless = None
    """Of models that reason."""
    verbosity: Harmless = None
    """Of models that were trained for it."""
    safe_prompt: bool | None = None
    """Mistral's: puts its safety prompt before the conversation."""
    add_generation_prompt: bool | None = None
    """vLLM's: whether the template opens an answer behind the last message; true where absent."""
    continue_final_message: bool | None = None
    """vLLM's: whether the answer goes on from the last message, an assistant's."""
    return_token_ids: bool | None = None
    """vLLM's: whether the answer has the ids of the prompt and of its own tokens."""
    logprobs: bool | None = None
    """Whether to return the log probability of each token."""
    top_logprobs: Annotated[
        Annotated[int, Field(ge=0, le=20)] | None, AfterValidator(_with_logprobs)
    ] = None
    """The number of likeliest tokens to return beside it."""

    @model_validator(mode="after")
    def _check_turn_end(self) -> Self:
        check_turn_end(self.messages, self.add_generation_prompt, self.continue_final_message)
        return self

    def sent_path(self, path: Path) -> Path:
        """Returns the client's path of a parameter, from the path that the service names."""
        if path[:1] == ("tools",) and len(path) == 3:
            return (*path[:2], "function", path[2])
        return super().sent_path(path)

    @property
    def returns_ids(self) -> bool:
        """True where the answer has the ids of its tokens."""
        return bool(self.return_token_ids)

    def protos(self) -> list[inference_pb2.GenerateRequest]:
        """Returns the one call of the model service that answers the chat."""
        request = self.without_prompt()
        request.chat.CopyFrom(conversation(self.messages, is_safe=bool(self.safe_prompt)))
        set_turn_end(request.chat, self.add_generation_prompt, self.continue_final_message)
        add_tools(request.chat, self.tools, self.tool_choice, self.parallel_tool_calls)
        if self.max_tokens is None and self.max_completion_tokens is not None:
            request.max_tokens = self.max_completion_tokens
        request.return_prompt_ids = self.returns_ids
        if self.prediction is not None:
            request.prediction = self.prediction.content
        if self.logprobs:
            request.top_logprobs = self.top_logprobs or 0
        if self.prompt_logprobs is not None:
            request.prompt_logprobs = self.prompt_logprobs
        return [request]
