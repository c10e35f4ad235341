"""Attention over pages that are read from memory: eight decodes, and prompts of one sequence."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cpu_kernels.measurement import Measurement, shortest_seconds
from mixtral_jax.cache import RaggedBatch, page_form
from mixtral_jax.kernels.cpu import attention

CONTEXTS = (128, 512, 2048, 8192)
# Query heads, key/value heads and head size.
MODELS = {"SmolLM2": (9, 3, 64), "Mistral": (32, 8, 128)}
BATCHES = {"8 decodes": (8, 1), "128 queries": (1, 128), "512 queries": (1, 512)}
_PAGE = 16
_COLD_BYTES = 192 << 20  # of the pages of all layers: more than caches hold
_MOST_LAYERS = 30


def measurements(contexts: Sequence[int] = CONTEXTS) -> Iterator[Measurement]:
    """Measures both models with float32 and int8 pages, at each context that holds the queries."""
    for model, (heads, kv_heads, head_size) in MODELS.items():
        for dtype in ("float32", "int8"):
            token = page_form(1, kv_heads, head_size, dtype).nbytes
            for batch, (sequences, queries) in BATCHES.items():
                for context in contexts:
                    if context < queries:
                        continue
                    seconds = _seconds(sequences, queries, context, MODELS[model], dtype)
                    seen = sequences * queries * (context - (queries - 1) / 2)
                    yield Measurement(
                        work=f"attention, {model}, {dtype}, {batch}",
                        size=f"{context:,}",
                        seconds=seconds,
                        bytes_read=sequences * context * token,
                        multiply_adds=2 * seen * heads * head_size,
                        kind="float32",
                    )


def _seconds(
    sequences: int, queries: int, context: int, heads: tuple[int, int, int], dtype: str
) -> float:
    """Seconds of one layer."""
    num_heads, kv_heads, head_size = heads
    width = -(-context // _PAGE)
    form = page_form(_PAGE, kv_heads, head_size, dtype)
    count = sequences * width
    layers = min(_MOST_LAYERS, max(2, _COLD_BYTES // (count * form.nbytes)))
    batch = _batch(sequences, queries, context, width)
    q = jax.random.normal(jax.random.key(0), (sequences * queries, num_heads, head_size))
    k = jax.random.normal(jax.random.key(1), (sequences * queries, kv_heads, head_size))
    pages = [jnp.zeros((count, *form.shape), form.dtype) for _ in range(layers)]

    def run() -> jax.Array:
        nonlocal pages
        mixed, pages = step(q, k, pages)
        return mixed

    step = jax.jit(partial(_attend, batch), donate_argnums=2)
    return shortest_seconds(run) / layers


def _batch(sequences: int, queries: int, context: int, width: int) -> RaggedBatch:
    """Sequences of a context, whose last tokens are new, with pages here and there."""
    positions = np.tile(np.arange(context - queries, context), sequences)
    table = np.random.default_rng(0).permutation(sequences * width).reshape(sequences, width)
    return RaggedBatch(
        tokens=jnp.zeros(sequences * queries, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        lengths=jnp.full(sequences, context, jnp.int32),
        query_starts=jnp.arange(sequences + 1, dtype=jnp.int32) * queries,
        page_table=jnp.asarray(table, jnp.int32),
        num_decodes=jnp.int32(sequences if queries == 1 else 0),
        num_sequences=jnp.int32(sequences),
    )


def _attend(
    batch: RaggedBatch, q: jax.Array, k: jax.Array, pages: list[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    """One layer after the other: the queries of each are what the one before gave."""
    written = []
    for layer in pages:
        q, layer = attention.attend(q, k, k, layer, batch, None)
        written.append(layer)
    return q, written
