"""Authentication, the same for headers of HTTP and for metadata of gRPC.

`Authorization: Bearer X`, `Authorization: X`, `api-key: X` and `x-api-key: X` (Anthropic's clients)
are all accepted. Azure's own clients send two of them at once; a caller is let in if one is valid.
X is a key of the keyring or, if tokens are accepted, a token of Microsoft Entra ID.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from serving.access.caller import ANONYMOUS, Caller
from serving.access.keyring import Keyring
from serving.errors import Unauthenticated

if TYPE_CHECKING:  # it needs PyJWT, which is an extra
    from serving.access.entra import TokenVerifier

FAILED = "auth token validation failed"
KEY_HEADERS = ("api-key", "x-api-key")
"""Headers that hold a key and nothing else."""


class Access:
    """Decides who is let in.

    Args:
        keyring: The keys that are let in.
        tokens: Checks tokens; without it no token is accepted.
        is_open: Let callers without a valid key in too, as "anonymous". It is an attribute too.
    """

    def __init__(
        self, keyring: Keyring, tokens: "TokenVerifier | None" = None, *, is_open: bool = False
    ) -> None:
        self._keyring = keyring
        self._tokens = tokens
        self.is_open = is_open

    @property
    def reload_failed(self) -> bool:
        """True while an older state of the file of keys is in use, because it cannot be read."""
        return self._keyring.reload_failed

    async def admit(self, headers: Mapping[str, str]) -> Caller:
        """Returns the caller who sent these headers, or metadata, with names in lower case.

        Raises Unauthenticated, Forbidden for a valid token that is not on the list, and
        Unavailable if the keys that tokens are signed with cannot be had.
        """
        presented = _presented(headers)
        expired: Unauthenticated | None = None
        for credential in presented:
            try:
                if (caller := self._keyring.find(credential)) is not None:
                    return caller
            except Unauthenticated as error:
                expired = error
        if self.is_open:
            return Caller(ANONYMOUS)
        for credential in presented:
            if self._tokens is not None and credential.count(".") == 2:
                return Caller(await self._tokens.verify(credential))
        if expired is not None:
            raise expired
        raise Unauthenticated(
            f"{FAILED}: send the key of this endpoint as the header 'Authorization: Bearer KEY', "
            "'api-key: KEY' or 'x-api-key: KEY'"
        )


def _presented(headers: Mapping[str, str]) -> list[str]:
    first, _, rest = headers.get("authorization", "").strip().partition(" ")
    bearer = rest.strip() if first.lower() == "bearer" else first if not rest else ""
    others = (headers.get(name, "").strip() for name in KEY_HEADERS)
    return list(dict.fromkeys(x for x in (bearer, *others) if x))
