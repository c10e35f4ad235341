"""An issuer of tokens and the keys that it signs with, as its OpenID metadata publishes them.

The keys are fetched in a thread, by one task at a time, and kept for a day. An unknown key id makes
the issuer fetch them again, because issuers change their keys, but not more often than every
REST_SECONDS, because anybody can make up key ids. While fetches fail, the keys that were fetched
before stay in use.
"""

import asyncio
import http.client
import json
import logging
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from serving.access.errors import AccessError
from serving.access.loopback import is_loopback
from serving.errors import Unavailable

KEEP_SECONDS = 24 * 3600.0
REST_SECONDS = 30.0
# After a failed fetch callers may be locked out, so the next fetch comes sooner.
RETRY_SECONDS = 5.0
FETCH_SECONDS = 10.0
# No issuer publishes longer documents.
LONGEST_DOCUMENT = 2**20
SHORTEST_KEY = 2048

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SigningKey:
    """A public key and the only issuer that it signs for, "{tenantid}" left open, or None."""

    public: RSAPublicKey
    issuer: str | None


@dataclass(frozen=True)
class Published:
    """The metadata of an issuer: the `iss` of its tokens, and its keys by their ids."""

    name: str
    keys: dict[str, SigningKey]


class Issuer:
    """An issuer of tokens.

    Args:
        metadata: The URL of its OpenID configuration.
        clock: Time in seconds that never goes back.
    """

    def __init__(self, metadata: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._metadata = metadata
        self._clock = clock
        self._published: Published | None = None
        self._fetched = self._may_fetch = clock()
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, key_id: str) -> tuple[str, SigningKey | None]:
        """Returns the issuer's name and its key of that id, or None for the key.

        Raises Unavailable if no keys are known.
        """
        known = self._published
        if known is None or key_id not in known.keys:
            if (fetching := self._fetch_if_due()) is not None:
                # One caller may be cancelled while others wait for the same fetch.
                await asyncio.shield(fetching)
        elif self._clock() - self._fetched > KEEP_SECONDS:
            self._fetch_if_due()  # not waited for
        if self._published is None:
            raise Unavailable("the keys that tokens are signed with cannot be fetched; try again")
        return self._published.name, self._published.keys.get(key_id)

    def _fetch_if_due(self) -> "asyncio.Task[None] | None":
        if self._fetching is None and self._clock() >= self._may_fetch:
            self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        rest = RETRY_SECONDS
        try:
            self._published = await asyncio.to_thread(fetch, self._metadata)
            self._fetched = self._clock()
            rest = REST_SECONDS
        except (OSError, ValueError, http.client.HTTPException) as error:
            stay = "those known before stay in use" if self._published else "none are known"
            logger.error("keys of %s were not fetched, %s: %s", self._metadata, stay, error)
        finally:
            self._may_fetch = self._clock() + rest
            self._fetching = None


def fetch(metadata: str) -> Published:
    """Fetches the OpenID configuration at `metadata`, and the keys that it names.

    Blocks for about FETCH_SECONDS a document at most. Raises OSError, http.client.HTTPException,
    or ValueError for documents of another form.
    """
    document = _read_json(metadata)
    name, address = document.get("issuer"), document.get("jwks_uri")
    if not isinstance(name, str) or not isinstance(address, str):
        raise ValueError(f"{metadata} is no OpenID configuration")
    if _is_local(address) and not _is_local(metadata):
        raise ValueError(f"{metadata} names an address of this machine, {address[:200]!r}")
    listed = _read_json(address).get("keys")
    keys = {}
    for entry in listed if isinstance(listed, list) else []:
        if (key := _signing_key(entry)) is not None:
            keys[str(entry["kid"])] = key
    if not keys:
        raise ValueError(f"{address} has no keys for signatures by RSA")
    return Published(name, keys)


def check_address(url: str) -> None:
    """Raises AccessError unless `url` is https, or http on this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if not (parts.scheme == "http" and _is_local(url)):
        raise AccessError(f"{url!r} must begin with https:// (http:// on 127.0.0.1 only)")


def _is_local(url: str) -> bool:
    return is_loopback(urlsplit(url).hostname or "")


def _read_json(url: str) -> dict[str, Any]:
    check_address(url)
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if _is_local(url):
        handlers.append(urllib.request.ProxyHandler({}))  # proxies are for other hosts
    opener = urllib.request.build_opener(*handlers)
    with opener.open(url, timeout=FETCH_SECONDS) as answer:
        content = answer.read(LONGEST_DOCUMENT + 1)
    if len(content) > LONGEST_DOCUMENT:
        raise ValueError(f"{url} answers more than {LONGEST_DOCUMENT} bytes")
    document = json.loads(content)
    if not isinstance(document, dict):
        raise ValueError(f"{url} answers no JSON object")
    return document


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, because the new address was not checked."""

    def redirect_request(self, *_: object) -> None:
        return None


def _signing_key(entry: Any) -> SigningKey | None:
    """Returns the key of a JWKS entry if it is for signatures by RSA; None for other entries."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str):
        return None
    if entry.get("kty") != "RSA" or entry.get("use", "sig") != "sig":
        return None
    try:
        public = jwt.PyJWK(entry, "RS256").key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    if not isinstance(public, RSAPublicKey) or public.key_size < SHORTEST_KEY:
        return None
    issuer = entry.get("issuer")
    return SigningKey(public, issuer if isinstance(issuer, str) else None)
