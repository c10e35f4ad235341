"""Log-probabilities of a text completion's tokens, as OpenAI's lists have them."""

import codecs
from typing import Any

from serving.gateway.dialect.chunks import finite_logprob
from serving.proto import inference_pb2


class TextPosition:
    """The character of an answer at which its next token begins.

    A token may be a piece of a character. All pieces begin where their character does.
    """

    def __init__(self, character: int = 0) -> None:
        self._character = character
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def advance(self, token: bytes) -> int:
        """Returns where a token begins, and goes on to the next one."""
        begin = self._character
        self._character += len(self._decoder.decode(token))
        return begin


def text_logprobs(
    chunk: inference_pb2.GenerateChunk, offset: int = 0, position: TextPosition | None = None
) -> dict[str, list[Any]]:
    """Returns the log-probabilities of a chunk's tokens as the columns of `TextLogprobs`.

    Tokens that are pieces of characters are written as their bytes, so that each of several
    alternatives has a name of its own. Of alternatives with the same text the likeliest stays.

    Args:
        chunk: A chunk of one choice.
        offset: The character of the answer at which its first token begins.
        position: The same, kept from chunk to chunk of a stream; it is moved on.
    """
    position = position or TextPosition(offset)
    columns: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for token in chunk.logprobs:
        columns["tokens"].append(token_name(token))
        columns["token_logprobs"].append(finite_logprob(token))
        likeliest: dict[str, float] = {}
        for top in token.top:
            name, logprob = token_name(top), finite_logprob(top)
            likeliest[name] = max(logprob, likeliest.get(name, logprob))
        # OpenAI's lists always have the drawn token, so that they may have one entry more.
        likeliest.setdefault(columns["tokens"][-1], columns["token_logprobs"][-1])
        columns["top_logprobs"].append(likeliest)
        columns["text_offset"].append(position.advance(token.token))
    return columns


def token_name(token: inference_pb2.TokenLogprob) -> str:
    r"""Returns a token's text, or its bytes as OpenAI's completions write them: bytes:\xe3."""
    try:
        return token.token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token)
