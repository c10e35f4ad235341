"""Authentication, the same for headers of HTTP and for metadata of gRPC.

`Authorization: Bearer X`, `Authorization: X` and `api-key: X` are all accepted. Azure's own clients
send two of them at once; a caller is let in if either is valid. X is a key of the keyring or, if
tokens are accepted, a token of Microsoft Entra ID.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving.access.keyring import ANONYMOUS, Keyring
from serving.errors import Unauthenticated

if TYPE_CHECKING:  # it needs PyJWT, which is an extra
    from serving.access.entra import TokenVerifier

FAILED = "auth token validation failed"


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


class Access:
    """Decides who is let in.

    Args:
        keyring: The keys that are let in.
        tokens: Checks tokens; without it no token is accepted.
        is_open: Let callers without a valid key in too, as "anonymous".
    """

    def __init__(
        self, keyring: Keyring, tokens: "TokenVerifier | None" = None, *, is_open: bool = False
    ) -> None:
        self._keyring = keyring
        self._tokens = tokens
        self._is_open = is_open

    async def admit(self, headers: Mapping[str, str]) -> Caller:
        """Returns the caller who sent these headers, or metadata, with names in lower case.

        Raises Unauthenticated, Forbidden for a valid token that is not on the list, and
        Unavailable if the keys that tokens are signed with cannot be had.
        """
        presented = _presented(headers)
        for credential in presented:
            if (name := self._keyring.find(credential)) is not None:
                return Caller(name)
        if self._is_open:
            return Caller(ANONYMOUS)
        for credential in presented:
            if self._tokens is not None and credential.count(".") == 2:
                return Caller(await self._tokens.verify(credential))
        raise Unauthenticated(
            f"{FAILED}: send the key of this endpoint as the header 'Authorization: Bearer KEY' or "
            "'api-key: KEY'"
        )


def _presented(headers: Mapping[str, str]) -> list[str]:
    first, _, rest = headers.get("authorization", "").strip().partition(" ")
    bearer = rest.strip() if first.lower() == "bearer" else first if not rest else ""
    return list(dict.fromkeys(x for x in (bearer, headers.get("api-key", "").strip()) if x))
