"""Who may ask: keys, as clients of Azure, of OpenAI and plain curl present them.

`Authorization: Bearer KEY`, `Authorization: KEY` and `api-key: KEY` are all accepted; Azure's own
clients send two of them at once. What is kept is the digest of each key, and a digest is what gets
compared, so neither the time nor the length of a comparison tells anything about the key.
"""

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from fastapi import Request

from serving.errors import Unauthenticated


class Keys:
    """The keys that open the gateway. Raises ValueError for a key that no header could carry."""

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise ValueError("at least one key is needed")
        for key in keys:
            # A header's value is visible ASCII; with a space inside, the scheme could not be told.
            if not (key and key.isascii() and key.isprintable() and " " not in key):
                raise ValueError("a key must be visible ASCII characters without spaces")
        self._digests = [_digest(key) for key in keys]

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises Unauthenticated unless one of the headers carries one of the keys."""
        scheme, _, credential = headers.get("authorization", "").strip().partition(" ")
        bearer = credential.strip() if scheme.lower() == "bearer" else scheme
        if not any(self._is_known(key) for key in (bearer, headers.get("api-key", ""))):
            raise Unauthenticated(
                "auth token validation failed: send the key of this endpoint as the header "
                "'Authorization: Bearer KEY' or 'api-key: KEY'"
            )

    async def require(self, request: Request) -> None:
        """`check` as a dependency of a route; a coroutine, so that no thread is taken for it."""
        self.check(request.headers)

    def _is_known(self, presented: str) -> bool:
        digest = _digest(presented)
        # Every digest is compared, also after a match.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
