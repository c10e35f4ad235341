"""What a step computes, and the sizes that bound it: plain data.

The scheduler decides by `Limits` and writes a `StepPlan`; the engine computes it.
"""

from dataclasses import dataclass

from mixtral_jax.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine can hold."""

    num_pages: int
    page_size: int
    max_sequences: int  # rows of a step
    max_step_tokens: int  # tokens of a step, at least max_sequences
    max_context: int  # tokens of one sequence
    max_waiting: int  # sequences in the queue
    window: int | None = None  # the token at position p sees p-window+1 .. p; None: all before it
    prefix_reuse: bool = True
    # Draw with the same shapes in every step: sums over a vocabulary then add up in one order.
    deterministic: bool = False

    @property
    def window_pages(self) -> int | None:
        """The most pages that one window touches, however it lies on them."""
        return self.window and -(-(self.window - 1) // self.page_size) + 1

    @property
    def room(self) -> int:
        """Tokens of prompt and answer that a sequence can have when it has the pool to itself."""
        if self.window_pages is not None and self.window_pages <= self.num_pages:
            return self.max_context
        return min(self.max_context, self.num_pages * self.page_size)

    def visible(self, position: int) -> int:
        """The first position that the token at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The part of one sequence that a step computes."""

    request_id: str
    choice: int
    token_ids: tuple[int, ...]  # (0,) with `follows`
    start: int  # position of the first of them
    pages: tuple[int, ...]  # up to the chunk's end; 0, never read, where the window has left one
    follows: int | None  # the token is what this chunk of the plan before draws
    samples: bool  # whether the token after the chunk is drawn
    sampling: SamplingParams
    seed: int  # of this choice
    prompt_length: int  # tokens from there on were generated
    # Where a token is drawn with penalties: all tokens before the chunk's last, which the device
    # knows sooner than the host. Else empty.
    history: tuple[int, ...]
    forbidden: frozenset[int]  # ids that must not be drawn: those that end, before min_tokens

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step: plain data. Chunks of one token come first."""

    chunks: tuple[Chunk, ...]
    # (source, destination) pages, to be copied before the step writes. No page is in two places
    # of it but as a source, so they may be copied in any order or at once.
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)
