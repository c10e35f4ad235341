"""Callers: who sends a request, and what the operator lets each of them do."""

from dataclasses import dataclass

# Callers that are not in a file of keys. Log lines and accounts have these names too.
DEFAULT, GATEWAY, ANONYMOUS = "default", "gateway", "anonymous"


@dataclass(frozen=True)
class CallerLimits:
    """Limits of one caller; None stands for the limit that the flags set for every caller."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers together."""
    concurrent_requests: int | None = None
    """Requests that are answered at the same time."""


@dataclass(frozen=True)
class Caller:
    """The sender of a request."""

    name: str
    """That of a key, "default", "gateway", "anonymous", or "entra:" and an object id."""
    is_operator: bool = False
    """May drain the server and read the usage of all callers."""
    limits: CallerLimits = CallerLimits()
    may_be_interactive: bool = True
    """Else its requests are of the batch class, whatever they ask for."""
