"""Progress of one choice of a request, and of its caller, as the scheduler keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from serving.scheduling.guesses.guesser import Guesser
from serving.scheduling.pages import PageTable
from serving.scheduling.request import Drawn, Event, FinishReason, Request, TokenScore
from serving.scheduling.step_plan import NO_SLOT, Chunk

# Tokens that a sequence draws at least before it gives way to a caller that was served fewer. If it
# had many already, more, because it may have to compute them all again.
SLICE = 32
_SLICE_SHARE = 4  # of so many tokens that it had, one

NOTHING: frozenset[int] = frozenset()

_RESERVE = 16  # tokens of an answer that count as its caller's as soon as it has a row


@dataclass(eq=False)
class Turn:
    """Place of one caller in the turns (queue.py): what it has had and what it holds."""

    caller: str
    served: int = 0  # tokens computed for it, of prompts and answers, or what counts as that
    reserved: int = 0  # tokens that its running sequences are about to compute
    rows: int = 0  # number of its running sequences
    waiting: int = 0  # number of its choices in the queue

    @property
    def level(self) -> int:
        """Number of tokens by which its turn is decided; the fewest come first."""
        return self.served + self.reserved


@dataclass(kw_only=True, eq=False)
class SequenceState:
    """One choice of a request: its tokens, its pages and its progress."""

    request: Request
    turn: Turn  # of its caller
    choice: int
    arrival: int
    seed: int  # of choice 0
    limit: int  # number of tokens, prompt and answer, that ends it
    tokens: list[int]  # prompt and committed tokens of the answer
    table: PageTable
    running: bool = False
    was_seated: bool = False  # since then its prompt is in the scheduler's figures
    seated: float = 0.0  # time at which it, or the choice that it was forked from, got pages
    steps: int = 0  # number of committed steps that computed for it
    cached: int = 0  # tokens of its prompt that the prefix cache had
    computed: int = 0  # tokens of its prompt that events have told of
    known_at_seat: int = 0  # number of its tokens when it got its row
    is_due: bool = False  # it has its row because it was BATCH's turn
    spare: int | None = None  # number of pages that were too few for it when it last asked
    planned: int = 0  # while running: tokens that are computed or are in the open plans
    undrawn: int = 0  # tokens that the open plans will draw
    row: int = 0  # chunk of the last plan that drew for it
    guesser: Guesser | None = None  # of its next tokens
    scored: int = (
        1  # tokens of its prompt, from the first one, whose logprobs were sent or are none
    )

    @property
    def age(self) -> tuple[int, int]:
        """Place in the order of service; the older a sequence, the smaller."""
        return self.arrival, self.choice

    @property
    def remaining(self) -> int:
        """Number of tokens to compute, of those that exist once the open plans have run."""
        length = len(self.tokens) + self.undrawn
        if length >= self.limit:
            if self.request.max_tokens:
                return 0
            length -= 1  # the last token of a prompt has nothing behind it
        # With guesses in an open plan, more is planned than is sure to exist.
        return length - self.planned if length > self.planned else 0

    @property
    def answers(self) -> bool:
        """True if what it has to compute are tokens of its answer that came since it has a row."""
        return self.planned >= self.known_at_seat or self.remaining == 1

    @property
    def reserve(self) -> int:
        """Number of tokens, while running, that are counted as its caller's before they are."""
        length = len(self.tokens)
        return length - self.planned + min(_RESERVE, self.limit - length)

    @property
    def had_slice(self) -> bool:
        """True if it drew enough tokens since it got its row to lose it to another caller."""
        drawn = len(self.tokens) - self.known_at_seat
        return drawn >= max(SLICE, self.known_at_seat // _SLICE_SHARE)

    @property
    def draw_seed(self) -> int:
        """Seed by which its tokens are drawn."""
        return (self.seed + self.choice) & 0x7FFFFFFF

    @property
    def choices(self) -> range:
        """Choices that it represents: choice 0 all of them until its first token is known."""
        undivided = self.choice == 0 and len(self.tokens) == len(self.request.prompt_ids)
        return range(self.request.n) if undivided else range(self.choice, self.choice + 1)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Reason for which its last token ends it, or None."""
        if self.tokens[-1] in self.request.eos_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.limit else None

    @property
    def is_scored(self) -> bool:
        """True if all logprobs of its prompt that were asked for have been sent."""
        return self.request.prompt_logprobs is None or self.scored > self.request.num_scored

    @property
    def has_open_guesses(self) -> bool:
        """True while a plan with guesses of it is open."""
        return self.planned > len(self.tokens) + self.undrawn - 1

    @property
    def may_be_guessed(self) -> bool:
        """True if what is drawn after several guesses depends on their tokens alone."""
        num_drawn = len(self.tokens) - len(self.request.prompt_ids)
        has_begun = num_drawn > max(0, self.request.min_tokens - 1)
        has_masks = self.request.form is not None or bool(self.request.allowed_ids)
        return has_begun and not has_masks

    def advance(self, size: int, row: int, guesses: tuple[int, ...] = ()) -> Chunk:
        """Returns the chunk of its next `size` tokens, which count as planned from now on.

        `row` is the index that the chunk will have in its plan. The last of these tokens are from
        `guesses`, as many as fit; all tokens before them must be known then.
        """
        request = self.request
        sampling, prompt_length = request.sampling, len(request.prompt_ids)
        if guesses:
            guesses = guesses[: size - 1]
        samples = size - len(guesses) == self.remaining and request.max_tokens > 0
        start, end = self.planned, self.planned + size
        drawn = end - len(guesses)  # position of the first token that is drawn
        follows = self.row if self.undrawn else None
        too_early_to_end = samples and drawn - prompt_length < request.min_tokens
        target_start = start + 1
        targets: tuple[int, ...] = ()
        if not self.is_scored:
            target_start = max(start + 1, self.scored)
            target_end = min(end, request.num_scored) + 1
            targets = tuple(self.tokens[target_start:target_end])
        self.planned = end
        self.turn.served += size
        if samples:
            self.undrawn, self.row = self.undrawn + 1, row
        return Chunk(
            request_id=request.id,
            choice=self.choice,
            token_ids=(*self.tokens[start:end], *guesses) if follows is None else (0,),
            start=start,
            pages=self.table.covering(end),
            follows=follows,
            samples=samples,
            sampling=sampling,
            seed=self.draw_seed,
            prompt_length=prompt_length,
            history=tuple(self.tokens[: drawn - 1]) if samples and sampling.has_penalties else (),
            forbidden=request.eos_ids if too_early_to_end else NOTHING,
            guesses=len(guesses),
            slot=NO_SLOT if request.seat is None else request.seat.slot,
            targets=targets,
            target_start=target_start,
            asked=request.prompt_logprobs or 0,
        )

    def retreat(self, chunk: Chunk) -> None:
        """Takes back the last chunk that `advance` returned."""
        self.planned = chunk.start
        self.turn.served -= len(chunk.token_ids)
        if chunk.samples and chunk.end >= len(self.tokens):  # else its token was forced meanwhile
            self.undrawn -= 1
        if chunk.follows is not None:
            self.row = chunk.follows

    def restarted(self, table: PageTable) -> "SequenceState":
        """Returns its state in the queue, with all its tokens and an empty table."""
        return replace(
            self,
            table=table,
            running=False,
            is_due=False,
            spare=None,
            planned=0,
            undrawn=0,
            row=0,
        )

    def rewound(self) -> "SequenceState":
        """Returns its state with only its last token to compute, and none in open plans."""
        return replace(self, planned=len(self.tokens) - 1, undrawn=0, row=0)

    def event(
        self,
        drawn: Drawn | None = None,
        reason: FinishReason | None = None,
        scores: Sequence[TokenScore] = (),
    ) -> Event:
        """Returns the event of a token, or with none that a part of the prompt was computed."""
        return Event(
            request_id=self.request.id,
            choice=self.choice,
            drawn=drawn,
            finish_reason=reason,
            computed=self.computed,
            cached=self.cached,
            seated=self.seated,
            steps=self.steps,
            prompt_logprobs=scores,
        )
