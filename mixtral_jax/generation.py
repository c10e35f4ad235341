"""The plain loop: one sequence, one token after the other. What the engine must equal.

`generate_draws` works on ids and gives logprobs; `generate_tokens` gives the ids alone; `generate`
puts a tokenizer around them and yields text. All take the keywords of `Sampling`.
"""

import functools
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from mixtral_jax.axes import PackedDraws, Pages
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.model.layers import Rotary
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sharding import Layout
from mixtral_jax.step.programs import Arrays, Parts, Piece, jit, own
from mixtral_jax.step.sampling import (
    MAX_TOP_LOGPROBS,
    NO_ID,
    Biases,
    History,
    SamplingArrays,
    sample,
    unpack,
)
from mixtral_jax.tokenization.messages import Message
from mixtral_jax.tokenization.tokenizer import Tokenizer

_PAGE_SIZE = 16
_CHUNK = 128


class Sampling(TypedDict, total=False):
    """How tokens are drawn; what is left out changes nothing. `sampling.py` has the order."""

    top_p: float  # within 0 and 1: the likeliest tokens that together have this probability
    top_k: int  # the likeliest so many; 0 means all
    min_p: float  # within 0 and 1, of the likeliest token's probability
    presence_penalty: float  # within -2 and 2: taken off once for a token that was generated
    frequency_penalty: float  # within -2 and 2: taken off for each time it was generated
    repetition_penalty: float  # within 0.01 and 100: of prompt and answer; 1 is none
    logit_bias: Mapping[int, float]  # token id -> within -100 and 100, added to its logit
    min_tokens: int  # before so many tokens none of those that end the answer is drawn
    seed: int | None  # the same seed, the same answer; without one, another each time


class Draw(NamedTuple):
    """A token, and logprobs of the model's own distribution, before all of `Sampling`."""

    token_id: int
    logprob: float | None  # None if not asked for
    top_logprobs: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    max_tokens: int = 256,
    ignore_eos: bool = False,
    temperature: float = 0.7,
    **sampling: Unpack[Sampling],
) -> Iterator[str]:
    """Yields the answer as it comes; never half a character.

    `prompt` is text to go on with, or chat messages
    (`[{"role": "user", "content": "Hello"}]`), which the model's own template renders.
    With `ignore_eos` the answer goes on to `max_tokens`.
    """
    continues = isinstance(prompt, str)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.chat(prompt)
    detokenizer = tokenizer.detokenizer(continues=continues)
    tokens = generate_tokens(
        model,
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        eos_ids=frozenset() if ignore_eos else tokenizer.eos_ids,
        **sampling,
    )
    for token in tokens:
        if text := detokenizer.push(token):
            yield text
    if text := detokenizer.finish():
        yield text


def generate_tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    eos_ids: frozenset[int] = frozenset(),
    **sampling: Unpack[Sampling],
) -> Iterator[int]:
    """Yields the ids of `generate_draws`, without the cost of logprobs."""
    draws = generate_draws(
        model,
        prompt_ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_logprobs=None,
        eos_ids=eos_ids,
        **sampling,
    )
    return (draw.token_id for draw in draws)


def generate_draws(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_logprobs: int | None = 0,
    eos_ids: frozenset[int] = frozenset(),
    cache_dtype: DTypeLike | None = None,
    **sampling: Unpack[Sampling],
) -> Iterator[Draw]:
    """Yields up to `max_tokens` draws after the prompt; stops after one of `eos_ids`.

    `temperature` is within 0 and 2; 0 takes the likeliest token. `top_logprobs` is the number of
    likeliest tokens, up to 20, whose logprobs come with each draw; None for no logprobs at all.
    `cache_dtype` is that of keys and values, such as int8; None for the model's own.
    Raises ValueError for an empty prompt, for one that leaves no room in the context, and for
    parameters out of range; TypeError for parameters that do not exist.
    """
    room = model.config.max_context - len(prompt_ids)
    if not prompt_ids:
        raise ValueError("the prompt is empty; give at least one token")
    if room < 1:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens, the context of this model holds "
            f"{model.config.max_context}; shorten the prompt"
        )
    asked = {**sampling, "temperature": temperature, "top_logprobs": top_logprobs}
    _check(asked, model.config.vocab_size)
    parts = Parts.of(model)
    embed, block, draw = _programs(parts.block_piece, parts.rest_piece, parts.layout)
    # A power of two, so that prompts of similar length share one compilation.
    longest = len(prompt_ids) + min(max_tokens, room)
    num_pages = _power_of_two(-(-longest // _PAGE_SIZE))
    layers = parts.empty(parts.pages(num_pages, _PAGE_SIZE, cache_dtype))
    knobs = _Knobs(asked, eos_ids, len(prompt_ids), num_pages * _PAGE_SIZE)
    ids, done = list(prompt_ids), 0
    for _ in range(min(max_tokens, room)):
        while done < len(ids):
            batch = _batch(ids[done : done + _CHUNK], done, num_pages)
            if parts.layout is not None:
                batch = _everywhere(batch, parts.num_parts)
            x, rotary = embed(parts.rest, batch)
            for i, arrays in enumerate(parts.blocks):
                x, layers[i] = block(arrays, x, rotary, layers[i], batch)
            done = min(done + _CHUNK, len(ids))
        drawn = unpack(np.asarray(draw(parts.rest, x, batch, knobs.arrays(ids))))
        ids.append(int(drawn.tokens[0]))
        top = zip(drawn.top_ids[0].tolist(), drawn.top_logprobs[0].tolist(), strict=True)
        yield Draw(
            token_id=ids[-1],
            logprob=None if top_logprobs is None else float(drawn.logprobs[0]),
            top_logprobs=tuple(top)[: top_logprobs or 0],
        )
        if ids[-1] in eos_ids:
            return


# Name -> smallest and largest value.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
    "min_tokens": (0, math.inf),
    "top_logprobs": (0, MAX_TOP_LOGPROBS),
}


def _check(asked: Mapping[str, Any], vocab_size: int) -> None:
    for name, value in asked.items():
        if name not in {*_RANGES, "logit_bias", "seed"}:
            raise TypeError(f"there is no parameter {name!r}; see mixtral_jax.generation.Sampling")
        if name in _RANGES and value is not None:
            low, high = _RANGES[name]
            if not low <= value <= high:
                raise ValueError(f"{name}={value:g} must be within {low:g} and {high:g}")
    for token, bias in asked.get("logit_bias", {}).items():
        if not 0 <= token < vocab_size:
            raise ValueError(f"logit_bias: there is no token {token} among {vocab_size}")
        if not -100 <= bias <= 100:
            raise ValueError(f"logit_bias: {bias:g} of token {token} must be within -100 and 100")


class _Knobs:
    """The parameters of one sequence; `room` is the longest it can become."""

    def __init__(
        self, asked: Mapping[str, Any], eos_ids: frozenset[int], prompt_length: int, room: int
    ) -> None:
        values = dict(asked)
        free: dict[int, float] = dict(values.pop("logit_bias", {}))
        min_tokens: int = values.pop("min_tokens", 0)
        forbidden = dict.fromkeys(eos_ids if min_tokens else (), -math.inf)
        seed = values.pop("seed", None)
        values["seed"] = secrets.randbits(31) if seed is None else seed & 0x7FFFFFFF
        if values["top_logprobs"] is None:
            del values["top_logprobs"]
        base = SamplingArrays.greedy(1)
        arrays: dict[str, Any] = {
            name: jnp.full_like(getattr(base, name), value) for name, value in values.items()
        }
        self._arrays = base._replace(**arrays)
        self._prompt_length, self._free_at = prompt_length, prompt_length + min_tokens
        width = _power_of_two(max(len(free | forbidden), 16))
        self._free, self._forbidding = _biases(free, width), _biases(free | forbidden, width)
        self._width = room if any(name.endswith("_penalty") for name in values) else 0

    def arrays(self, ids: Sequence[int]) -> SamplingArrays:
        """To draw what follows `ids`."""
        tokens = np.full((1, self._width), NO_ID, np.int32)
        if self._width:
            tokens[0, : len(ids) - 1] = ids[:-1]
        history = History(
            tokens=jnp.asarray(tokens),
            last=jnp.asarray(ids[-1:], jnp.int32),
            prompt_length=jnp.asarray([self._prompt_length], jnp.int32),
        )
        return self._arrays._replace(
            position=jnp.asarray([len(ids)], jnp.int32),
            history=history,
            biases=self._free if len(ids) >= self._free_at else self._forbidding,
        )


def _biases(values: Mapping[int, float], width: int) -> Biases:
    missing = width - len(values)
    return Biases(
        ids=jnp.asarray([[*values, *[NO_ID] * missing]], jnp.int32),
        values=jnp.asarray([[*values.values(), *[0.0] * missing]], jnp.float32),
    )


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _batch(new: Sequence[int], done: int, num_pages: int) -> RaggedBatch:
    """One sequence whose pages lie in order: `new` tokens after the `done` that are cached."""
    size = 1 if len(new) == 1 else _CHUNK
    return RaggedBatch(
        tokens=jnp.asarray([*new, *[0] * (size - len(new))], jnp.int32),
        positions=done + jnp.arange(size, dtype=jnp.int32),
        lengths=jnp.asarray([done + len(new)], jnp.int32),
        query_starts=jnp.asarray([0, len(new)], jnp.int32),
        page_table=jnp.arange(num_pages, dtype=jnp.int32)[None],
        num_decodes=jnp.int32(len(new) == 1),
        num_sequences=jnp.int32(1),
    )


def _everywhere(batch: RaggedBatch, parts: int) -> RaggedBatch:
    """Where a mesh splits sequences, each part computes the same one."""
    arrays = [jnp.concatenate([jnp.atleast_1d(array)] * parts) for array in batch]
    return RaggedBatch(*arrays)


@functools.lru_cache(maxsize=8)
def _programs(block: Piece, rest: Piece, layout: Layout | None) -> tuple[Any, Any, Any]:
    """The jitted functions of a step; kept, so that the next answer finds them compiled."""
    whole = PartitionSpec()
    rows, places = (whole, whole) if layout is None else map(layout.rules.spec, ("B", "PYKH"))

    def embed(arrays: Arrays, batch: RaggedBatch) -> tuple[jax.Array, Rotary]:
        return rest.module(arrays).begin(batch)

    def walk(
        arrays: Arrays, x: jax.Array, rotary: Rotary, pages: Pages, batch: RaggedBatch
    ) -> tuple[jax.Array, Pages]:
        return block.module(arrays).paged(x, rotary, pages, own(batch, layout))

    def draw(
        arrays: Arrays, x: jax.Array, batch: RaggedBatch, knobs: SamplingArrays
    ) -> PackedDraws:
        model = rest.module(arrays)
        last = x[batch.query_starts[1] - 1]
        return sample(model.paged_logits(model.norm.paged(last[None])), knobs).packed

    return (
        jit(embed, layout, (rest.specs, rows), (rows, rows)),
        jit(walk, layout, (block.specs, rows, rows, places, rows), (rows, places), (3,)),
        jit(draw, layout, (rest.specs, rows, rows, whole), whole),
    )
