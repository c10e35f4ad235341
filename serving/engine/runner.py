"""Launches steps on the devices: plans in, packed draws out. Decides nothing.

The engine has one, which reads what is drawn; with several hosts every follower has one too, and
launches the same plans in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mixtral_jax.axes import Rows
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.step.programs import Parts, StepInputs, Steps, full
from mixtral_jax.step.sampling import SamplingArrays, unpack
from serving.scheduling.request import Drawn
from serving.scheduling.step_plan import Chunk, Plan


class Runner:
    """Parameters, pages and the tokens drawn last. Used by one thread.

    Args:
        model: the parameters; must not be changed afterwards.
        steps: what `serving.engine.engine.compile_steps` made for the same shapes.
    """

    def __init__(self, model: Transformer, steps: Steps, rows_of: Callable[[int], int]) -> None:
        self.steps = steps
        self._rows_of = rows_of
        self._parts = Parts.of(model)
        self._layers = self._parts.empty(steps.pages)
        # By rows: megabytes for a long context, which most steps would send for nothing.
        self._no_history: dict[int, Any] = {}
        num_drawn = steps.num_parts * steps.sizes.max_sequences
        self._tokens: Rows | Any = np.zeros(num_drawn, np.int32)

    def launch(self, plans: Sequence[Plan]) -> "Launched":
        """Starts one step: a plan for each part of the sequences, at least one with chunks."""
        most = max(plan.num_tokens for plan in plans)
        size = min(bucket for bucket in self.steps.buckets if bucket >= most)
        rows = self._rows_of(size)
        inputs = self.steps.blank(size, rows)
        blank = inputs.sampling.history.tokens
        if any(chunk.history for plan in plans for chunk in plan.chunks):
            inputs = inputs.with_history(blank.copy())
        for part, plan in enumerate(plans):
            _fill(inputs, plan, part, size, rows, self.steps.sizes.max_sequences)
        if inputs.sampling.history.tokens is blank:
            if rows not in self._no_history:
                self._no_history[rows] = self._parts.everywhere(blank)
            inputs = inputs.with_history(self._no_history[rows])
        programs, batch = self.steps.buckets[size], inputs.batch
        self._copy([plan.copies for plan in plans])
        rest = self._parts.rest
        batch, x, rotary = programs.embed(rest, batch, inputs.follows, self._tokens)
        for i, block in enumerate(self._parts.blocks):
            x, self._layers[i] = programs.block(block, x, rotary, self._layers[i], batch)
        x, last = programs.pick(x, batch.tokens, inputs.last)
        sampled = programs.draw(rest, x, last, inputs.sampling)
        self._tokens = sampled.tokens
        return Launched(tuple(plans), rows, sampled.packed)

    def _copy(self, copies: Sequence[Sequence[tuple[int, int]]]) -> None:
        width, pages = self.steps.sizes.max_sequences, self.steps.sizes.num_pages
        for start in range(0, max(map(len, copies)), width):
            pairs = full((len(copies), width, 2), pages)
            for part, wanted in enumerate(copies):
                now = wanted[start : start + width]
                pairs[part, : len(now)] = np.reshape(now, (-1, 2))
            for i, layer in enumerate(self._layers):
                self._layers[i] = self.steps.copy(layer, pairs.reshape(-1, 2))


@dataclass(frozen=True)
class Launched:
    """A step under way."""

    plans: tuple[Plan, ...]
    rows: int  # of each part
    packed: jax.Array

    def drawn(self) -> list[list[Drawn | None]]:
        """Waits for the step; what each chunk of each plan drew."""
        draws = np.asarray(self.packed)
        return [
            _drawn(plan, draws[part * self.rows : (part + 1) * self.rows])
            for part, plan in enumerate(self.plans)
        ]


def _drawn(plan: Plan, packed: np.ndarray) -> list[Drawn | None]:
    draws = unpack(packed)
    tokens, logprobs = draws.tokens.tolist(), draws.logprobs.tolist()
    found: list[Drawn | None] = []
    for row, chunk in enumerate(plan.chunks):
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


def _fill(
    inputs: StepInputs, plan: Plan, part: int, size: int, rows: int, max_sequences: int
) -> None:
    """Writes a part's plan into its places of the arrays."""
    batch = inputs.batch
    first, first_row = part * size, part * rows
    starts = batch.query_starts[part * (rows + 1) : (part + 1) * (rows + 1)]
    place = 0
    for i, chunk in enumerate(plan.chunks):
        row, end = first_row + i, place + len(chunk.token_ids)
        batch.tokens[first + place : first + end] = chunk.token_ids
        batch.positions[first + place : first + end] = range(chunk.start, chunk.end)
        starts[i + 1], batch.lengths[row], inputs.last[row] = end, chunk.end, end - 1
        batch.page_table[row, : len(chunk.pages)] = chunk.pages
        if chunk.follows is not None:
            inputs.follows[first + place] = part * max_sequences + chunk.follows
        place = end
    decodes = sum(len(chunk.token_ids) == 1 for chunk in plan.chunks)
    for counts, value in (
        (batch.num_decodes, decodes),
        (batch.num_sequences, len(plan.chunks)),
    ):
        counts[... if counts.ndim == 0 else part] = value
    for i, chunk in enumerate(plan.chunks):
        if chunk.samples:
            _sample_with(inputs.sampling, chunk, first_row + i)


def _sample_with(arrays: SamplingArrays, chunk: Chunk, row: int) -> None:
    """The parameters of a chunk that draws; the other rows take the likeliest token."""
    sampling = chunk.sampling
    arrays.temperature[row] = sampling.temperature
    arrays.top_k[row] = sampling.top_k
    arrays.top_p[row] = sampling.top_p
    arrays.min_p[row] = sampling.min_p
    arrays.presence_penalty[row] = sampling.presence_penalty
    arrays.frequency_penalty[row] = sampling.frequency_penalty
    arrays.repetition_penalty[row] = sampling.repetition_penalty
    arrays.seed[row] = chunk.seed
    arrays.position[row] = chunk.end
    arrays.top_logprobs[row] = -1 if sampling.top_logprobs is None else sampling.top_logprobs
    arrays.history.prompt_length[row] = chunk.prompt_length
    if chunk.history:
        arrays.history.tokens[row, : len(chunk.history)] = chunk.history
    biases = [*sampling.logit_bias, *((i, -np.inf) for i in chunk.forbidden)]
    if biases:
        ids, values = zip(*biases, strict=True)
        arrays.biases.ids[row, : len(biases)] = ids
        arrays.biases.values[row, : len(biases)] = values
