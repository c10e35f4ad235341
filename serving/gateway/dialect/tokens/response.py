"""Answers of /tokenize and /detokenize, as JSON in pieces: a long prompt has many tokens.

https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#tokenizer-api
https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

import json
from collections.abc import Callable, Iterator

from pydantic import Field

from serving.gateway.dialect.fields import Described, is_none
from serving.gateway.dialect.tokens.request import TokenizeRequest
from serving.proto import inference_pb2

# Tokens that are written at a time, so that a thread that writes lets others run.
_AT_A_TIME = 1024


class Token(Described):
    """A token with its text, as llama.cpp's `with_pieces` asks for it."""

    id: int
    """Its id."""
    piece: str | list[int]
    """Its text, or its bytes where they are no whole characters; empty for control tokens."""


class TokenizeAnswer(Described):
    """The answer of /tokenize; to `content` only `tokens`."""

    count: int | None = Field(default=None, exclude_if=is_none)
    """Number of tokens; vLLM's."""
    max_model_len: int | None = Field(default=None, exclude_if=is_none)
    """Tokens that prompt and answer may hold together; vLLM's."""
    tokens: list[int] | list[Token]
    """The ids, or with `with_pieces` ids and texts."""
    token_strs: list[str] | None = Field(default=None, exclude_if=is_none)
    """vLLM's, with `return_token_strs`: their texts; U+FFFD where that is only a piece of a
    character, and empty for control tokens. Else null, and to `content` absent."""


class DetokenizeAnswer(Described):
    """The answer of /detokenize, under the names of both APIs."""

    prompt: str
    """The text; vLLM's name."""
    content: str
    """The text; llama.cpp's name."""


def tokenized(asked: TokenizeRequest, tokens: inference_pb2.Tokens, max_context: int) -> bytes:
    """Returns a `TokenizeAnswer` as JSON; for a thread, because it may take a while."""
    return "".join(_tokenized(asked, tokens, max_context)).encode()


def detokenized(text: inference_pb2.Text) -> bytes:
    """Returns a `DetokenizeAnswer` as JSON; for a thread, because it may take a while."""
    written = json.dumps(text.text, ensure_ascii=False)
    return f'{{"prompt":{written},"content":{written}}}'.encode()


def _tokenized(
    asked: TokenizeRequest, tokens: inference_pb2.Tokens, max_context: int
) -> Iterator[str]:
    ids, pieces = tokens.ids, tokens.pieces
    if asked.is_llama:
        yield '{"tokens":['
        if asked.with_pieces:
            yield from _listed(len(ids), lambda i: f'{{"id":{ids[i]},"piece":{_piece(pieces[i])}}}')
        else:
            yield from _listed(len(ids), lambda i: str(ids[i]))
        yield "]}"
        return
    yield f'{{"count":{len(ids)},"max_model_len":{max_context},"tokens":['
    yield from _listed(len(ids), lambda i: str(ids[i]))
    if not asked.return_token_strs:
        yield '],"token_strs":null}'
        return
    yield '],"token_strs":['
    yield from _listed(
        len(ids), lambda i: json.dumps(pieces[i].decode("utf-8", "replace"), ensure_ascii=False)
    )
    yield "]}"


def _listed(number: int, write: Callable[[int], str]) -> Iterator[str]:
    """Yields the inside of a list of so many entries."""
    for begin in range(0, number, _AT_A_TIME):
        entries = map(write, range(begin, min(number, begin + _AT_A_TIME)))
        yield ("," if begin else "") + ",".join(entries)


def _piece(piece: bytes) -> str:
    try:
        return json.dumps(piece.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return json.dumps(list(piece))
