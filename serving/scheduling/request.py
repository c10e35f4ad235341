"""Requests and events: everything that crosses between callers and the engine's thread.

They hold token ids only. Text, templates and stop strings live on the caller's side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum

from mixtral_jax.sampling_params import SamplingParams


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


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be continued, `n` times."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int  # of each choice
    eos_ids: frozenset[int]  # a choice ends after one of these; empty to ignore the model's end
    min_tokens: int = 0  # number of tokens before which no id of eos_ids is drawn
    n: int = 1
    deadline: float | None = None  # time.monotonic() after which nothing more is computed
    caller: str = ""  # who asks; callers take turns
    salt: bytes = b""  # prefixes are shared under the same salt only
    priority: Priority = Priority.INTERACTIVE
    suspect: bool = False  # computed in steps of its own, because it may end the engine


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A token that the engine drew, and its logprobs where they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first
    forced: bool = False  # the host chose it; the device may have drawn another one


RowDraws = Drawn | Sequence[Drawn] | None
"""What a row drew: a token; several where it has guesses; None where it draws none, or sits out."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A change of one choice of one request: a token was drawn, or its time was up.

    An event without a token and without a finish reason tells that a part of the prompt was
    computed.
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
