"""DraftModel: a second, smaller model that guesses the next tokens of answers.

It has weights, pages and programs of its own. A draft is

    a step    of the tokens that it lacks of each answer: mostly those that came since its last
              draft, of a new answer the prompt, in pieces; behind the last of them it draws
    a run     of steps in which each answer computes the token that it drew in the step before

and the host reads what was drawn when all of it is computed. What a draft wrote behind the known
tokens stays where the guesses were right, and is written over where not.

It draws by the temperature, the seed and the places of the answer itself, so that the noise of a
draw is the same in both models: where they nearly agree they mostly draw the same token, also at a
high temperature. Its penalties look back at all known tokens and the last guess, not at those
between.

Its pages are a pool of its own (pages.py), in which prefixes are found as in the model's. Where
they run out, the answers that were not guessed for the longest time lose theirs. A draft that fails
costs guesses and no answer; when several in a row have failed, there are no more.
"""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.inputs import GroupInputs
from mixtral_jax.step.launcher import LaunchedRun, LaunchedStep, StepLauncher
from serving.scheduling.guesses.guesser import learnt_chance
from serving.scheduling.guesses.worth import MOST_GUESSES, Guesses, RoundTimes
from serving.scheduling.pages import PagePool, PageTable
from serving.scheduling.sequence import SequenceState
from serving.scheduling.step_cost import LearntCosts, StepSize
from serving.scheduling.step_plan import Limits

MOST_RUN_STEPS = MOST_GUESSES - 1  # the first guesses come with the step before the run

_log = logging.getLogger(__name__)
_FIRST_CHANCE = 0.7
_RECOVERY = 0.02  # with each token that was not guessed, a chance below the first one goes back
_MOST_FAILURES = 3  # in a row
_LEAST_MEASURED = 3  # drafts, of which the first one takes longer than others
_STALE = 200  # times that a plan asks for them without guesses; then they are measured again


@dataclass(eq=False)
class _Progress:
    """Progress of the draft model in one answer."""

    table: PageTable
    sampling: SamplingParams
    chance: float = _FIRST_CHANCE
    known: int = 0  # tokens of the answer, prompt included, when it was last looked at
    computed: int = 0  # tokens whose keys and values are in the pages
    guesses: tuple[int, ...] = ()  # of the places from `known` on
    last_draft: int = 0  # number of the last draft that it was in
    has_begun: bool = False  # prefixes were looked for


@dataclass(eq=False)
class _Piece:
    """Tokens of one answer in the first step of a draft."""

    sequence: SequenceState
    progress: _Progress
    start: int
    end: int
    count: int  # of guesses behind `end`
    row: int = 0
    tokens: list[int] = field(default_factory=list)  # that were guessed

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages up to the last token that is computed."""
        return self.progress.table.covering(self.end + max(0, self.count - 1))


class DraftModel:
    """Guesses the tokens of answers; a `Drafter`. Used by one thread.

    Args:
        launcher: of the draft model, on one sequence group; compiled with runs of `MOST_RUN_STEPS`.
        limits: sizes of its cache and of its steps.
    """

    def __init__(self, launcher: StepLauncher, limits: Limits) -> None:
        self._launcher, self._limits = launcher, limits
        self._pool = PagePool(limits.num_pages, limits.page_size, limits.prefix_reuse)
        self._answers: dict[SequenceState, _Progress] = {}
        self._costs = LearntCosts()
        self._context = 0.0  # positions that an answer sees, in the last draft
        self._failures = 0
        self._measured = 0  # drafts
        self._unused = 0  # times that its times were asked for since the last of them
        self.num_drafts = 0

    @property
    def num_free_pages(self) -> int:
        """Number of pages that no answer holds."""
        return self._pool.num_free

    def chance(self, sequence: SequenceState) -> float:
        """Returns the chance that the next guess is right; see `Drafter`."""
        return self._progress(sequence).chance

    def room(self, sequence: SequenceState) -> int:
        """Returns the number of guesses that its context has room for; see `Drafter`."""
        if self._failures >= _MOST_FAILURES:
            return 0
        return max(0, self._limits.max_context - len(sequence.tokens) + 1)

    def is_behind(self, sequence: SequenceState) -> bool:
        """Returns True if it lacks more tokens than a step holds; see `Drafter`."""
        progress = self._begun(sequence)
        return len(sequence.tokens) - progress.computed > self._limits.max_step_tokens

    def round_times(self) -> RoundTimes | None:
        """Returns its times; see `Drafter`."""
        costs = self._costs.costs if self._measured >= _LEAST_MEASURED else None
        self._unused += 1
        # Times that were measured under another load may be wrong, and would stay so.
        if costs is None or self._unused > _STALE:
            return None

        def seconds(answers: int) -> float:
            rows = min(answers, self._limits.max_sequences)
            bucket = self._launcher.steps.run_bucket(rows)
            return costs.seconds(StepSize(bucket, round(rows * self._context)))

        return seconds

    def draft(
        self,
        wanted: Mapping[SequenceState, int],
        behind: Collection[SequenceState],
        *,
        is_alone: bool,
    ) -> Guesses:
        """Returns guesses of the next tokens; see `Drafter`."""
        self._forget_ended()
        self.num_drafts += 1
        try:
            pieces = self._pieces([*wanted.items(), *((sequence, 0) for sequence in behind)])
            if pieces:
                self._compute(pieces, is_alone=is_alone)
        except Exception:
            self._failures += 1
            off = self._failures >= _MOST_FAILURES
            _log.exception(
                "the draft model failed; %s",
                "there are no more guesses" if off else "answers go on without these guesses",
            )
            self._start_over()
            return {}
        self._failures = 0
        guesses: Guesses = {}
        for piece in pieces:
            piece.progress.guesses = tuple(piece.tokens)
            if piece.tokens:
                guesses[piece.sequence] = piece.progress.guesses
        return guesses

    def reset(self) -> None:
        """Makes new pages, and forgets what the old ones held."""
        for progress in self._answers.values():
            progress.table.release()
        self._answers.clear()
        self._pool.forget()
        self._launcher.reset()

    def _start_over(self) -> None:
        """Makes new pages after a failure; if that fails too, there are no more guesses."""
        try:
            self.reset()
        except Exception:
            self._failures = _MOST_FAILURES
            _log.exception("the draft model gets no new pages; there are no more guesses")

    def _progress(self, sequence: SequenceState) -> _Progress:
        """Returns what it has of an answer, whose new tokens are compared with the guesses."""
        progress = self._answers.get(sequence)
        if progress is None:
            self._forget_ended()
            table = PageTable(self._pool, sequence.request.prefix_salt)
            progress = _Progress(table, replace(sequence.request.sampling, top_logprobs=None))
            progress.known = len(sequence.tokens)
            self._answers[sequence] = progress
        known, tokens = progress.known, sequence.tokens
        guesses, new = progress.guesses, tokens[known:]
        if new and guesses:
            progress.chance = learnt_chance(progress.chance, guesses, new)
            pairs = enumerate(zip(guesses, new, strict=False))
            right = next((i for i, (guess, token) in pairs if guess != token), len(new))
            progress.computed = min(progress.computed, known + right)
        elif progress.chance < _FIRST_CHANCE:
            progress.chance += len(new) * _RECOVERY * (_FIRST_CHANCE - progress.chance)
        if new:
            progress.known, progress.guesses = len(tokens), ()
        # Also without new tokens: a window slides over the pages before the next draft.
        progress.table.register(tokens, min(progress.computed, len(tokens)))
        return progress

    def _begun(self, sequence: SequenceState) -> _Progress:
        """Returns what it has of an answer, with the pages of its prefix that are found."""
        progress = self._progress(sequence)
        if not progress.has_begun:
            progress.computed = progress.table.find(sequence.tokens)
            progress.has_begun = True
        return progress

    def _pieces(self, wanted: Sequence[tuple[SequenceState, int]]) -> list[_Piece]:
        """Returns what the first step computes, those of one token first, with pages for all."""
        pieces: list[_Piece] = []
        budget = self._limits.max_step_tokens
        for sequence, count in wanted:
            if not budget or len(pieces) == self._limits.max_sequences:
                break
            progress, length = self._begun(sequence), len(sequence.tokens)
            progress.last_draft = self.num_drafts
            start = min(progress.computed, length - 1)
            end = min(length, start + budget)
            if end < length:
                count = 0  # a draw follows the last token
            if self._claim(progress, start, end + max(0, count - 1)):
                pieces.append(_Piece(sequence, progress, start, end, count))
                budget -= end - start
        pieces.sort(key=lambda piece: piece.end - piece.start > 1)
        return pieces

    def _claim(self, progress: _Progress, start: int, end: int) -> bool:
        """Takes pages for the tokens before `end`; returns False where there are too few."""
        table, pool = progress.table, self._pool
        table.slide(self._limits.visible(start))
        if table.lacking(end) > pool.num_free:
            begun = [p for p in self._answers.values() if p.has_begun]
            idle = [other for other in begun if other.last_draft < self.num_drafts]
            freed = pool.num_freed((other.table for other in idle), ())
            if table.lacking(end) > pool.num_free + freed:
                progress.chance = 0.0  # it is not asked for again at once
                return False
            idle.sort(key=lambda other: -other.last_draft)
            while table.lacking(end) > pool.num_free:
                other = idle.pop()
                other.table.release()
                other.computed, other.has_begun, other.guesses = 0, False, ()
        table.grow(end)
        return True

    def _compute(self, pieces: Sequence[_Piece], *, is_alone: bool) -> None:
        """Computes a draft, and waits for it."""
        runs = sorted((p for p in pieces if p.count > 1), key=lambda piece: -piece.count)
        longest = runs[0].count if runs else 1
        active = [sum(piece.count > i for piece in runs) for i in range(1, longest)]
        began = time.perf_counter()
        launched = self._launch(pieces)
        run = self._launch_run(runs, active) if runs else None
        first, later = np.zeros(0, np.int32), np.zeros((0, 0), np.int32)
        if launched.packed is None:
            jax.block_until_ready(launched.hidden)
        else:
            first = np.asarray(launched.packed)[:, 0]
        if run is not None:
            later = run.read()
        places = {piece: row for row, piece in enumerate(runs)}
        for piece in pieces:
            if piece.count:
                drawn = [first[piece.row]]
                if piece in places:
                    drawn += [*later[: piece.count - 1, places[piece]]]
                piece.tokens = _up_to_negative(drawn)
            piece.progress.computed = piece.end + max(0, len(piece.tokens) - 1)
        # Behind a step that is under way it seems to take longer than it does, which is better than
        # nothing.
        if is_alone or self._measured < _LEAST_MEASURED or self._unused > _STALE:
            self._learn(pieces, runs, active, time.perf_counter() - began)

    def _launch(self, pieces: Sequence[_Piece]) -> LaunchedStep:
        """Starts the first step of a draft."""
        steps = self._launcher.steps
        inputs = steps.blank(
            steps.bucket(sum(piece.end - piece.start for piece in pieces)),
            len(pieces),
            with_history=_have_penalties(pieces),
            with_biases=_are_biased(pieces),
        )
        writer = GroupInputs(inputs, 0, self._limits.max_sequences)
        for piece in pieces:
            tokens = piece.sequence.tokens[piece.start : piece.end]
            piece.row = writer.add(tokens, piece.start, piece.pages)
            if piece.count:
                _sample(writer, piece.row, piece, piece.end)
        return self._launcher.launch(inputs, draws=any(piece.count for piece in pieces))

    def _launch_run(self, runs: Sequence[_Piece], active: Sequence[int]) -> LaunchedRun:
        """Starts the steps behind the first one."""
        steps = self._launcher.steps
        bucket = steps.run_bucket(len(runs))
        inputs = steps.blank(
            bucket,
            len(runs),
            with_history=_have_penalties(runs),
            with_biases=_are_biased(runs),
        )
        writer = GroupInputs(inputs, 0, self._limits.max_sequences)
        for piece in runs:
            row = writer.add((0,), piece.end, piece.pages, piece.row)
            _sample(writer, row, piece, piece.end + 1)
        return self._launcher.run(inputs, active)

    def _learn(
        self,
        pieces: Sequence[_Piece],
        runs: Sequence[_Piece],
        active: Sequence[int],
        seconds: float,
    ) -> None:
        """Learns the costs of a step from the mean of all steps of a draft.

        Those of a draft with a piece of a prompt teach nothing: the times of its parts are not
        known, because a CPU begins with the run while the host waits for the first step.
        """
        steps, window = self._launcher.steps, self._limits.window
        chunks = [(piece.start, piece.end - piece.start) for piece in pieces]
        if any(length > MOST_GUESSES for _, length in chunks):
            return
        size = StepSize().plus(chunks, window)
        # A handful of tokens costs what as many answers cost.
        tokens, context = steps.bucket(size.tokens), size.context + size.pairs
        for number, count in enumerate(active):
            tokens += steps.run_bucket(len(runs))
            seen = [(piece.end + number, 1) for piece in runs[:count]]
            context += StepSize().plus(seen, window).context
        parts = 1 + len(active)
        self._context = context / (len(pieces) + sum(active))
        self._costs.learn(StepSize(round(tokens / parts), round(context / parts)), seconds / parts)
        self._measured += 1
        self._unused = 0

    def _forget_ended(self) -> None:
        """Gives back the pages of answers that have ended or lost their rows."""
        ended = [sequence for sequence in self._answers if not sequence.running]
        for sequence in ended:
            self._answers.pop(sequence).table.release()


def _have_penalties(pieces: Sequence[_Piece]) -> bool:
    return any(piece.count and piece.progress.sampling.has_penalties for piece in pieces)


def _are_biased(pieces: Sequence[_Piece]) -> bool:
    return any(piece.count and piece.progress.sampling.logit_bias for piece in pieces)


def _sample(writer: GroupInputs, row: int, piece: _Piece, position: int) -> None:
    """Has a row draw the token at a position of its answer."""
    sampling = piece.progress.sampling
    writer.sample(
        row,
        sampling,
        seed=piece.sequence.draw_seed,
        position=position,
        prompt_length=len(piece.sequence.request.prompt_ids),
        history=piece.sequence.tokens[: position - 1] if sampling.has_penalties else (),
    )


def _up_to_negative(tokens: Sequence[int]) -> list[int]:
    """Returns the tokens before the first NO_TOKEN."""
    good = [int(token) for token in tokens]
    return good[: next((i for i, token in enumerate(good) if token < 0), len(good))]
