"""Inputs of one step: numpy arrays on the host, filled in before the step is launched.

The engine and the plain loop write them by the same two calls: `GroupInputs.add` for the tokens of
a sequence, and `GroupInputs.sample` for the parameters by which its next token is drawn.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.axes import FlatTokens, Rows
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.model.adapter_stack import NO_SLOT
from mixtral_jax.sampling_params import MAX_BIASES, SamplingParams
from mixtral_jax.step.sampling import NO_ID, Biases, History, SamplingArrays


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Numbers that fix the shapes of a step's arrays; all of one sequence group."""

    num_pages: int
    page_size: int  # tokens
    max_sequences: int
    max_context: int  # tokens of one sequence


class StepInputs(NamedTuple):
    """Everything that the host gives to one step.

    A mesh may split the sequences into groups, each with its own pages. The arrays hold the groups
    one behind the other; `batch.num_decodes` and `batch.num_sequences` have an element for each
    group, and are scalars without a mesh.
    """

    batch: RaggedBatch
    follows: FlatTokens  # [T] i32, index into the previous step's `Sampled.tokens`, or -1
    # These two have the rows that may draw, which may be fewer than the batch has room for.
    last: Rows  # [R] i32, place of each sequence's last token in its group's flat row
    sampling: SamplingArrays
    slots: FlatTokens  # [T] i32, of each token's adapter, or NO_SLOT

    @classmethod
    def blank(
        cls,
        num_tokens: int,
        rows: int,
        sizes: StepSizes,
        groups: int | None,
        *,
        drawn: int | None = None,
        with_history: bool = False,
        with_biases: bool = False,
    ) -> "StepInputs":
        """Returns inputs without a sequence: every row is padding that draws the likeliest token.

        Args:
            num_tokens: T of each group.
            rows: sequences of each group.
            sizes: the same for all steps of an engine.
            groups: number of sequence groups; None without a mesh.
            drawn: the first so many rows of each group may draw; None for all.
            with_history: makes the tokens of `sampling.history` writable. Otherwise they are a
                read-only view of a single number, because for long contexts they take megabytes
                that most steps do not need.
            with_biases: the same for `sampling.biases`, which have hundreds of places a row.
        """
        all_rows = (groups or 1) * rows
        all_drawn = (groups or 1) * (drawn or rows)
        batch = RaggedBatch(
            tokens=host_array((groups or 1) * num_tokens, 0),
            positions=host_array((groups or 1) * num_tokens, 0),
            lengths=host_array(all_rows, 0),
            query_starts=host_array((groups or 1) * (rows + 1), 0),
            page_table=host_array((all_rows, -(-sizes.max_context // sizes.page_size)), 0),
            num_decodes=host_array(() if groups is None else groups, 0),
            num_sequences=host_array(() if groups is None else groups, 0),
        )
        follows = host_array((groups or 1) * num_tokens, -1)
        sampling = _blank_sampling(all_drawn, sizes.max_context, with_history, with_biases)
        slots = host_array(follows.shape, NO_SLOT)
        return cls(batch, follows, host_array(all_drawn, 0), sampling, slots)

    @property
    def num_groups(self) -> int:
        """Number of sequence groups; 1 without a mesh."""
        return int(np.size(self.batch.num_decodes))

    @property
    def num_tokens(self) -> int:
        """Number of places for tokens in each group."""
        return len(self.follows) // self.num_groups

    @property
    def num_rows(self) -> int:
        """Number of places for sequences in each group."""
        return np.shape(self.batch.lengths)[0] // self.num_groups

    @property
    def num_drawn(self) -> int:
        """Number of rows of each group that may draw, the first of them."""
        return len(self.last) // self.num_groups

    @property
    def has_history(self) -> bool:
        """True if the tokens of the history were made to be written, and so must be sent."""
        return bool(np.asarray(self.sampling.history.tokens).flags.writeable)

    @property
    def has_biases(self) -> bool:
        """True if the biases were made to be written, and so must be sent."""
        return bool(np.asarray(self.sampling.biases.ids).flags.writeable)

    @property
    def has_adapters(self) -> bool:
        """True if a token is computed with an adapter."""
        return bool(np.any(np.asarray(self.slots) != NO_SLOT))

    def drawing(self, other: "StepInputs") -> "StepInputs":
        """Returns the same inputs with the rows that draw in another step's place."""
        return self._replace(last=other.last, sampling=other.sampling)

    def later(self, number: Any, active: Any) -> "StepInputs":
        """Returns the inputs of a later step of a run; see `StepLauncher.run`.

        Args:
            number: of the step in the run, whose first step has these inputs, of one group; an i32
                of numpy, or within a program a traced one.
            active: number of sequences, the first ones, that are in it; as `number`.
        """
        batch, sampling = self.batch, self.sampling
        own = np.arange(len(self.follows), dtype=np.int32)  # token p is what row p has drawn
        own[len(self.last) :] = -1
        is_first = (number == 0).astype(np.int32)
        is_active = (np.arange(self.num_rows, dtype=np.int32) < active).astype(np.int32)
        count: Any = batch.num_decodes * 0 + active
        batch = batch._replace(
            positions=batch.positions + number,
            lengths=(batch.lengths + number) * is_active,
            num_decodes=count,
            num_sequences=count,
        )
        return self._replace(
            batch=batch,
            follows=self.follows * is_first + own * (1 - is_first),
            sampling=sampling._replace(position=sampling.position + number),
        )

    def with_blanks(self, tokens: Any, biases: Biases) -> "StepInputs":
        """Returns the same inputs with other arrays for a history and biases that none has."""
        sampling = self.sampling
        if not self.has_history:
            sampling = sampling._replace(history=sampling.history._replace(tokens=tokens))
        if not self.has_biases:
            sampling = sampling._replace(biases=biases)
        return self._replace(sampling=sampling)


class GroupInputs:
    """Writes the sequences of one group into its part of a step's arrays.

    Args:
        inputs: blank ones; the arrays are changed.
        group: index of the sequence group.
        max_sequences: rows of `Sampled.tokens` that each group has.
    """

    def __init__(self, inputs: StepInputs, group: int, max_sequences: int) -> None:
        rows, size = inputs.num_rows, inputs.num_tokens
        self._inputs = inputs
        self._group = group
        self._first_row, self._first_token = group * rows, group * size
        self._first_draw = group * inputs.num_drawn
        self._first_drawn = group * max_sequences
        starts: Any = inputs.batch.query_starts
        self._starts = starts[group * (rows + 1) : (group + 1) * (rows + 1)]
        self._row = self._place = self._num_decodes = 0

    def add(
        self,
        token_ids: Sequence[int],
        start: int,
        pages: Sequence[int],
        follows: int | None = None,
        slot: int = NO_SLOT,
    ) -> int:
        """Adds new tokens of one sequence and returns its row. Those of one token come first.

        Args:
            token_ids: the new tokens, at positions `start`, `start + 1` ...
            start: number of tokens whose keys and values are cached already.
            pages: pages of all tokens up to the last new one.
            follows: row of this group in the previous step whose drawn token replaces the first
                of `token_ids`; None if they are all known.
            slot: of the sequence's adapter.
        """
        batch: Any = self._inputs.batch
        first, row = self._first_token, self._row
        count, place = len(token_ids), self._place
        end = place + count
        batch.tokens[first + place : first + end] = token_ids
        batch.positions[first + place : first + end] = range(start, start + count)
        self._starts[row + 1] = end
        at = self._first_row + row
        batch.lengths[at] = start + count
        batch.page_table[at, : len(pages)] = pages
        self._inputs.last[self._first_draw + row] = end - 1
        slots: Any = self._inputs.slots
        slots[first + place : first + end] = slot
        if follows is not None:
            self._inputs.follows[first + place] = self._first_drawn + follows
        self._row, self._place = row + 1, end
        self._num_decodes += count == 1
        group = self._group if batch.num_decodes.ndim else ...
        batch.num_decodes[group], batch.num_sequences[group] = self._num_decodes, self._row
        return row

    def draw_after(self, row: int, number: int, at: int) -> None:
        """Has a row draw behind a token of its own, or of another row, that is not its last.

        Args:
            row: of the sequence, as `add` returned it.
            number: of the token among the new ones of the sequence.
            at: the row that draws; one of a sequence, or behind all of these.
        """
        self._inputs.last[self._first_draw + at] = self._starts[row] + number

    def sample(
        self,
        row: int,
        params: SamplingParams,
        *,
        seed: int,
        position: int,
        prompt_length: int,
        history: Sequence[int] | np.ndarray = (),
        forbidden: Collection[int] = (),
    ) -> None:
        """Sets the parameters by which a sequence's next token is drawn.

        Args:
            row: as `add` returned it, or one that `draw_after` has given a place.
            params: temperature, penalties and so on; `params.seed` is not read.
            seed: in [0, 2^31), of this choice.
            position: of the token to be drawn, in its sequence.
            prompt_length: tokens from this position on were generated.
            history: all tokens before the last one, where `params` has penalties; the inputs must
                then be made `with_history`.
            forbidden: ids that must not be drawn; with them, or with biases in `params`, the
                inputs must be made `with_biases`.
        """
        at, arrays = self._first_draw + row, self._inputs.sampling
        values: Any = arrays
        values.temperature[at] = params.temperature
        values.top_k[at] = params.top_k
        values.top_p[at] = params.top_p
        values.min_p[at] = params.min_p
        values.presence_penalty[at] = params.presence_penalty
        values.frequency_penalty[at] = params.frequency_penalty
        values.repetition_penalty[at] = params.repetition_penalty
        values.seed[at] = seed
        values.position[at] = position
        values.top_logprobs[at] = -1 if params.top_logprobs is None else params.top_logprobs
        values.history.prompt_length[at] = prompt_length
        if len(history):
            values.history.tokens[at, : len(history)] = history
        if params.logit_bias or forbidden:
            # An id of both must be written once: minus infinity wins.
            biases = {**params.logit_bias, **dict.fromkeys(forbidden, -np.inf)}
            values.biases.ids[at, : len(biases)] = [*biases]
            values.biases.values[at, : len(biases)] = [*biases.values()]


def mask_words(vocab_size: int) -> int:
    """Returns the number of words of a row's mask, which has a bit for each id."""
    return -(-vocab_size // 32)


def host_array(shape: int | tuple[int, ...], value: int, dtype: type = np.int32) -> Any:
    """Returns a numpy array, as compiled programs take it in place of one of jax's."""
    return np.full(shape, value, dtype)


def _blank_sampling(rows: int, width: int, with_history: bool, with_biases: bool) -> SamplingArrays:
    """Returns the parameters of rows that take the likeliest token; `width` is S of the history."""
    tokens: Any = np.broadcast_to(np.int32(NO_ID), (rows, width))
    ids: Any = np.broadcast_to(np.int32(NO_ID), (rows, MAX_BIASES))
    values: Any = np.broadcast_to(np.float32(0), (rows, MAX_BIASES))
    return SamplingArrays(
        temperature=host_array(rows, 0, np.float32),
        top_k=host_array(rows, 0),
        top_p=host_array(rows, 1, np.float32),
        min_p=host_array(rows, 0, np.float32),
        presence_penalty=host_array(rows, 0, np.float32),
        frequency_penalty=host_array(rows, 0, np.float32),
        repetition_penalty=host_array(rows, 1, np.float32),
        seed=host_array(rows, 0),
        position=host_array(rows, 0),
        top_logprobs=host_array(rows, -1),
        history=History(
            tokens=tokens.copy() if with_history else tokens,
            last=host_array(rows, 0),  # replaced on the device, where alone it is known
            prompt_length=host_array(rows, 0),
        ),
        biases=Biases(
            ids=ids.copy() if with_biases else ids,
            values=values.copy() if with_biases else values,
        ),
    )
