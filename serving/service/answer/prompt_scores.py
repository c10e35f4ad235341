"""The prompt as an answer tells of it: the pieces of its text, and the logprobs of its tokens."""

from collections.abc import Iterator, Sequence

from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.proto import inference_pb2 as pb
from serving.scheduling.request import TokenScore

# Logprobs of one chunk, those of the likeliest tokens among them: a millisecond's work and 30 KB.
# A reader that is slow holds up the chunks behind it.
MAX_CHUNK_LOGPROBS = 1024


def score_chunks(
    scores: Sequence[TokenScore], tokenizer: Tokenizer
) -> Iterator[list[pb.TokenLogprob]]:
    """Yields what is known of a prompt's tokens, in lists of at most MAX_CHUNK_LOGPROBS."""
    if not scores:
        return
    size = max(1, MAX_CHUNK_LOGPROBS // (1 + len(scores[0].top_logprobs)))
    for start in range(0, len(scores), size):
        yield [_message(score, tokenizer) for score in scores[start : start + size]]


def prompt_pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[bytes]:
    """Returns what each token of a prompt adds to its text; joined they are the text.

    A space that the tokenizer puts before every text is none of it.
    """
    pieces = [tokenizer.token_bytes(token) for token in ids]
    first = next((place for place, piece in enumerate(pieces) if piece), None)
    if first is not None and tokenizer.dummy_space:
        pieces[first] = pieces[first].removeprefix(b" ")
    return pieces


def _message(score: TokenScore, tokenizer: Tokenizer) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=score.token_id,
        token=tokenizer.token_bytes(score.token_id),
        logprob=score.logprob,
        rank=score.rank,
        top=[
            pb.TokenLogprob(token_id=token, token=tokenizer.token_bytes(token), logprob=logprob)
            for token, logprob in score.top_logprobs
        ],
    )
