"""The plain loop: one sequence, one token after the other. What the engine must equal.

`generate_tokens` works on ids; `generate` puts a tokenizer around it and yields text.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax.axes import Pages
from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.layers import Rotary
from mixtral_jax.model import Transformer
from mixtral_jax.sampling import SamplingArrays, sample
from mixtral_jax.tokenizer import Message, Tokenizer

_PAGE_SIZE = 16
_CHUNK = 128


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Yields the answer as it comes; never half a character.

    `prompt` is text to go on with, or chat messages
    (`[{"role": "user", "content": "Hello"}]`), which the model's own template renders.
    """
    continues = isinstance(prompt, str)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.chat(prompt)
    detokenizer = tokenizer.detokenizer(continues=continues)
    tokens = generate_tokens(
        model,
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eos_ids=tokenizer.eos_ids,
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
    top_p: float = 1.0,
    seed: int | None = None,
    eos_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yields up to `max_tokens` ids after the prompt; stops after one of `eos_ids`.

    Raises ValueError for an empty prompt, for one that leaves no room in the context, and for
    parameters out of range.
    """
    room = model.config.max_context - len(prompt_ids)
    if not prompt_ids:
        raise ValueError("the prompt is empty; give at least one token")
    if room < 1:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens, the context of this model holds "
            f"{model.config.max_context}; shorten the prompt"
        )
    if not 0 <= temperature <= 2 or not 0 <= top_p <= 1:
        raise ValueError(
            f"temperature={temperature:g} must be within 0 and 2, top_p={top_p:g} within 0 and 1"
        )
    blocks, around = model.apart()
    parts = [nnx.split(block) for block in blocks]
    graph, rest = nnx.split(around)
    # A power of two, so that prompts of similar length share one compilation.
    length = len(prompt_ids) + min(max_tokens, room)
    num_pages = 2 ** math.ceil(math.log2(max(length / _PAGE_SIZE, 1)))
    dtype = model.embed.weight.get_value().dtype
    layers = list(PagedCache.empty(model.config, num_pages, _PAGE_SIZE, dtype).layers)
    seed = secrets.randbits(31) if seed is None else seed & 0x7FFFFFFF
    knobs = SamplingArrays(
        temperature=jnp.full(1, temperature, jnp.float32),
        top_p=jnp.full(1, top_p, jnp.float32),
        seed=jnp.full(1, seed, jnp.int32),
        position=jnp.zeros(1, jnp.int32),
    )
    ids, done = list(prompt_ids), 0
    for _ in range(min(max_tokens, room)):
        while done < len(ids):
            batch = _batch(ids[done : done + _CHUNK], done, num_pages)
            x, rotary = _embed(graph, rest, batch)
            for i, (block, state) in enumerate(parts):
                x, layers[i] = _block(block, state, x, rotary, layers[i], batch)
            done = min(done + _CHUNK, len(ids))
        token = _draw(graph, rest, x, batch, knobs._replace(position=batch.lengths))
        ids.append(int(token[0]))
        yield ids[-1]
        if ids[-1] in eos_ids:
            return


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


@partial(jax.jit, static_argnums=0)
def _embed(graph: Any, rest: Any, batch: RaggedBatch) -> tuple[jax.Array, Rotary]:
    return nnx.merge(graph, rest).begin(batch)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _block(
    graph: Any, state: Any, x: jax.Array, rotary: Rotary, pages: Pages, batch: RaggedBatch
) -> tuple[jax.Array, Pages]:
    return nnx.merge(graph, state).paged(x, rotary, pages, batch)


@partial(jax.jit, static_argnums=0)
def _draw(
    graph: Any, rest: Any, x: jax.Array, batch: RaggedBatch, knobs: SamplingArrays
) -> jax.Array:
    model = nnx.merge(graph, rest)
    last = x[batch.query_starts[1] - 1]
    return sample(model.logits(model.norm(last[None])), knobs)
