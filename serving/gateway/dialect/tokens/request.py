"""Bodies of /tokenize and /detokenize in vLLM's and llama.cpp's forms, and their proto.

https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#tokenizer-api
https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from serving.errors import InvalidParameter
from serving.gateway.dialect.chat.messages import Message, check_order, conversation
from serving.gateway.dialect.chat.request import MAX_MESSAGES
from serving.gateway.dialect.chat.tools import Tools, add_tools
from serving.gateway.dialect.chat.turn_end import check_turn_end, set_turn_end
from serving.gateway.dialect.fields import Body, Harmless, Never, Text, TokenId, only
from serving.gateway.dialect.names import renamed
from serving.gateway.dialect.text.request import MAX_PROMPT_IDS
from serving.proto import inference_pb2

_INPUTS = ("messages", "prompt", "content")
_OF_CHATS = ("add_generation_prompt", "continue_final_message", "tools")
_OF_LLAMA = ("add_special", "with_pieces")
# The fields that mean nothing beside an input.
_MEANINGLESS = {
    "messages": _OF_LLAMA,
    "prompt": (*_OF_CHATS, *_OF_LLAMA),
    "content": (*_OF_CHATS, "add_special_tokens", "return_token_strs"),
}


class TokenizeRequest(Body):
    """The body of /tokenize: one of `prompt`, `content` and `messages`."""

    prompt: Text | None = None
    """vLLM's: a text."""
    content: Text | None = None
    """llama.cpp's name for it, with llama.cpp's answer: the tokens alone."""
    messages: Annotated[
        Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None,
        AfterValidator(lambda messages: None if messages is None else check_order(messages)),
    ] = None
    """vLLM's: a chat, which the model's template renders."""
    add_special_tokens: bool | None = None
    """vLLM's: whether the token that begins a text opens it; true where absent. A chat's own tokens
    are its template's."""
    add_special: bool | None = None
    """llama.cpp's name for it; false where absent."""
    parse_special: Annotated[bool | None, only(False)] = None
    """llama.cpp's: whether names of control tokens in the text become them; not supported."""
    return_token_strs: bool | None = None
    """vLLM's: whether the texts of the tokens are returned."""
    with_pieces: bool | None = None
    """llama.cpp's: whether each token is returned with its text."""
    add_generation_prompt: bool | None = None
    """vLLM's, of a chat: whether the template opens an answer; true where absent."""
    continue_final_message: bool | None = None
    """vLLM's, of a chat: whether its last message is left open."""
    tools: Tools = None
    """vLLM's, of a chat: functions that the model may call."""
    model: Harmless = None
    """Means nothing here: the model and its adapters have one tokenizer."""
    chat_template: Never = None
    """vLLM's: another template; not supported."""
    chat_template_kwargs: Annotated[Any, only({})] = None
    """vLLM's: variables of the template; not supported."""
    mm_processor_kwargs: Annotated[Any, only({})] = None
    """vLLM's, of images; not supported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in _INPUTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "input",
                "there are {number} of prompt, content and messages; give exactly one",
                {"number": len(given)},
            )
        for name in _MEANINGLESS[given[0]]:
            if getattr(self, name):
                raise PydanticCustomError(
                    "input",
                    "{name} means nothing beside {given}; leave it out",
                    {"name": name, "given": given[0]},
                )
        check_turn_end(self.messages or [], self.add_generation_prompt, self.continue_final_message)
        return self

    @property
    def is_llama(self) -> bool:
        """True where llama.cpp's form of the answer is asked for."""
        return self.content is not None

    def proto(self) -> inference_pb2.TokenizeRequest:
        """Returns the call of the model service."""
        if self.messages is not None:
            chat = conversation(self.messages, is_safe=False)
            add_tools(chat, self.tools, None, None)
            set_turn_end(chat, self.add_generation_prompt, self.continue_final_message)
            return inference_pb2.TokenizeRequest(chat=chat)
        if self.is_llama:
            with_special = bool(self.add_special)
        else:
            with_special = self.add_special_tokens is not False
        text = self.content if self.prompt is None else self.prompt
        return inference_pb2.TokenizeRequest(text=text, add_special_tokens=with_special)


class DetokenizeRequest(Body):
    """The body of /detokenize, which is the same in both APIs."""

    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_IDS, fail_fast=True)]
    """Token ids."""
    model: Harmless = None
    """Means nothing here: the model and its adapters have one tokenizer."""

    def proto(self) -> inference_pb2.DetokenizeRequest:
        """Returns the call of the model service."""
        return inference_pb2.DetokenizeRequest(ids=self.tokens)

    def as_sent(self, error: InvalidParameter) -> InvalidParameter:
        """Returns a refusal of the service with the name of the field that the client used."""
        return renamed(error, lambda path: ("tokens",) if path == ("ids",) else path)
