"""Parameters, cache, and one compiled step per token bucket. Token ids only.

XLA compiles for fixed shapes, so a step is padded to the smallest bucket that holds it. All buckets
are compiled before the first request; after that the compiled programs are called directly, and a
shape that was not foreseen raises instead of compiling.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.model import Transformer
from mixtral_jax.sampling import SamplingArrays, sample
from serving.request import Event, Request
from serving.scheduler import Limits, Plan, Scheduler

Progress = Callable[[str], None]


def default_buckets(limits: Limits) -> tuple[int, ...]:
    """One token, one for every row, and from there in steps of four up to the budget."""
    sizes = {1, limits.max_sequences, limits.max_step_tokens}
    size = limits.max_sequences * 8
    while size < limits.max_step_tokens:
        sizes.add(size)
        size *= 4
    return tuple(sorted(sizes))


class Engine:
    """Continues requests, a step at a time. Used by one thread.

    Args:
        model: the parameters; must not be changed afterwards.
        limits: sizes of the cache and of a step.
        progress: called with a line of text before each compilation.
    """

    def __init__(self, model: Transformer, limits: Limits, progress: Progress) -> None:
        self.scheduler = Scheduler(limits)
        self._limits = limits
        self._table_width = -(-limits.max_context // limits.page_size)
        graph, self._state = nnx.split(model)
        dtype = model.embed.weight.get_value().dtype
        self._cache = PagedCache.empty(model.config, limits.num_pages, limits.page_size, dtype)
        step = jax.jit(partial(_step, graph), donate_argnums=1)
        self._programs: dict[int, Any] = {}
        buckets = default_buckets(limits)
        for number, size in enumerate(buckets, start=1):
            progress(f"compiling step {number} of {len(buckets)}: {size} tokens")
            lowered = step.lower(self._state, self._cache, *self._arrays(Plan(chunks=()), size))
            self._programs[size] = lowered.compile()

    def add(self, request: Request) -> None:
        """Queues a request; errors as `Scheduler.add`."""
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        self.scheduler.cancel(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[Event]:
        """Plans, computes and records one step; what happened, in the order of the plan."""
        plan = self.scheduler.plan()
        if not plan.chunks:
            return []
        return self.scheduler.commit(plan, self._compute(plan))

    def _compute(self, plan: Plan) -> Sequence[int]:
        size = min(bucket for bucket in self._programs if bucket >= plan.num_tokens)
        arrays = self._arrays(plan, size)
        tokens, self._cache = self._programs[size](self._state, self._cache, *arrays)
        drawn: list[int] = np.asarray(tokens)[: len(plan.chunks)].tolist()
        return drawn

    def _arrays(self, plan: Plan, size: int) -> tuple[RaggedBatch, Any, SamplingArrays]:
        """The plan as padded arrays: the batch, the place of each row's last token, the knobs."""
        rows = min(size, self._limits.max_sequences)
        tokens, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        starts, lengths = np.zeros(rows + 1, np.int32), np.zeros(rows, np.int32)
        table = np.zeros((rows, self._table_width), np.int32)
        last, seed = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        temperature, top_p = np.zeros(rows, np.float32), np.ones(rows, np.float32)
        place = 0
        for row, chunk in enumerate(plan.chunks):
            end = place + len(chunk.token_ids)
            tokens[place:end] = chunk.token_ids
            positions[place:end] = range(chunk.start, chunk.end)
            starts[row + 1], lengths[row], last[row] = end, chunk.end, end - 1
            table[row, : len(chunk.pages)] = chunk.pages
            if chunk.samples:
                temperature[row] = chunk.sampling.temperature
                top_p[row], seed[row] = chunk.sampling.top_p, chunk.sampling.seed
            place = end
        decodes = sum(len(chunk.token_ids) == 1 for chunk in plan.chunks)
        batch = RaggedBatch(
            tokens=jnp.asarray(tokens),
            positions=jnp.asarray(positions),
            lengths=jnp.asarray(lengths),
            query_starts=jnp.asarray(starts),
            page_table=jnp.asarray(table),
            num_decodes=jnp.asarray(np.int32(decodes)),
            num_sequences=jnp.asarray(np.int32(len(plan.chunks))),
        )
        knobs = SamplingArrays(
            jnp.asarray(temperature), jnp.asarray(top_p), jnp.asarray(seed), jnp.asarray(lengths)
        )
        return batch, jnp.asarray(last), knobs


def _step(
    graph: nnx.GraphDef[Transformer],
    state: nnx.State,
    cache: PagedCache,
    batch: RaggedBatch,
    last: jax.Array,
    knobs: SamplingArrays,
) -> tuple[jax.Array, PagedCache]:
    model = nnx.merge(graph, state)
    hidden, cache = model.paged(batch, cache)
    return sample(model.logits(hidden[last]), knobs), cache
