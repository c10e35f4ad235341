"""What was asked and what happened: all that crosses between callers and the engine's thread.

Token ids only. Text, templates and stop strings live on the caller's side.
"""

from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    STOP = "stop"  # the model ended its answer, or a stop text appeared
    LENGTH = "length"  # max_tokens or the end of the context


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn; ranges are checked where requests come in."""

    temperature: float = 0.7  # 0 takes the likeliest token
    top_p: float = 1.0  # in (0, 1]
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be continued."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    eos_ids: frozenset[int]  # generation ends after one of these


@dataclass(frozen=True, kw_only=True)
class Event:
    """One token of one request."""

    request_id: str
    token_id: int
    finish_reason: FinishReason | None  # set on the last event of a request
