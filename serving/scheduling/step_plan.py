"""Plans of steps, and the sizes that bound them: plain data.

The scheduler decides by `Limits` and writes a `StepPlan`; the engine computes it.
"""

from dataclasses import dataclass

from mixtral_jax.sampling_params import SamplingParams
from serving.scheduling.step_cost import StepSize

NO_SLOT = -1  # of a chunk without an adapter


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of an engine; under a mesh that splits sequences, of one partition."""

    num_pages: int
    page_size: int  # tokens
    max_sequences: int  # rows of a step
    max_step_tokens: int  # tokens of a step, at least max_sequences
    max_context: int  # tokens of one sequence
    max_waiting: int  # sequences in the queue
    # The token at position p sees positions p - window + 1 to p; None: all positions up to p.
    window: int | None = None
    prefix_reuse: bool = True
    # Draws with the same shapes in every step, so that sums over a vocabulary add up in one order.
    deterministic: bool = False

    @property
    def window_pages(self) -> int | None:
        """Largest number of pages that one window touches, wherever it begins; None without one."""
        return self.window and -(-(self.window - 1) // self.page_size) + 1

    @property
    def room(self) -> int:
        """Number of tokens, prompt and answer, of a sequence that has all pages to itself."""
        if self.window_pages is not None and self.window_pages <= self.num_pages:
            return self.max_context
        return min(self.max_context, self.num_pages * self.page_size)

    def visible(self, position: int) -> int:
        """Returns the first position that the token at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)


@dataclass(slots=True, kw_only=True)
class Chunk:
    """Tokens of one sequence that a step computes. Nobody changes one; see `Drawn`."""

    request_id: str
    choice: int
    token_ids: tuple[int, ...]  # (0,) with `follows`
    start: int  # position of the first of them
    pages: tuple[int, ...]  # up to the chunk's end; 0, never read, for pages outside the window
    follows: int | None  # index of the chunk of the previous plan that draws the token
    samples: bool  # the token after the chunk is drawn
    sampling: SamplingParams
    seed: int  # of this choice
    prompt_length: int  # tokens from this position on were generated
    # All tokens before the last of the chunk that is no guess, where a token is drawn with
    # penalties; else empty. The device knows the last token sooner than the host.
    history: tuple[int, ...]
    forbidden: frozenset[int]  # ids that must not be drawn: before min_tokens those that end
    # Number of its last tokens that are guesses: a token is drawn after each of them too, and after
    # the token before them, up to and with the first that differs from the guess behind it.
    guesses: int = 0
    slot: int = NO_SLOT  # of the sequence's adapter
    # Tokens of the prompt whose logprobs are wanted: each follows one of the chunk's tokens.
    targets: tuple[int, ...] = ()
    target_start: int = 0  # position of the first of them
    asked: int = 0  # number of the likeliest tokens beside each

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Content of one step of one partition. Chunks of one token come first."""

    chunks: tuple[Chunk, ...]
    # (source, destination) pages, to be copied before the step writes. No destination occurs
    # twice or is a source, so they may be copied in any order or at once.
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all chunks."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def num_rows(self) -> int:
        """Number of rows that may draw: one of each chunk, and one of each guess."""
        return len(self.chunks) + sum(chunk.guesses for chunk in self.chunks)

    def size(self, window: int | None) -> StepSize:
        """Returns what the time of the step depends on."""
        return StepSize().plus(((c.start, len(c.token_ids)) for c in self.chunks), window)
