"""Scores of given texts: how likely a model holds each of their tokens, by the full form.

Texts of similar length are computed together, padded to a power of two, so that a few compiled
programs serve all. Logits exist for LOGIT_ROWS positions at once only. The engine computes the same
in the prefill of a request that asks for `prompt_logprobs` (mixtral_jax/step/scores.py).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.axes import RowHidden, Tokens
from mixtral_jax.errors import SamplingError, UserError
from mixtral_jax.model.adapter import Adapter
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import whole_number
from mixtral_jax.tokenization.tokenizer import Tokenizer

LOGIT_ROWS = 256  # positions whose logits exist at once
_LEAST_LENGTH = 16  # to which short texts are padded
_BATCH_TOKENS = 4096  # of texts that are computed together, padding included

_Run = Callable[[Any, Tokens, Adapter | None], jax.Array]  # the first is the model's nnx.State


class Score(NamedTuple):
    """The tokens of a text and their log-probabilities."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural ones, of the second token and those behind it

    @property
    def total(self) -> float:
        """The logarithm of the text's probability, given its first token."""
        return math.fsum(self.logprobs)


def score(
    model: Transformer,
    tokenizer: Tokenizer | None,
    texts: Sequence[str | Sequence[int]],
    *,
    adapter: Adapter | None = None,
) -> list[Score]:
    """Returns the log-probability of each token of each text, given those before it.

    The first token follows nothing and has none; where the model has a beginning-of-sequence token,
    that is the one.

    Args:
        model: computes the logits.
        tokenizer: the model's own; may be None where all texts are given as token ids.
        texts: at least one token each, at most as many as the model's context holds.
        adapter: as `load_adapter` gives it; it runs beside the model.

    Raises:
        SamplingError: a text is empty or too long, or has an id that does not exist.
        ChatError: a text is not Unicode.
        UserError: `texts` is one text rather than a list, one of them is neither a text nor ids, or
            there is no tokenizer.
    """
    rows = [_ids(model, tokenizer, text) for text in _listed(texts)]
    scores: dict[int, Score] = {}
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for places, length in _batches(order, [len(row) for row in rows], model.config.max_context):
        count = _batch_rows(len(order), length)
        tokens = np.zeros((count, length), np.int32)
        for row, place in enumerate(places):
            tokens[row, : len(rows[place])] = rows[place]
        logprobs = np.asarray(_run(model)(nnx.state(model), jnp.asarray(tokens), adapter))
        for row, place in enumerate(places):
            ids = rows[place]
            scores[place] = Score(tuple(ids), tuple(logprobs[row, : len(ids) - 1].tolist()))
    return [scores[place] for place in range(len(rows))]


def token_logprobs(model: Transformer, hidden: RowHidden, tokens: Tokens) -> jax.Array:
    """Returns log p of the token that follows each position: hidden [B T D] -> [B T] f32.

    The last position of a row, which nothing follows, has a value without a meaning.
    """
    targets = jnp.roll(tokens, -1, axis=1).reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    padding = -len(rows) % LOGIT_ROWS
    rows = jnp.pad(rows, ((0, padding), (0, 0))).reshape(-1, LOGIT_ROWS, rows.shape[-1])
    blocks = jnp.pad(targets, (0, padding)).reshape(-1, LOGIT_ROWS)

    def block(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = model.logits(given[0])
        own = jnp.take_along_axis(logits, given[1][:, None], axis=-1)[:, 0]
        return own - jax.nn.logsumexp(logits, axis=-1)

    return jax.lax.map(block, (rows, blocks)).reshape(-1)[: tokens.size].reshape(tokens.shape)


def _run(model: Transformer) -> _Run:
    """Returns the function that scores rows, which the model keeps: jax compiles it by shape."""
    kept = model.programs.get("score")
    if kept is None:
        graph = nnx.graphdef(model)

        def run(state: Any, tokens: Tokens, adapter: Adapter | None) -> jax.Array:
            whole = nnx.merge(graph, state)
            return token_logprobs(whole, whole.hidden(tokens, adapter=adapter), tokens)

        kept = jax.jit(run)
        model.programs.keep("score", kept)
    program: _Run = kept  # type: ignore[assignment]
    return program


def _batches(
    order: Sequence[int], lengths: Sequence[int], context: int
) -> list[tuple[list[int], int]]:
    """Returns the places of texts that are computed together, and the length of their rows.

    `order` has the places of all texts from the shortest to the longest.
    """
    batches: list[tuple[list[int], int]] = []
    for place in order:
        length = min(context, max(_LEAST_LENGTH, 1 << (lengths[place] - 1).bit_length()))
        rows = _batch_rows(len(order), length)
        if not batches or batches[-1][1] != length or len(batches[-1][0]) == rows:
            batches.append(([], length))
        batches[-1][0].append(place)
    return batches


def _batch_rows(count: int, length: int) -> int:
    """Returns the rows of a batch of such a length: a power of two, of so many texts in all."""
    limit = max(1, _BATCH_TOKENS // length)
    return min(1 << (limit.bit_length() - 1), 1 << (count - 1).bit_length())


def _listed(texts: Sequence[str | Sequence[int]]) -> Sequence[str | Sequence[int]]:
    if isinstance(texts, str | bytes):
        raise UserError("texts is one text; give a list of texts")
    return texts


def _ids(
    model: Transformer, tokenizer: Tokenizer | None, text: str | Sequence[int]
) -> Sequence[int]:
    """Returns the token ids of a text; raises what `score` does for a wrong one."""
    if isinstance(text, str):
        if tokenizer is None:
            raise UserError(
                "there is no tokenizer to make tokens of a text; load a checkpoint that has one, "
                "or give token ids"
            )
        ids: Sequence[int] = tokenizer.encode(text)
    elif isinstance(text, bytes | Mapping) or not isinstance(text, Iterable):
        raise UserError(
            f"a text is of the type {type(text).__name__}; give texts, or lists of token ids"
        )
    else:
        ids = [whole_number("an id of a text", token) for token in text]
    vocabulary, context = model.config.vocab_size, model.config.max_context
    if not ids:
        raise SamplingError("a text is empty; give at least one token")
    if len(ids) > context:
        raise SamplingError(
            f"a text has {len(ids)} tokens, the context of this model holds {context}; cut it"
        )
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise SamplingError(
            f"a text holds the id {wrong}; ids are 0 or more and below {vocabulary}"
        )
    return ids
