"""Tokens of Microsoft Entra ID: validation, and the caller that a valid token belongs to.

A token is valid if one of the allowed tenants signed it by RS256 with a key that the tenant
publishes, for one of our audiences, and if it has not expired, give or take LEEWAY_SECONDS. Before
the signature is checked, the token's own claims only choose among the allowed tenants and the keys
that they publish. Keys inside a token, and addresses in it, are never used.

A valid token is not enough: the roles of Azure's own access control do not stand in a token, so a
list of object ids and client ids says who may ask. An empty list lets nobody in. Roles of the
application that tokens are for do stand in them, and may be asked for besides.

An ID token says who has signed in to an application, and is not for asking on their behalf. It has
an access token's claims but for two kinds, so one of these is required: the scopes of a user's
consent (`scp`), or, where an application asks for itself, its own id with roles or `idtyp`.

The names of claims are those of Microsoft's access token reference. Tokens of version 1.0 name
their application `appid`, those of version 2.0 `azp`.
"""

import re
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jwt

from serving.access.errors import AccessError
from serving.access.jwks import Issuer, SigningKey, check_address
from serving.errors import Forbidden, Unauthenticated

# Azure's clients ask for tokens of these audiences by default.
AUDIENCES = ("https://ml.azure.com", "https://cognitiveservices.azure.com")
AUTHORITY = "https://login.microsoftonline.com"
EVERYONE = "*"
LEEWAY_SECONDS = 300
LONGEST_TOKEN = 16 * 1024
REQUIRED = ["aud", "exp", "iat", "iss", "nbf", "oid", "tid", "ver"]

_PATH = {"1.0": "", "2.0": "/v2.0"}
# The decoder skips other characters, and a token must not have two spellings.
_TOKEN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_GUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Headers that carry a key, or ask for features that are not supported here.
_REFUSED_HEADERS = {"crit", "jku", "jwk", "x5c", "x5u"}


class TokenVerifier:
    """Checks tokens.

    Args:
        tenants: The tenants' ids.
        audiences: Values that `aud` may have, with or without a slash at the end.
        allowed: Object ids of users and applications, and client ids of applications, that may ask;
            "*" is everyone in the tenants.
        roles: Values of `roles` of which a token must have one; without any it needs none.
        authority: URL of the tenants' OpenID metadata.
        clock: Time in seconds that never goes back, for the age of the keys.

    Raises AccessError for an id that is no GUID, or an authority that is not secure.
    """

    def __init__(
        self,
        tenants: Collection[str],
        *,
        audiences: Collection[str] = AUDIENCES,
        allowed: Collection[str] = (),
        roles: Collection[str] = (),
        authority: str = AUTHORITY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_address(authority)
        self._authority = authority.rstrip("/")
        self._audiences = [
            form for name in audiences for form in (name.rstrip("/"), f"{name.rstrip('/')}/")
        ]
        self._allowed = {id if id == EVERYONE else _guid(id, "allowed id") for id in allowed}
        self._roles = frozenset(roles)
        self._issuers = {
            (tenant, version): Issuer(
                f"{self._authority}/{tenant}{path}/.well-known/openid-configuration", clock
            )
            for tenant in (_guid(id, "tenant") for id in tenants)
            for version, path in _PATH.items()
        }

    async def verify(self, token: str) -> str:
        """Returns the name of the caller: "entra:" and the object id of a user or an application.

        Raises Unauthenticated, Forbidden if its owner is not allowed, and Unavailable if the
        tenant's keys cannot be had.
        """
        key_id, tenant, version = _claimed(token)
        issuer = self._issuers.get((tenant, version))
        if issuer is None:
            raise _refused("the token is of another tenant, or of no known version")
        name, key = await issuer.find(key_id)
        if tenant not in name:
            raise _refused("the token's issuer is not its tenant's")
        if key is None:
            raise _refused("the token is signed with a key that its tenant does not publish")
        if not self._signs_for(key, name, tenant):
            raise _refused("the token is signed with another issuer's key")
        try:
            claims = jwt.decode(
                token,
                key.public,
                algorithms=["RS256"],
                audience=self._audiences,
                issuer=name,
                leeway=LEEWAY_SECONDS,
                options={"require": REQUIRED},
            )
        except jwt.PyJWTError as error:
            raise _refused(str(error)) from None
        _check_kind(claims)
        owner = self._owner(claims)
        if self._roles and self._roles.isdisjoint(_roles_of(claims)):
            raise Forbidden(
                f"the token is valid, but its oid {owner} has none of the roles that this endpoint "
                "asks for; ask its operator to assign one"
            )
        return f"entra:{owner}"

    def _signs_for(self, key: SigningKey, issuer: str, tenant: str) -> bool:
        if key.issuer is None:
            return True
        # One key signs tokens of both versions, and may be published with the newer one's issuer.
        own = key.issuer.replace("{tenantid}", tenant)
        return own in (issuer, f"{self._authority}/{tenant}/v2.0")

    def _owner(self, claims: Mapping[str, Any]) -> str:
        ids = [str(claims.get(name, "")).lower() for name in ("oid", "appid", "azp")]
        if not _GUID.fullmatch(ids[0]):
            raise _refused("the token's oid is no GUID")
        if self._allowed.isdisjoint((EVERYONE, *ids)):
            raise Forbidden(
                f"the token is valid, but its oid {ids[0]} is not among those that may use this "
                "endpoint; ask its operator to allow it"
            )
        return ids[0]


def _check_kind(claims: Mapping[str, Any]) -> None:
    """Raises Unauthenticated for an ID token, or any other that is not for access."""
    has_scopes = isinstance(claims.get("scp"), str) and bool(claims["scp"].strip())
    # Roles of a user stand in ID tokens too, the id of an application in access tokens only.
    has_application = any(isinstance(claims.get(name), str) for name in ("appid", "azp"))
    is_application = bool(_roles_of(claims)) or claims.get("idtyp") == "app"
    if not (has_scopes or (has_application and is_application)):
        raise _refused(
            "the token is no access token: it has neither scp nor, with appid or azp, roles or "
            "idtyp"
        )


def _roles_of(claims: Mapping[str, Any]) -> list[str]:
    roles = claims.get("roles")
    return [role for role in roles if isinstance(role, str)] if isinstance(roles, list) else []


def _claimed(token: str) -> tuple[str, str, str]:
    """Reads the id of the key, the tenant and the version of a token, none of them checked."""
    if len(token) > LONGEST_TOKEN:
        raise _refused(f"the token has more than {LONGEST_TOKEN} characters")
    if not _TOKEN.fullmatch(token):
        raise _refused("the token is malformed")
    try:
        unchecked = jwt.decode_complete(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise _refused("the token is malformed") from None
    header, claims = unchecked["header"], unchecked["payload"]
    if header.get("alg") != "RS256":
        raise _refused("the token is not signed by RS256")
    if unknown := sorted(_REFUSED_HEADERS & header.keys()):
        raise _refused(f"the token's header has {unknown[0]}, which is not accepted")
    values = (header.get("kid"), claims.get("tid"), claims.get("ver"))
    for name, value in zip(("kid", "tid", "ver"), values, strict=True):
        if not (isinstance(value, str) and value):
            raise _refused(f"the token has no {name}")
    key_id, tenant, version = map(str, values)
    return key_id, tenant.lower(), version


def _guid(text: str, what: str) -> str:
    if not _GUID.fullmatch(text.lower()):
        raise AccessError(f"{text!r} is no {what}: give a GUID")
    return text.lower()


def _refused(reason: str) -> Unauthenticated:
    return Unauthenticated(f"auth token validation failed: {reason}")
