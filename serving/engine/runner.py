"""Runner: turns plans into steps on the devices, and drawn tokens into plain data.

It decides nothing. The engine has one and reads its tokens; with several hosts every follower has
one too, and launches the same plans in the same order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import jax
import numpy as np

from mixtral_jax.axes import PackedDraws
from mixtral_jax.model.adapter import BlockAdapter, LowRank
from mixtral_jax.model.adapter_stack import NO_SLOT
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.step.buckets import Steps
from mixtral_jax.step.draws import Draws, unpack
from mixtral_jax.step.inputs import GroupInputs, StepInputs, mask_words
from mixtral_jax.step.launcher import LaunchedStep, StepLauncher, WalkedStep
from mixtral_jax.step.scores import ScoreInputs
from serving.engine.device import Masks, PutLayer
from serving.engine.expert_load import ExpertLoad
from serving.scheduling.request import Drawn, RowDraws, Scored, TokenScore
from serving.scheduling.step_plan import Chunk, StepPlan


class Runner:
    """Launches the steps of plans. Used by one thread.

    Args:
        model: the parameters; must not be changed afterwards.
        steps: the result of `compile_steps` for the same shapes.
        expert_load: sums up what each step has counted, if the steps count; None where nobody asks.
    """

    def __init__(
        self, model: Transformer, steps: Steps, expert_load: ExpertLoad | None = None
    ) -> None:
        self._steps = steps
        self._expert_load = expert_load
        self._launcher = StepLauncher(model, steps)

    @property
    def num_partitions(self) -> int:
        """Number of plans of a step: one for each sequence group."""
        return self._steps.num_sequence_groups

    def launch(self, plans: Sequence[StepPlan]) -> "RunningStep":
        """Starts one step: a plan for each sequence group, at least one of them with chunks."""
        if any(chunk.targets for plan in plans for chunk in plan.chunks):
            return self.draw(self.walk(plans), None)
        inputs = self._inputs(plans, is_masked=False)
        draws = any(chunk.samples for plan in plans for chunk in plan.chunks)
        launched = self._launcher.launch(inputs, draws=draws)
        return RunningStep(tuple(plans), inputs.num_drawn, launched, self._expert_load)

    def walk(self, plans: Sequence[StepPlan]) -> "WalkedPlans":
        """Starts one step, up to where its rows draw, and the scores of its targets."""
        wanted = _wanted_scores(plans)
        if wanted:
            self._steps.prepare_scores()
        inputs = self._inputs(plans, is_masked=True)
        walked = self._launcher.walk(inputs)
        scores = None
        if wanted:
            scores = LaunchedScores(wanted, self._launcher.score(walked, wanted.blocks()))
        return WalkedPlans(tuple(plans), inputs.num_drawn, walked, scores)

    def _inputs(self, plans: Sequence[StepPlan], *, is_masked: bool) -> StepInputs:
        """The arrays of a step; the pages that it writes are copied before."""
        steps, chunks = self._steps, [chunk for plan in plans for chunk in plan.chunks]
        bucket = steps.bucket(
            max(plan.num_tokens for plan in plans),
            adapted=any(chunk.slot != NO_SLOT for chunk in chunks),
            masked=is_masked,
        )
        inputs = steps.blank(
            bucket,
            max(plan.num_rows for plan in plans),
            with_history=any(chunk.history for chunk in chunks),
            with_biases=any(chunk.forbidden or chunk.sampling.logit_bias for chunk in chunks),
        )
        for group, plan in enumerate(plans):
            write(plan, GroupInputs(inputs, group, steps.sizes.max_sequences))
        self._launcher.copy_pages([plan.copies for plan in plans])
        return inputs

    def draw(self, walked: "WalkedPlans", masks: Masks | None) -> "RunningStep":
        """Lets the rows of a step draw what their masks allow; None for no masks."""
        allowed: np.ndarray | None = None
        if masks is not None and any(rows is not None for rows in masks.allowed):
            words = mask_words(self._launcher.vocab_size)
            allowed = np.full((len(walked.plans) * walked.rows, words), -1, np.int32)
            for group, rows in enumerate(masks.allowed):
                if rows is not None:
                    first = group * walked.rows
                    allowed[first : first + len(rows)] = rows
        launched = self._launcher.draw(walked.step, allowed)
        return RunningStep(walked.plans, walked.rows, launched, self._expert_load, walked.scores)

    def put_layer(self, put: PutLayer) -> None:
        """Writes a layer of an adapter into its slot, for steps that are launched from now on."""
        matrices: Mapping[str, tuple[Any, Any]] = put.matrices
        block = BlockAdapter(**{target: LowRank(*pair) for target, pair in matrices.items()})
        self._launcher.put_layer(put.slot, put.layer, block)

    def is_intact(self) -> bool:
        """Returns False if a step that raised has taken pages of earlier steps with it."""
        return self._launcher.is_intact()

    def reset(self) -> None:
        """Makes new pages; the content of all earlier ones is lost."""
        self._launcher.reset()


@dataclass(frozen=True)
class WalkedPlans:
    """A step that has been through the layers and draws no token yet."""

    plans: tuple[StepPlan, ...]
    rows: int  # of each sequence group that may draw
    step: WalkedStep
    scores: "LaunchedScores | None"


@dataclass(frozen=True)
class LaunchedScores:
    """Scores that the devices compute."""

    wanted: ScoreInputs
    packed: Sequence[PackedDraws]  # of each block


class ScoreRows(Sequence[TokenScore]):
    """The scores of one chunk's targets, as TokenScores where somebody looks at them.

    Args:
        targets: the tokens.
        draws: ranks, logprobs and the likeliest tokens of these rows.
        asked: number of the likeliest tokens of each.
    """

    def __init__(self, targets: Sequence[int], draws: Draws, asked: int) -> None:
        self._targets, self._asked = targets, asked
        # Copies: the rows of a whole step, with 20 tokens each, are not held for long.
        self._draws = Draws(
            draws.tokens.copy(),
            draws.logprobs.copy(),
            draws.top_ids[:, :asked].copy(),
            draws.top_logprobs[:, :asked].copy(),
        )

    @property
    def is_finite(self) -> bool:
        """False if the model's values were not."""
        return bool(np.isfinite(self._draws.logprobs).all())

    def __len__(self) -> int:
        return len(self._targets)

    @overload
    def __getitem__(self, index: int) -> TokenScore: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenScore]: ...
    def __getitem__(self, index: int | slice) -> TokenScore | Sequence[TokenScore]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rank, logprob, top = self._draws.of_row(index, self._asked)
        assert logprob is not None
        token = self._targets[index]
        return TokenScore(token_id=token, logprob=logprob, rank=rank, top_logprobs=top)


@dataclass(frozen=True)
class RunningStep:
    """A step that the devices compute."""

    plans: tuple[StepPlan, ...]
    rows: int  # of each sequence group that may draw
    launched: LaunchedStep
    expert_load: ExpertLoad | None
    scores: LaunchedScores | None = None

    def drawn(self) -> list[list[RowDraws]]:
        """Waits for the step; returns what each chunk of each plan drew, or None for nothing."""
        launched, draws = self.launched, None
        if launched.packed is None:
            jax.block_until_ready(launched.hidden)
        if self.expert_load is None or launched.expert_tokens is None:
            packed = launched.packed
        else:
            packed, counts = jax.device_get((launched.packed, launched.expert_tokens))
            self.expert_load.add(counts)
        if packed is not None:
            draws = unpack(np.asarray(packed))
        scores: list[Draws] = []
        if self.scores is not None:
            scores = self.scores.wanted.read(jax.device_get(self.scores.packed))
        drawn: list[list[RowDraws]] = []
        for group, plan in enumerate(self.plans):
            tokens: list[RowDraws] = []
            first = 0  # of the chunk's scores, among those of its group
            behind = group * self.rows + len(plan.chunks)  # the rows of guesses
            for row, chunk in enumerate(plan.chunks, start=group * self.rows):
                own: Drawn | None = None
                if chunk.samples:
                    assert draws is not None, "a step in which a row samples has draws"
                    own = _drawn(draws, row, chunk)
                if chunk.guesses:
                    assert draws is not None and own is not None, "rows with guesses draw"
                    tokens.append(_checked(draws, own, behind, chunk))
                    behind += chunk.guesses
                    continue
                if not chunk.targets:
                    tokens.append(own)
                    continue
                rows = slice(first, first := first + len(chunk.targets))
                of_chunk = Draws(*(array[rows] for array in scores[group]))
                read = ScoreRows(chunk.targets, of_chunk, chunk.asked)
                tokens.append(Scored(own, read, read.is_finite))
            drawn.append(tokens)
        return drawn


def _drawn(draws: Draws, row: int, chunk: Chunk) -> Drawn:
    """Returns what a row of a chunk drew."""
    token, logprob, top = draws.of_row(row, chunk.sampling.top_logprobs)
    return Drawn(token_id=token, logprob=logprob, top_logprobs=top)


def _checked(draws: Draws, own: Drawn, first: int, chunk: Chunk) -> list[Drawn]:
    """Returns what a chunk drew, up to and with the first token that differs from its guess.

    Args:
        draws: of the step.
        own: the token that was drawn in the chunk's own row.
        first: the first of the rows that draw behind its guesses.
        chunk: which has guesses.
    """
    drawn = [own]
    for number, guess in enumerate(chunk.token_ids[-chunk.guesses :]):
        if drawn[-1].token_id != guess:
            break
        drawn[-1].accepted = True
        drawn.append(_drawn(draws, first + number, chunk))
    own.rejected = chunk.guesses + 1 - len(drawn)  # the answer may end before the others
    return drawn


def _wanted_scores(plans: Sequence[StepPlan]) -> ScoreInputs:
    """Returns the places of a step whose scores are wanted, in the order of its chunks."""
    wanted = ScoreInputs(len(plans))
    for group, plan in enumerate(plans):
        place = 0  # of the chunk, in its group's flat row
        for chunk in plan.chunks:
            first = place + chunk.target_start - 1 - chunk.start
            wanted.add(group, first, chunk.targets, chunk.asked)
            place += len(chunk.token_ids)
    return wanted


def write(plan: StepPlan, inputs: GroupInputs) -> None:
    """Writes the plan of one sequence group into the arrays of a step."""
    behind = len(plan.chunks)  # rows of guesses are behind those of chunks
    for chunk in plan.chunks:
        row = inputs.add(chunk.token_ids, chunk.start, chunk.pages, chunk.follows, chunk.slot)
        if not chunk.samples:
            continue
        known = len(chunk.token_ids) - chunk.guesses
        history: Sequence[int] | np.ndarray = chunk.history
        if chunk.guesses and chunk.history:
            history = np.asarray(chunk.history + chunk.token_ids[known - 1 :], np.int32)
        for number in range(chunk.guesses + 1):
            at = behind + number - 1 if number else row
            if chunk.guesses:
                inputs.draw_after(row, known - 1 + number, at)
            inputs.sample(
                at,
                chunk.sampling,
                seed=chunk.seed,
                position=chunk.start + known + number,
                prompt_length=chunk.prompt_length,
                history=history[: len(chunk.history) + number],
                forbidden=chunk.forbidden,
            )
        behind += chunk.guesses
