"""Packing: which examples stand in which row of which step, as a function of numbers alone.

Examples go into rows of a fixed length by best fit, the longest first: each goes into the fullest
row that still has room for it. The rows and their sizes follow from the lengths alone; which of
several examples of one length stands in a row, and the order of the rows, are drawn anew for each
epoch from (seed, epoch). So the place in the data is one integer, the step, and every host computes
the same plan for itself.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mixtral_jax.training.batch import Batch, PreferenceBatch
from mixtral_jax.training.example import Example


def best_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Returns rows of indices of `lengths` whose lengths have a sum of at most `length`.

    Args:
        lengths: Those of the items, in descending order; each is between 1 and `length`.
        length: Room of a row.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the room that they still have
    rooms = 0  # bit n is set if there is a row with room n
    for index, size in enumerate(lengths):
        assert 0 < size <= length, "an item does not fit into any row"
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(index)
        if remaining := room - size:
            with_room.setdefault(remaining, []).append(row)
            rooms |= 1 << remaining
    return rows


class PackedData:
    """The batches of a data set, any of which can be asked for at any time.

    Args:
        examples: The data set; none has more ids than `length`.
        length: Positions of a row, T.
        rows_per_step: Rows of the batch of a step, B: those of all micro-batches and all hosts.
        seed: Draws the order.
        is_shuffled: False keeps the rows in the same order in every epoch, for evaluation.

    Attributes:
        num_rows: Rows of an epoch.
        num_steps: Steps of an epoch. The last one has empty rows where there are no more.
        share_used: Share of the positions of an epoch's rows that hold tokens.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        length: int,
        rows_per_step: int,
        seed: int,
        *,
        is_shuffled: bool = True,
    ) -> None:
        self._examples = examples
        self._lengths = np.array([len(example.ids) for example in examples], np.int64)
        self.length = length
        self.rows_per_step = rows_per_step
        self._seed = seed
        self._is_shuffled = is_shuffled
        self._rows = best_fit(np.sort(self._lengths)[::-1].tolist(), length)
        self.num_rows = len(self._rows)
        self.num_steps = -(-self.num_rows // rows_per_step)
        self.share_used = int(self._lengths.sum()) / (self.num_rows * length)
        self._order = lru_cache(maxsize=2)(self._order_of)

    def rows(self, step: int) -> list[list[int]]:
        """Returns the indices of the examples of each row of a step, counted from 0 over epochs.

        There are `rows_per_step` rows, of which the last of an epoch may be empty.
        """
        epoch, within = divmod(step, self.num_steps)
        items, order = self._order(epoch)
        start = within * self.rows_per_step
        chosen = order[start : start + self.rows_per_step]
        rows = [[int(items[place]) for place in self._rows[row]] for row in chosen]
        return rows + [[] for _ in range(self.rows_per_step - len(rows))]

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Returns the batch of a step, or some of its rows: [B T], arrays of the host.

        A host of several takes its share of the rows by their numbers, so that the batch of a step
        is the same however many hosts there are.
        """
        chosen = self.rows(step)[rows or slice(None)]
        return Batch.packed([[self._examples[i] for i in row] for row in chosen], self.length)

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the examples in descending order of length, and the rows in theirs."""
        mixed = np.arange(len(self._lengths))
        order = np.arange(self.num_rows)
        if self._is_shuffled:
            draws = _draws(self._seed, epoch)
            mixed = np.argsort(draws.random_raw(len(mixed)), kind="stable")
            order = np.argsort(draws.random_raw(len(order)), kind="stable")
        items = mixed[np.argsort(-self._lengths[mixed], kind="stable")]
        return items, order


class PairedData:
    """The batches of pairs of answers, any of which can be asked for at any time.

    A row holds one answer with its prompt, for the loss compares rows.

    Args:
        examples: in twos, a preferred answer and the other one; none has more ids than `length`.
        length: positions of a row, T.
        rows_per_step: pairs of a step, B.
        seed: draws the order.
        is_shuffled: False keeps the pairs in the same order in every epoch, for evaluation.

    Attributes:
        num_rows: pairs of an epoch.
        num_steps: steps of an epoch. The last one has empty pairs where there are no more.
        share_used: share of the positions of an epoch's rows that hold tokens.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        length: int,
        rows_per_step: int,
        seed: int,
        *,
        is_shuffled: bool = True,
    ) -> None:
        self._chosen, self._rejected = examples[0::2], examples[1::2]
        self.length = length
        self.rows_per_step = rows_per_step
        self._seed = seed
        self._is_shuffled = is_shuffled
        self.num_rows = len(self._rejected)
        self.num_steps = -(-self.num_rows // rows_per_step)
        tokens = sum(len(example.ids) for example in examples)
        self.share_used = tokens / (2 * self.num_rows * length)
        self._order = lru_cache(maxsize=2)(self._order_of)

    def rows(self, step: int) -> list[int]:
        """Returns the numbers of the pairs of a step, counted from 0 over epochs; B at most."""
        epoch, within = divmod(step, self.num_steps)
        start = within * self.rows_per_step
        chosen: list[int] = self._order(epoch)[start : start + self.rows_per_step].tolist()
        return chosen

    def batch(self, step: int) -> PreferenceBatch:
        """Returns the batch of a step: arrays of the host, [B T] each."""
        chosen = self.rows(step)
        empty: list[list[Example]] = [[]] * (self.rows_per_step - len(chosen))
        return PreferenceBatch(
            *(
                Batch.packed([[answers[i]] for i in chosen] + empty, self.length)
                for answers in (self._chosen, self._rejected)
            )
        )

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._is_shuffled:
            return np.arange(self.num_rows)
        return np.argsort(_draws(self._seed, epoch).random_raw(self.num_rows), kind="stable")


def _draws(seed: int, epoch: int) -> np.random.Philox:
    """Returns a source of raw numbers, which every release of numpy draws alike (NEP 19)."""
    return np.random.Philox(np.random.SeedSequence([seed, epoch]))
