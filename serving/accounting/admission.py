"""Admission of a caller's requests, and what they cost when they are over.

It knows neither HTTP nor gRPC: both ports admit a caller by name, and settle the lease that they
get when the answer has ended.
"""

from serving.accounting.accounts import Accounts


class Lease:
    """An admitted request. `settle` it once when its answer is over; without, it costs no tokens.

    Args:
        accounts: The accounts that it is charged to.
        caller: The name of its caller.
    """

    def __init__(self, accounts: Accounts, caller: str) -> None:
        self._accounts = accounts
        self._caller = caller

    def settle(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Charges the request and the tokens that were computed for it."""
        self._accounts.charge(self._caller, prompt_tokens, completion_tokens)


class Admission:
    """Admits requests within the limits of their callers.

    Args:
        accounts: The accounts of all callers.
    """

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    def admit(self, caller: str) -> Lease:
        """Returns the lease of a request; raises Overloaded, with its own `retry_after`.

        Args:
            caller: The caller's name. Several prompts of one request are admitted once.
        """
        self._accounts.take_request(caller)
        return Lease(self._accounts, caller)
