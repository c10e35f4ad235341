"""Tabs: what one admitted request holds of its caller's limits, and what it costs in the end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from serving.access.caller import Caller
from serving.accounting.rate_limits import RateLimits


@dataclass(frozen=True)
class Used:
    """The use of a request so far."""

    prompt_tokens: int = 0
    """Tokens of prompts, as far as they were computed."""
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Those of `prompt_tokens` that earlier prompts had computed."""
    charge: float = 0.0
    """Tokens that count against the limits: a cached one may count as a part of one."""
    adapter: str = ""
    """The name of the adapter that answers."""


class Tab(Protocol):
    """The account of one admitted request, which counts as running until it is settled."""

    def enter(self, count: int, running: int) -> None:
        """Takes more requests for the same answer.

        Args:
            count: The number of requests.
            running: The number of them that run at a time.

        Raises:
            InvalidRequest: They are more than the caller may ever have.
            Overloaded: They are too many now.
        """

    def take(self, tokens: int) -> None:
        """Takes tokens before they are computed; raises as `enter` does, and takes nothing."""

    def correct(self, tokens: int) -> None:
        """Takes more tokens, or gives some back where the number is negative."""

    def settle(self, used: Used | None) -> None:
        """Ends it: charges what was used, gives the rest back, and writes a request down.

        Without use the request costs nothing. May be called again, and then does nothing.
        """


@runtime_checkable
class NotedTab(Tab, Protocol):
    """A tab in the accounts of another process, which settles it if this one dies."""

    def note(self, used: Callable[[], Used]) -> None:
        """Tells the accounts what has been used so far, before what was used is passed on.

        Args:
            used: Returns it. It is called in the same pass of the event loop, before any task that
                this pass wakes.
        """


class OwnTab:
    """A tab in the accounts of this process.

    Args:
        rates: The limits of callers.
        add: Writes down a request that has used something, as `Accounts.add` does.
        caller: The caller.

    Raises:
        Overloaded: The caller may have no request now.
    """

    def __init__(
        self, rates: RateLimits, add: Callable[[str, int, int, int, str], None], caller: Caller
    ) -> None:
        self._rates = rates
        self._add = add
        self._caller = caller
        self._requests = self._running = 1
        self._reserved = 0
        self._is_settled = False
        rates.enter(caller)

    def enter(self, count: int, running: int) -> None:
        """Takes more requests, as `Tab` says."""
        self._rates.enter(self._caller, count, taken=self._requests, running=running)
        self._requests += count
        self._running += running

    def take(self, tokens: int) -> None:
        """Takes tokens, as `Tab` says."""
        self._rates.take_tokens(self._caller, tokens)
        self._reserved += tokens

    def correct(self, tokens: int) -> None:
        """Takes more tokens or gives some back, as `Tab` says."""
        if not self._is_settled:
            self._reserved += tokens
            self._rates.give_tokens(self._caller, -tokens)

    def settle(self, used: Used | None) -> None:
        """Ends it, as `Tab` says."""
        if self._is_settled:
            return
        self._is_settled = True
        used = used or Used()
        self._rates.leave(self._caller, self._running)
        self._rates.give_tokens(self._caller, self._reserved - used.charge)
        prompt, completion = used.prompt_tokens, used.completion_tokens
        if prompt or completion:
            self._add(self._caller.name, prompt, completion, used.cached_tokens, used.adapter)
