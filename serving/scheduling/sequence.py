"""Progress of one choice of a request, as the scheduler keeps it."""

from dataclasses import dataclass

from serving.scheduling.pages import PageTable
from serving.scheduling.request import FinishReason, Request
from serving.scheduling.step_plan import Chunk


@dataclass(kw_only=True, eq=False)
class SequenceState:
    """One choice of a request: its tokens, its pages and its progress."""

    request: Request
    choice: int
    arrival: int
    seed: int  # of choice 0
    limit: int  # number of tokens, prompt and answer, that ends it
    tokens: list[int]  # prompt and committed tokens of the answer
    table: PageTable
    running: bool = False
    counted: bool = False  # its prompt is in the scheduler's figures
    seated: float = 0.0  # time at which it, or the choice that it was forked from, got pages
    steps: int = 0  # number of committed steps that computed for it
    planned: int = 0  # while running: tokens that are computed or are in the open plans
    undrawn: int = 0  # tokens that the open plans will draw
    row: int = 0  # chunk of the last plan that drew for it

    @property
    def age(self) -> tuple[int, int]:
        """Place in the order of service; the older a sequence, the smaller."""
        return self.arrival, self.choice

    @property
    def remaining(self) -> int:
        """Number of tokens to compute, of those that exist once the open plans have run."""
        length = len(self.tokens) + self.undrawn
        return length - self.planned if length < self.limit else 0

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

    def advance(self, size: int, row: int) -> Chunk:
        """Returns the chunk of its next `size` tokens, which count as planned from now on.

        `row` is the index that the chunk will have in its plan.
        """
        sampling, prompt_length = self.request.sampling, len(self.request.prompt_ids)
        samples, start, end = size == self.remaining, self.planned, self.planned + size
        follows = self.row if self.undrawn else None
        too_early_to_end = samples and end - prompt_length < self.request.min_tokens
        self.planned = end
        if samples:
            self.undrawn, self.row = self.undrawn + 1, row
        return Chunk(
            request_id=self.request.id,
            choice=self.choice,
            token_ids=tuple(self.tokens[start:end]) if follows is None else (0,),
            start=start,
            pages=self.table.covering(end),
            follows=follows,
            samples=samples,
            sampling=sampling,
            seed=(self.seed + self.choice) & 0x7FFFFFFF,
            prompt_length=prompt_length,
            history=tuple(self.tokens[: end - 1]) if samples and sampling.has_penalties else (),
            forbidden=self.request.eos_ids if too_early_to_end else frozenset(),
        )
