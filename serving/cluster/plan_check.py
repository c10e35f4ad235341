"""Bounds of the plans that a follower is told to launch.

A plan becomes indices into the cache and the vocabulary on the devices, which nothing there checks.
A leader of this version never breaks a bound; whoever does ends the follower before its devices are
asked.
"""

from collections.abc import Iterable

from serving.cluster.leader import GroupError
from serving.engine.device import PutLayer
from serving.proto import group_pb2 as pb
from serving.scheduling.step_plan import NO_SLOT, Chunk, Limits, StepPlan


class PlanCheck:
    """Checks the plans of each step in turn.

    Args:
        limits: Sizes of each partition.
        num_partitions: Number of plans of a step.
        vocab_size: Number of token ids.
        num_layers: Layers of the model.
        num_slots: Adapters that rows of one step may use; 0 without adapters.
    """

    def __init__(
        self,
        limits: Limits,
        num_partitions: int,
        vocab_size: int,
        num_layers: int = 0,
        num_slots: int = 0,
    ) -> None:
        self._limits, self._vocab_size = limits, vocab_size
        self._num_layers, self._num_slots = num_layers, num_slots
        self._num_before = [0] * num_partitions  # of each partition: chunks of its plan before

    def check(self, plans: tuple[StepPlan, ...]) -> None:
        """Raises GroupError, which names the number, if one of the plans breaks a bound."""
        if len(plans) != len(self._num_before):
            raise GroupError(
                f"process 0 sent {len(plans)} plans for {len(self._num_before)} partitions; update "
                "all processes to one version"
            )
        limits = self._limits
        for i, plan in enumerate(plans):
            _at_most("number of chunks and guesses", plan.num_rows, limits.max_sequences)
            _at_most("number of tokens", plan.num_tokens, limits.max_step_tokens)
            for pair in plan.copies:
                _below("page", pair, limits.num_pages)
            for chunk in plan.chunks:
                self._check_chunk(chunk, self._num_before[i])
            self._num_before[i] = len(plan.chunks)

    def check_masks(self, masks: pb.Masks, plans: tuple[StepPlan, ...]) -> None:
        """Raises GroupError, which names the number, if masks do not fit the plans of a step."""
        if len(masks.plans) != len(plans):
            raise GroupError(
                f"process 0 sent masks of {len(masks.plans)} plans for {len(plans)}; update all "
                "processes to one version"
            )
        row_bytes = 4 * -(-self._vocab_size // 32)
        for plan, rows in zip(plans, masks.plans, strict=True):
            _below("chunk with a mask", rows.chunks, len(plan.chunks))
            if len(rows.words) != row_bytes * len(rows.chunks):
                raise GroupError(
                    f"process 0 sent masks of {len(rows.words)} bytes for {len(rows.chunks)} rows "
                    f"of {row_bytes}; update all processes to one version"
                )

    def check_layer(self, put: PutLayer) -> None:
        """Raises GroupError, which names the number, if a part of an adapter has no place."""
        _below("slot of an adapter", (put.slot,), self._num_slots)
        _below("layer of an adapter", (put.layer,), self._num_layers)

    def _check_chunk(self, chunk: Chunk, num_before: int) -> None:
        limits = self._limits
        _at_most("chunk with an end", chunk.end, limits.max_context)
        num_pages = -(-chunk.end // limits.page_size)
        if not chunk.token_ids or len(chunk.pages) != num_pages:
            raise GroupError(
                f"process 0 sent a chunk of {len(chunk.token_ids)} tokens with "
                f"{len(chunk.pages)} pages that ends at {chunk.end}; update all processes to one "
                "version"
            )
        _below("number of guesses", (chunk.guesses,), len(chunk.token_ids))
        if chunk.guesses and (not chunk.samples or chunk.follows is not None or chunk.targets):
            raise GroupError(
                "process 0 sent guesses behind a token that is not known; update all processes to "
                "one version"
            )
        _below("page", chunk.pages, limits.num_pages)
        _at_most("history of a chunk", len(chunk.history), limits.max_context)
        biased = chunk.sampling.logit_bias
        for ids in (chunk.token_ids, chunk.history, chunk.forbidden, biased, chunk.targets):
            _below("token id", ids, self._vocab_size)
        if chunk.targets:
            # Each follows a token of the chunk.
            first, last = chunk.target_start - chunk.start - 1, len(chunk.token_ids)
            _below("target", (first, first + len(chunk.targets) - 1), last)
        if chunk.slot != NO_SLOT:
            _below("slot of an adapter", (chunk.slot,), self._num_slots)
        if chunk.follows is not None:
            _below("chunk that follows one with the index", (chunk.follows,), num_before)


def _below(name: str, numbers: Iterable[int], bound: int) -> None:
    for number in numbers:
        if not 0 <= number < bound:
            _refuse(name, number, bound - 1)


def _at_most(name: str, number: int, bound: int) -> None:
    if number > bound:
        _refuse(name, number, bound)


def _refuse(name: str, number: int, bound: int) -> None:
    raise GroupError(
        f"process 0 sent a {name} of {number}, where {bound} is the most; update all processes to "
        "one version"
    )
