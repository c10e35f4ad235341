"""Log-probabilities of a prompt's tokens in vLLM's form, which chats and text completions share.

    "prompt_logprobs": [null, {"12092": {"logprob": -1.5, "rank": 2, "decoded_token": " is"}, ...}]

There is an entry for each token: null for the first one, which follows nothing. Each of the others
has the token and the likeliest ones in its place, by their ids.
"""

import json
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.chunks import finite_logprob
from serving.gateway.dialect.fields import NOT_SUPPORTED, Described
from serving.proto import inference_pb2

MAX_LOGPROBS = 20


class PromptToken(Described):
    """A token of a prompt, or one that was likely in its place."""

    logprob: float
    """The natural logarithm of its probability."""
    rank: int
    """Its place among all tokens, 1 for the likeliest."""
    decoded_token: str
    """Its text; U+FFFD where that is only a piece of a character."""


PromptLogprobs = list[dict[str, PromptToken] | None]


def _number(value: object, info: ValidationInfo) -> object:
    """Returns vLLM's number; Mistral's false asks for nothing."""
    if value is False:
        return None
    if value is True:
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "prompt_logprobs is not supported yet as true; give a number of likeliest tokens",
        )
    if value is not None and info.data.get("stream"):
        raise PydanticCustomError(
            NOT_SUPPORTED, "prompt_logprobs is not supported yet with stream; leave one of them out"
        )
    return value


Asked = Annotated[
    Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None,
    BeforeValidator(_number, json_schema_input_type=int | bool | None),
]


def prompt_entries(chunk: inference_pb2.GenerateChunk, top: int) -> bytes:
    """Returns the entries of a chunk's prompt tokens as JSON, each with a comma before it.

    Args:
        chunk: A chunk that has log-probabilities of its prompt.
        top: The number of likeliest tokens beside each.
    """
    return "".join("," + _entry(score, top) for score in chunk.prompt_logprobs).encode()


def _entry(score: inference_pb2.TokenLogprob, top: int) -> str:
    tokens = {score.token_id: (score, score.rank)}
    for rank, likely in enumerate(score.top[:top], start=1):
        tokens.setdefault(likely.token_id, (likely, rank))
    entry = {
        str(token_id): {
            "logprob": finite_logprob(token),
            "rank": rank,
            "decoded_token": token.token.decode("utf-8", "replace"),
        }
        for token_id, (token, rank) in tokens.items()
    }
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
