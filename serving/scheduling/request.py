"""Requests and events: everything that crosses between callers and the engine's thread.

They hold token ids only. Text, templates and stop strings live on the caller's side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum

from mixtral_jax.sampling_params import SamplingParams
from serving.errors import ContextTooLong, InvalidRequest

NO_LIMIT = 2**31
"""The `max_tokens` of a request that sets none: its context ends its answer."""
_MAX_ID = 2**31 - 1  # of a token: the device counts in 32 bits


class FinishReason(Enum):
    """Reasons for which a choice ends."""

    STOP = "stop"  # the model ended its answer, or a stop id or stop text appeared
    LENGTH = "length"  # max_tokens or the end of the context
    DEADLINE = "deadline"  # the request's time was up
    FAILED = "failed"  # a step with this request alone failed


class Priority(IntEnum):
    """Classes of requests; a smaller one is served first."""

    INTERACTIVE = 0
    BATCH = 1


@dataclass(frozen=True)
class Seat:
    """The slot in which an engine has a request's adapter, and the adapter's digest."""

    slot: int
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be continued, `n` times."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int  # of each choice; 0 computes logprobs of the prompt alone
    eos_ids: frozenset[int]  # a choice ends after one of these; empty to ignore the model's end
    min_tokens: int = 0  # number of tokens before which no id of eos_ids is drawn
    n: int = 1
    deadline: float | None = None  # time.monotonic() after which nothing more is computed
    caller: str = ""  # who asks; callers take turns
    adapter: str = ""  # name of the adapter that answers; empty: the model without one
    salt: bytes = b""  # prefixes are shared under the same salt only
    priority: Priority = Priority.INTERACTIVE
    suspect: bool = False  # computed in steps of its own, because it may end the engine
    # Number of the likeliest tokens whose logprobs are asked for beside those of each of the
    # prompt's tokens; None for no logprobs of the prompt.
    prompt_logprobs: int | None = None
    # Grammar of each choice: a mixtral_jax.structure.form.Form, which only the engine reads.
    form: object | None = None
    allowed_ids: frozenset[int] = frozenset()  # the only ids that are drawn; empty for all
    prediction_ids: tuple[int, ...] = ()  # what the answer may repeat, for guesses

    # The adapter of that name when the engine took the request in; set by the engine alone.
    seat: Seat | None = None

    @property
    def prefix_salt(self) -> bytes:
        """The salt under which its pages are kept: the caller's, and the adapter's digest.

        Keys and values depend on the adapter that computed them, so prefixes are shared neither
        among adapters nor among versions of one.
        """
        digest = b"" if self.seat is None else self.seat.digest
        return len(digest).to_bytes(1) + digest + self.salt

    @property
    def num_scored(self) -> int:
        """Number of tokens of the prompt whose logprobs are asked for: all but the first."""
        return 0 if self.prompt_logprobs is None else len(self.prompt_ids) - 1

    def check(self, room: int) -> None:
        """Raises the errors that it deserves whatever else there is to do.

        Args:
            room: largest number of tokens of prompt and answer together.

        Raises:
            ContextTooLong: the prompt leaves no room for an answer.
            InvalidRequest: the prompt is empty, or a number cannot be.
        """
        size = len(self.prompt_ids)
        if not size:
            raise InvalidRequest("the prompt is empty; give at least one token")
        if size > room:
            raise ContextTooLong.of(room, f"the prompt has {size}")
        if size == room and self.max_tokens:
            raise ContextTooLong.of(room, f"the prompt has {size}, and an answer needs some")
        if not 0 <= min(self.prompt_ids) <= max(self.prompt_ids) <= _MAX_ID:
            raise InvalidRequest(f"the prompt has an id outside 0 to {_MAX_ID}")
        if self.n < 1:
            raise InvalidRequest(f"n is {self.n}; ask for at least 1 choice")
        if self.max_tokens < 0 or (not self.max_tokens and not self.num_scored):
            raise InvalidRequest(f"max_tokens is {self.max_tokens}; ask for at least 1 token")
        if self.min_tokens < 0:
            raise InvalidRequest(f"min_tokens is {self.min_tokens}; it must be 0 or more")


@dataclass(slots=True, kw_only=True)
class Drawn:
    """A token that the engine drew, and its logprobs where they were asked for.

    Nobody changes one, nor an Event, nor a Chunk. They are not frozen because a frozen dataclass
    takes three times as long to make, and there is one of each for every token.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first
    forced: bool = False  # no step drew it: a grammar let nothing else follow
    # That it had been guessed, and the number of guesses that were checked with it in vain.
    accepted: bool = field(default=False, compare=False)
    rejected: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """The logprob of a given token, in the model's own distribution."""

    token_id: int
    logprob: float
    rank: int  # among all tokens in its place: 1 for the likeliest
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


@dataclass(frozen=True)
class Scored:
    """The result of a row whose chunk has targets: the draw, and their scores in order."""

    drawn: Drawn | None
    scores: Sequence[TokenScore]
    is_finite: bool = True  # False: there are no logprobs of such values


RowDraws = Drawn | Sequence[Drawn] | Scored | None
"""What a row drew: a token; several where it has guesses; with scores where its chunk has targets;
None where it draws none, or sits out."""


@dataclass(slots=True, kw_only=True)
class Event:
    """A change of one choice of one request: a token was drawn, or its time was up.

    An event without a token and without a finish reason tells that a part of the prompt was
    computed. With max_tokens 0 the last event of a choice has no token, and LENGTH.
    """

    request_id: str
    choice: int
    drawn: Drawn | None  # None with DEADLINE and FAILED, and while the prompt is computed
    finish_reason: FinishReason | None  # set on the last event of a choice
    computed: int = 0  # tokens of the prompt that are computed so far, `cached` ones included
    cached: int = 0  # tokens of the prompt that the prefix cache had
    # For metrics and traces: time.monotonic() of the first step that computed for the request, and
    # the number of steps so far that computed for this choice.
    seated: float = field(default=0.0, compare=False)
    steps: int = field(default=0, compare=False)
    problem: str = ""  # with FAILED, what the caller is told; empty where only the log says it
    is_refused: bool = False  # with FAILED: its own parameters are the reason
    # Scores of the prompt's next tokens, from the second one on; all come before the first token.
    prompt_logprobs: Sequence[TokenScore] = ()
