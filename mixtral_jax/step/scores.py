"""Scores: logprobs of given tokens, such as a prompt's own, at places of a step.

A step computes x for all its tokens and logits for the rows that draw. Scores need logits at many
places more, so they are computed in blocks of SCORE_ROWS places of each sequence group: of a
vocabulary of 128,000 ids a block is 32 MB of float32, however long the step is.

    x [T D] ──pick──> rows of a block [R D] ──score──> rank, logprob, likeliest tokens [R 42]

The programs are compiled when they are first needed, or by `ScorePrograms.prepare` in a thread
beside the steps. Steps without scores run what they would run if there were none.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from mixtral_jax.axes import (
    DrawnHidden,
    FlatHidden,
    FlatLogits,
    HostPackedDraws,
    PackedDraws,
    Rows,
)
from mixtral_jax.step.draws import Draws, pack, unpack
from mixtral_jax.step.functions import own_group
from mixtral_jax.step.inputs import host_array
from mixtral_jax.step.sampling import token_logprobs
from mixtral_jax.step.split_model import REPLICATED, Arrays, SplitModel

SCORE_ROWS = 64  # places of a block, of each sequence group


class ScoreBlock(NamedTuple):
    """Places whose scores are computed together, all groups one behind the other; i32."""

    places: Rows  # of the token before each target, in its group's flat row
    targets: Rows  # ids whose logprobs are asked for
    asked: Rows  # number of the likeliest tokens beside each, up to 20


class ScoreInputs:
    """Gathers the places of one step whose scores are wanted, and reads these.

    Args:
        num_groups: sequence groups of the step.
    """

    def __init__(self, num_groups: int) -> None:
        self._rows: list[list[tuple[int, int, int]]] = [[] for _ in range(num_groups)]

    def __bool__(self) -> bool:
        return any(self._rows)

    def add(self, group: int, place: int, targets: Sequence[int], asked: int) -> None:
        """Adds targets that follow the tokens at `place`, `place + 1` ... of a group's flat row.

        `asked` is the number of the likeliest tokens that are wanted beside each.
        """
        self._rows[group] += ((place + i, target, asked) for i, target in enumerate(targets))

    def blocks(self) -> list[ScoreBlock]:
        """Returns what is wanted, in blocks; places that are not filled in are of no use."""
        longest = max(map(len, self._rows))
        blocks = []
        for start in range(0, longest, SCORE_ROWS):
            arrays = host_array((3, len(self._rows), SCORE_ROWS), 0)
            for group, rows in enumerate(self._rows):
                if wanted := rows[start : start + SCORE_ROWS]:
                    arrays[:, group, : len(wanted)] = np.transpose(wanted)
            blocks.append(ScoreBlock(*arrays.reshape(3, -1)))
        return blocks

    def read(self, packed: Sequence[HostPackedDraws]) -> list[Draws]:
        """Returns the scores of each group, in the order of `add`; tokens are ranks, from 1."""
        groups = np.stack(packed).reshape(len(packed), len(self._rows), SCORE_ROWS, -1)
        rows = groups.swapaxes(0, 1).reshape(len(self._rows), -1, groups.shape[-1])
        return [unpack(own[: len(wanted)]) for own, wanted in zip(rows, self._rows, strict=True)]


class ScorePrograms:
    """The programs that score. Thread-safe.

    Args:
        split: the model; may be abstract.
        buckets: sizes of steps, in tokens of one sequence group.
    """

    def __init__(self, split: SplitModel, buckets: Sequence[int]) -> None:
        self._split = split
        self._buckets = tuple(buckets)
        self._lock = threading.Lock()
        self._picks: dict[int, Compiled] = {}
        self._score: Compiled | None = None

    @property
    def compiled(self) -> list[Compiled]:
        """The programs that are compiled by now."""
        score = self._score
        return [*self._picks.copy().values(), *([] if score is None else [score])]

    def prepare(self) -> None:
        """Compiles all of them, unless that has been done; whoever comes meanwhile waits."""
        with self._lock:
            if self._score is None:
                self._picks = {size: self._lowered_pick(size).compile() for size in self._buckets}
                self._score = self._lowered_score().compile()

    def pick(self, bucket: int) -> Compiled:
        """Returns the program (x [T D], places [R]) -> x [R D] of steps of that bucket."""
        self.prepare()
        return self._picks[bucket]

    @property
    def score(self) -> Compiled:
        """The program (rest, x [R D], targets [R], asked [R]) -> scores, packed as draws are."""
        self.prepare()
        assert self._score is not None
        return self._score

    def _lowered_pick(self, bucket: int) -> jax.stages.Lowered:
        split = self._split
        layout, groups = split.layout, split.num_sequence_groups

        def pick(x: FlatHidden, places: Rows) -> DrawnHidden:
            x = x[own_group(places, layout)]
            return x if layout is None else layout.gather_dimension(x, "B", 0)

        program = split.jit(pick, (split.spec("B"), REPLICATED), REPLICATED)
        x = jax.ShapeDtypeStruct((groups * bucket, split.config.hidden_size), split.dtype)
        places = jax.ShapeDtypeStruct((groups * SCORE_ROWS,), jnp.int32)
        lowered: jax.stages.Lowered = program.lower(x, places)
        return lowered

    def _lowered_score(self) -> jax.stages.Lowered:
        split = self._split
        rows = split.num_sequence_groups * SCORE_ROWS

        def score(rest: Arrays, x: DrawnHidden, targets: Rows, asked: Rows) -> PackedDraws:
            model = split.rest_structure.module(rest)
            return scored(model.paged_logits(model.norm.paged(x)), targets, asked)

        specs = (split.rest_structure.specs, REPLICATED, REPLICATED, REPLICATED)
        program = split.jit(score, specs, REPLICATED)
        x = jax.ShapeDtypeStruct((rows, split.config.hidden_size), split.dtype)
        numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)
        lowered: jax.stages.Lowered = program.lower(split.rest, x, numbers, numbers)
        return lowered


def scored(logits: FlatLogits, targets: Rows, asked: Rows) -> PackedDraws:
    """Scores a target of each row of logits [R V] f32.

    A rank is 1 for the likeliest token, and is that of vLLM: equally likely ones share the first of
    their ranks.

    Args:
        logits: the model's own.
        targets: ids [R] i32.
        asked: number of the likeliest tokens that are wanted of each row [R] i32.

    Returns:
        Ranks, logprobs, and the likeliest tokens with theirs, packed as `pack` does it.
    """
    own = jnp.take_along_axis(logits, targets[:, None], axis=1)
    ranks = 1 + jnp.sum(logits > own, axis=-1, dtype=jnp.int32)
    return pack(ranks, *token_logprobs(logits, targets, asked))
