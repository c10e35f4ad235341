"""Parameters, cache, and compiled steps, one for each token bucket. Token ids only.

XLA compiles for fixed shapes, so a step is padded to the smallest bucket that holds it. All buckets
are compiled before the first request; after that the compiled programs are called directly, and a
shape that was not foreseen raises instead of compiling.

A step is a few programs: embed, block (called once for each layer), pick and draw. All layers have
the same shapes, so one compilation serves them all and the start does not grow with the depth.

Steps overlap: the next one is launched before the tokens of the last are read. What a sequence
drew goes from `draw` to the next `embed` on the device; the host learns of it a step later.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mixtral_jax.axes import FlatHidden, FlatTokens, Pages, Rows
from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.layers import Rotary
from mixtral_jax.model import Block, Transformer
from mixtral_jax.sampling import (
    NO_ID,
    Biases,
    History,
    Sampled,
    SamplingArrays,
    sample,
    unpack,
)
from serving.plan import Chunk, Limits, Plan
from serving.request import Drawn, Event, Request
from serving.scheduler import Scheduler

MAX_BIASES = 320  # of one request: logit_bias and ids that may not be drawn yet
_FEW_ROWS = 8


def buckets(limits: Limits) -> tuple[int, ...]:
    """Token counts that a step is padded to: powers of four, and what fills all rows.

    Each costs a second of compiling at the start; padding costs a step a part of its time.
    """
    sizes = {1, _FEW_ROWS, limits.max_sequences, limits.max_step_tokens}
    size = _FEW_ROWS * 4
    while size < limits.max_step_tokens:
        sizes.add(size)
        size *= 4
    return tuple(sorted(size for size in sizes if size <= limits.max_step_tokens))


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
        pages = steps.pages
        self._layers = [jnp.zeros(pages.shape, pages.dtype) for _ in self._parts.blocks]
        self._tokens: Rows = jnp.zeros(limits.max_sequences, jnp.int32)
        self._launched: _Launched | None = None

    def add(self, request: Request) -> None:
        """Queues a request; errors as `Scheduler.add`."""
        self.scheduler.add(request)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """As `Scheduler.cancel`."""
        self.scheduler.cancel(request_id, choice)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self, now: float = 0.0) -> list[Event]:
        """Launches one step and records the one before; what happened in that.

        `now` is time.monotonic(): requests whose deadline is before it end.
        """
        events = self.scheduler.expire(now)
        plan = self.scheduler.plan()
        before, self._launched = self._launched, self._launch(plan) if plan.chunks else None
        if before is not None:
            events += self.scheduler.commit(before.plan, before.drawn())
        return events

    def _launch(self, plan: Plan) -> "_Launched":
        size = min(bucket for bucket in self._steps.buckets if bucket >= plan.num_tokens)
        programs, arrays = self._steps.buckets[size], _arrays(plan, size, self._limits)
        if plan.copies:
            self._copy(plan.copies)
        rest = self._parts.rest
        batch, x, rotary = programs.embed(rest, arrays.batch, arrays.follows, self._tokens)
        for i, block in enumerate(self._parts.blocks):
            x, self._layers[i] = programs.block(block, x, rotary, self._layers[i], batch)
        x, last = programs.pick(x, batch.tokens, arrays.last)
        sampled = programs.draw(rest, x, last, arrays.sampling)
        self._tokens = sampled.tokens
        return _Launched(plan, sampled.packed)

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        width = self._limits.max_sequences
        for start in range(0, len(copies), width):
            # A destination out of range is dropped.
            pairs = _full((width, 2), self._limits.num_pages)
            part = copies[start : start + width]
            pairs[: len(part)] = part
            for i, pages in enumerate(self._layers):
                self._layers[i] = self._steps.copy(pages, pairs)


@dataclass(frozen=True)
class _Launched:
    """A step under way."""

    plan: Plan
    packed: jax.Array

    def drawn(self) -> list[Drawn | None]:
        """Waits for the step; what each chunk drew."""
        draws = unpack(np.asarray(self.packed))
        tokens, logprobs = draws.tokens.tolist(), draws.logprobs.tolist()
        found: list[Drawn | None] = []
        for row, chunk in enumerate(self.plan.chunks):
            wanted = chunk.sampling.top_logprobs
            if not chunk.samples:
                found.append(None)
            elif wanted is None:
                found.append(Drawn(token_id=tokens[row]))
            else:
                ids, values = draws.top_ids[row, :wanted], draws.top_logprobs[row, :wanted]
                top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
                found.append(Drawn(token_id=tokens[row], logprob=logprobs[row], top_logprobs=top))
        return found


def compile_steps(
    model: Transformer,
    limits: Limits,
    progress: Callable[[str], None] = lambda line: None,
    cache_dtype: DTypeLike | None = None,
) -> "Steps":
    """Compiles the step of every bucket. The model may be abstract: only shapes matter.

    `cache_dtype` is that of keys and values, such as int8; None for the model's own. `progress` is
    told in a line what is being compiled.
    """
    parts = _Parts.of(model)
    kind = model.dtype if cache_dtype is None else cache_dtype
    pages = jax.eval_shape(
        lambda: PagedCache.empty(model.config, limits.num_pages, limits.page_size, kind)
    ).layers[0]
    sizes = buckets(limits)
    # One after the other: the compiler itself uses all cores.
    draw: dict[int, Any] = {}
    programs: dict[int, _Programs] = {}
    for number, size in enumerate(sizes, start=1):
        progress(f"compiling step {number} of {len(sizes)}: {size} tokens")
        arrays = _arrays(Plan(chunks=()), size, limits)
        rows = len(arrays.last)
        if rows not in draw:
            draw[rows] = parts.compile_draw(arrays, limits)
        programs[size] = _Programs(*parts.compile_walk(pages, arrays, limits), draw[rows])
    pairs = np.zeros((limits.max_sequences, 2), np.int32)
    return Steps(pages, programs, jax.jit(_copy, donate_argnums=0).lower(pages, pairs).compile())


def _copy(pages: Pages, pairs: jax.Array) -> Pages:
    """Copies whole pages: pairs [S 2] of source and destination."""
    return pages.at[pairs[:, 1]].set(pages[pairs[:, 0]], mode="drop")


def _arrays(plan: Plan, size: int, limits: Limits) -> "_Arrays":
    """The plan, padded to a bucket."""
    few = size <= _FEW_ROWS and not limits.deterministic
    rows = min(size, limits.max_sequences) if few else limits.max_sequences
    tokens, positions, follows = _full(size, 0), _full(size, 0), _full(size, -1)
    starts, lengths, last = _full(rows + 1, 0), _full(rows, 0), _full(rows, 0)
    table = _full((rows, -(-limits.max_context // limits.page_size)), 0)
    place = 0
    for row, chunk in enumerate(plan.chunks):
        end = place + len(chunk.token_ids)
        tokens[place:end] = chunk.token_ids
        positions[place:end] = range(chunk.start, chunk.end)
        starts[row + 1], lengths[row], last[row] = end, chunk.end, end - 1
        table[row, : len(chunk.pages)] = chunk.pages
        if chunk.follows is not None:
            follows[place] = chunk.follows
        place = end
    batch = RaggedBatch(
        tokens=tokens,
        positions=positions,
        lengths=lengths,
        query_starts=starts,
        page_table=table,
        num_decodes=_full((), sum(len(chunk.token_ids) == 1 for chunk in plan.chunks)),
        num_sequences=_full((), len(plan.chunks)),
    )
    return _Arrays(batch, follows, last, _sampling(plan.chunks, rows, limits))


def _sampling(chunks: Sequence[Chunk], rows: int, limits: Limits) -> SamplingArrays:
    """The parameters of the chunks that draw; the other rows take the likeliest token."""

    def column(value: Callable[[Chunk], float], default: float, dtype: type) -> Any:
        out = _full(rows, default, dtype)
        for row, chunk in enumerate(chunks):
            if chunk.samples:
                out[row] = value(chunk)
        return out

    history = _no_history(rows, limits.max_context)
    if any(chunk.history for chunk in chunks):
        history = history.copy()
    ids, values = _full((rows, MAX_BIASES), NO_ID), _full((rows, MAX_BIASES), 0, np.float32)
    for row, chunk in enumerate(chunks):
        if chunk.samples:
            if chunk.history:
                history[row, : len(chunk.history)] = chunk.history
            biases = [*chunk.sampling.logit_bias, *((i, -np.inf) for i in chunk.forbidden)]
            if biases:
                ids[row, : len(biases)], values[row, : len(biases)] = zip(*biases, strict=True)
    return SamplingArrays(
        temperature=column(lambda c: c.sampling.temperature, 0, np.float32),
        top_k=column(lambda c: c.sampling.top_k, 0, np.int32),
        top_p=column(lambda c: c.sampling.top_p, 1, np.float32),
        min_p=column(lambda c: c.sampling.min_p, 0, np.float32),
        presence_penalty=column(lambda c: c.sampling.presence_penalty, 0, np.float32),
        frequency_penalty=column(lambda c: c.sampling.frequency_penalty, 0, np.float32),
        repetition_penalty=column(lambda c: c.sampling.repetition_penalty, 1, np.float32),
        seed=column(lambda c: c.seed, 0, np.int32),
        position=column(lambda c: c.end, 0, np.int32),
        top_logprobs=column(
            lambda c: -1 if c.sampling.top_logprobs is None else c.sampling.top_logprobs,
            -1,
            np.int32,
        ),
        history=History(
            tokens=history,
            last=_full(rows, 0),  # known on the device alone
            prompt_length=column(lambda c: c.prompt_length, 0, np.int32),
        ),
        biases=Biases(ids=ids, values=values),
    )


@functools.cache
def _no_history(rows: int, width: int) -> Any:
    """What most steps send: megabytes for a long context, so made once. Never written to."""
    return _full((rows, width), NO_ID)


def _full(shape: int | tuple[int, ...], value: float, dtype: type = np.int32) -> Any:
    """An array on the host, as compiled programs take it."""
    return np.full(shape, value, dtype)


@dataclass(frozen=True)
class _Arrays:
    batch: RaggedBatch
    follows: Any  # [T] i32, chunk of the step before that draws the token, or -1
    last: Any  # [R] i32, place of each sequence's last token in the flat row
    sampling: SamplingArrays


@dataclass(frozen=True)
class _Programs:
    """Compiled for one bucket."""

    embed: Any  # (rest, batch, follows, tokens) -> batch with its tokens, x, rotary
    block: Any  # (block, x, rotary, pages, batch) -> x, pages; pages are donated
    pick: Any  # (x, tokens, last) -> x and tokens of the rows that draw
    draw: Any  # (rest, x, last tokens, sampling) -> Sampled


@dataclass(frozen=True)
class Steps:
    """All that an engine ever runs."""

    pages: jax.ShapeDtypeStruct  # of each layer
    buckets: dict[int, _Programs]
    copy: Any  # (pages, pairs) -> pages; pages are donated


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

    def compile_walk(self, pages: Pages, arrays: _Arrays, limits: Limits) -> tuple[Any, Any, Any]:
        """The programs `embed`, `block` and `pick` for the shapes of these arrays."""

        def embed(
            rest: list[jax.Array], batch: RaggedBatch, follows: FlatTokens, drawn: Rows
        ) -> tuple[RaggedBatch, FlatHidden, Rotary]:
            tokens = jnp.where(follows >= 0, drawn[jnp.maximum(follows, 0)], batch.tokens)
            batch = batch._replace(tokens=tokens)
            return batch, *self._rest(rest).begin(batch)

        def block(
            arrays: list[jax.Array],
            x: FlatHidden,
            rotary: Rotary,
            pages: Pages,
            batch: RaggedBatch,
        ) -> tuple[FlatHidden, Pages]:
            return self._block(arrays).paged(x, rotary, pages, batch)

        def pick(x: FlatHidden, tokens: FlatTokens, last: Rows) -> tuple[FlatHidden, Rows]:
            return x[last], tokens[last]

        drawn = jax.ShapeDtypeStruct((limits.max_sequences,), jnp.int32)
        inputs = (self.rest, arrays.batch, arrays.follows, drawn)
        batch, x, rotary = jax.eval_shape(embed, *inputs)
        step = jax.jit(block, donate_argnums=3)
        return (
            jax.jit(embed).lower(*inputs).compile(),
            step.lower(self.blocks[0], x, rotary, pages, batch).compile(),
            jax.jit(pick).lower(x, batch.tokens, arrays.last).compile(),
        )

    def compile_draw(self, arrays: _Arrays, limits: Limits) -> Any:
        """The program `draw` for as many rows as these arrays have."""

        def draw(
            rest: list[jax.Array], x: FlatHidden, last: Rows, sampling: SamplingArrays
        ) -> Sampled:
            model = self._rest(rest)
            sampling = sampling._replace(history=sampling.history._replace(last=last))
            sampled = sample(model.paged_logits(model.norm.paged(x)), sampling)
            # As wide for every bucket: any of them may come next.
            short = limits.max_sequences - last.shape[0]
            return sampled._replace(tokens=jnp.pad(sampled.tokens, (0, short)))

        _, x, _ = jax.eval_shape(
            lambda rest, batch: (0, *self._rest(rest).begin(batch)), self.rest, arrays.batch
        )
        x = jax.ShapeDtypeStruct((len(arrays.last), *x.shape[1:]), x.dtype)
        last = jax.ShapeDtypeStruct(arrays.last.shape, jnp.int32)
        return jax.jit(draw).lower(self.rest, x, last, arrays.sampling).compile()


def _apart(module: Any) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """A module's arrays, and the function that makes the module of them again."""
    graph, state = nnx.split(module)
    arrays, structure = jax.tree.flatten(state)
    return arrays, lambda leaves: nnx.merge(graph, jax.tree.unflatten(structure, leaves))
