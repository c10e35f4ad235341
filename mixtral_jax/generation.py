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

from mixtral_jax.cache import PagedCache, RaggedBatch
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

    Raises ValueError for an empty prompt and for one that leaves no room in the context.
    """
    room = model.config.max_context - len(prompt_ids)
    if not prompt_ids:
        raise ValueError("the prompt is empty; give at least one token")
    if room < 1:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens, the context of this model holds "
            f"{model.config.max_context}; shorten the prompt"
        )
    graph, state = nnx.split(model)
    # A power of two, so that prompts of similar length share one compilation.
    length = len(prompt_ids) + min(max_tokens, room)
    num_pages = 2 ** math.ceil(math.log2(max(length / _PAGE_SIZE, 1)))
    dtype = model.embed.weight.get_value().dtype
    cache = PagedCache.empty(model.config, num_pages, _PAGE_SIZE, dtype)
    seed = secrets.randbits(31) if seed is None else seed & 0x7FFFFFFF
    knobs = (
        jnp.full(1, temperature, jnp.float32),
        jnp.full(1, top_p, jnp.float32),
        jnp.full(1, seed, jnp.int32),
    )
    ids, done = list(prompt_ids), 0
    for _ in range(min(max_tokens, room)):
        while done < len(ids):
            new = ids[done : done + _CHUNK]
            size = 1 if len(new) == 1 else _CHUNK
            flat = jnp.asarray(new + [0] * (size - len(new)), jnp.int32)
            token, cache = _step(
                graph, state, cache, flat, jnp.int32(done), jnp.int32(len(new)), knobs
            )
            done += len(new)
        ids.append(int(token[0]))
        yield ids[-1]
        if ids[-1] in eos_ids:
            return


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(
    graph: nnx.GraphDef[Transformer],
    state: Any,  # nnx.State
    cache: PagedCache,
    tokens: jax.Array,
    done: jax.Array,
    count: jax.Array,
    knobs: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, PagedCache]:
    """Takes in `count` tokens after the `done` that are cached and draws the one that follows."""
    model = nnx.merge(graph, state)
    batch = RaggedBatch(
        tokens=tokens,
        positions=done + jnp.arange(tokens.shape[0], dtype=jnp.int32),
        lengths=(done + count)[None],
        query_starts=jnp.stack([jnp.zeros_like(count), count]),
        page_table=jnp.arange(cache.num_pages, dtype=jnp.int32)[None],
        num_decodes=(count == 1).astype(jnp.int32),
        num_sequences=jnp.int32(1),
    )
    hidden, cache = model.paged(batch, cache)
    logits = model.logits(hidden[count - 1][None])
    temperature, top_p, seed = knobs
    params = SamplingArrays(temperature, top_p, seed, (done + count)[None])
    return sample(logits, params), cache
