"""Parameters, cache, and compiled steps, one for each token bucket. Token ids only.

XLA compiles for fixed shapes, so a step is padded to the smallest bucket that holds it. All buckets
are compiled before the first request; after that the compiled programs are called directly, and a
shape that was not foreseen raises instead of compiling.

A step is a few programs: embed, block (called once for each layer), pick and draw. All layers have
the same shapes, so one compilation serves them all and the start does not grow with the depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.axes import FlatHidden, Pages, Rows
from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.layers import Rotary
from mixtral_jax.model import Block, Transformer
from mixtral_jax.sampling import SamplingArrays, sample
from serving.request import Event, Request
from serving.scheduler import Limits, Plan, Scheduler


def buckets(limits: Limits) -> tuple[int, ...]:
    """Token counts that a step is padded to: 1, one a row, and from there in large steps.

    Each costs a second or two of compiling at the start; padding costs a prompt a part of its time.
    """
    sizes = {1, limits.max_sequences, limits.max_step_tokens}
    size = limits.max_sequences * 16
    while size < limits.max_step_tokens:
        sizes.add(size)
        size *= 4
    return tuple(sorted(sizes))


class Engine:
    """Continues requests, a step at a time. Used by one thread.

    Args:
        model: the parameters; must not be changed afterwards.
        limits: sizes of the cache and of a step.
        steps: what `compile_steps` made for the same shapes and limits.
    """

    def __init__(self, model: Transformer, limits: Limits, steps: "Steps") -> None:
        self.scheduler = Scheduler(limits)
        self._limits = limits
        self._steps = steps
        self._parts = _Parts.of(model)
        dtype = model.embed.weight.get_value().dtype
        cache = PagedCache.empty(model.config, limits.num_pages, limits.page_size, dtype)
        self._layers = list(cache.layers)

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
        size = min(bucket for bucket in self._steps if bucket >= plan.num_tokens)
        programs, arrays = self._steps[size], _arrays(plan, size, self._limits)
        x, rotary = programs.embed(self._parts.rest, arrays.batch)
        for i, block in enumerate(self._parts.blocks):
            x, self._layers[i] = programs.block(block, x, rotary, self._layers[i], arrays.batch)
        tokens = programs.draw(self._parts.rest, programs.pick(x, arrays.last), arrays.knobs)
        drawn: list[int] = np.asarray(tokens)[: len(plan.chunks)].tolist()
        return drawn


def compile_steps(model: Transformer, limits: Limits) -> "Steps":
    """Compiles the step of every bucket. The model may be abstract: only shapes matter."""
    empty = {size: _arrays(Plan(chunks=()), size, limits) for size in buckets(limits)}
    parts = _Parts.of(model)
    dtype = model.embed.weight.get_value().dtype
    cache = jax.eval_shape(
        lambda: PagedCache.empty(model.config, limits.num_pages, limits.page_size, dtype)
    )
    # One after the other: the compiler itself uses all cores.
    one_of = {arrays.last.shape: arrays for arrays in empty.values()}
    draw = {rows: parts.compile_draw(arrays) for rows, arrays in one_of.items()}
    return {
        size: _Programs(*parts.compile_walk(cache.layers[0], arrays), draw[arrays.last.shape])
        for size, arrays in empty.items()
    }


def _arrays(plan: Plan, size: int, limits: Limits) -> "_Arrays":
    """The plan, padded to a bucket."""
    rows = min(size, limits.max_sequences)
    tokens, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
    starts, lengths = np.zeros(rows + 1, np.int32), np.zeros(rows, np.int32)
    table = np.zeros((rows, -(-limits.max_context // limits.page_size)), np.int32)
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
    return _Arrays(batch, jnp.asarray(last), knobs)


@dataclass(frozen=True)
class _Arrays:
    batch: RaggedBatch
    last: Rows  # place of each sequence's last token in the flat row
    knobs: SamplingArrays


@dataclass(frozen=True)
class _Programs:
    """Compiled for one bucket."""

    embed: Any  # (rest, batch) -> x, rotary
    block: Any  # (block, x, rotary, pages, batch) -> x, pages; pages are donated
    pick: Any  # (x, last) -> x of the rows that draw
    draw: Any  # (rest, x, knobs) -> tokens


Steps = dict[int, _Programs]


@dataclass(frozen=True)
class _Parts:
    """A Transformer taken apart: each block's arrays, and the arrays of the rest."""

    blocks: tuple[list[jax.Array], ...]
    rest: list[jax.Array]
    _block: Callable[[list[jax.Array]], Block]
    _rest: Callable[[list[jax.Array]], Transformer]

    @classmethod
    def of(cls, model: Transformer) -> "_Parts":
        layers, around = model.apart()
        # Lists of arrays: flattening an nnx.State on every call costs more than the call.
        blocks = [_apart(block) for block in layers]
        rest, put_together = _apart(around)
        return cls(tuple(arrays for arrays, _ in blocks), rest, blocks[0][1], put_together)

    def compile_walk(self, pages: Pages, arrays: _Arrays) -> tuple[Any, Any, Any]:
        """The programs `embed`, `block` and `pick` for the shapes of these arrays."""

        def embed(rest: list[jax.Array], batch: RaggedBatch) -> tuple[FlatHidden, Rotary]:
            return self._rest(rest).begin(batch)

        def block(
            arrays: list[jax.Array],
            x: FlatHidden,
            rotary: Rotary,
            pages: Pages,
            batch: RaggedBatch,
        ) -> tuple[FlatHidden, Pages]:
            return self._block(arrays).paged(x, rotary, pages, batch)

        def pick(x: FlatHidden, last: Rows) -> FlatHidden:
            return x[last]

        x, rotary = jax.eval_shape(embed, self.rest, arrays.batch)
        step = jax.jit(block, donate_argnums=3)
        return (
            jax.jit(embed).lower(self.rest, arrays.batch).compile(),
            step.lower(self.blocks[0], x, rotary, pages, arrays.batch).compile(),
            jax.jit(pick).lower(x, arrays.last).compile(),
        )

    def compile_draw(self, arrays: _Arrays) -> Any:
        """The program `draw` for as many rows as these arrays have."""

        def draw(rest: list[jax.Array], x: FlatHidden, knobs: SamplingArrays) -> Rows:
            model = self._rest(rest)
            return sample(model.logits(model.norm(x)), knobs)

        x, _ = jax.eval_shape(
            lambda rest, batch: self._rest(rest).begin(batch), self.rest, arrays.batch
        )
        x = jax.ShapeDtypeStruct((*arrays.last.shape, *x.shape[1:]), x.dtype)
        return jax.jit(draw).lower(self.rest, x, arrays.knobs).compile()


def _apart(module: Any) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """A module's arrays, and the function that makes the module of them again."""
    graph, state = nnx.split(module)
    arrays, structure = jax.tree.flatten(state)
    return arrays, lambda leaves: nnx.merge(graph, jax.tree.unflatten(structure, leaves))
