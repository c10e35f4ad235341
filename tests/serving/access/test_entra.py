"""Tokens of Entra ID, real ones and forged ones, before a server that publishes the keys."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key

from serving.access.entra import LEEWAY_SECONDS, LONGEST_TOKEN, TokenVerifier
from serving.access.jwks import (
    KEEP_SECONDS,
    LONGEST_DOCUMENT,
    REST_SECONDS,
    RETRY_SECONDS,
    fetch,
)
from serving.errors import Forbidden, Unauthenticated, Unavailable

TENANT = "11111111-2222-3333-4444-555555555555"
OTHER_TENANT = "22222222-2222-3333-4444-555555555555"
OBJECT = "aaaaaaaa-0000-0000-0000-000000000001"
APPLICATION = "bbbbbbbb-0000-0000-0000-000000000002"
V1 = f"https://sts.windows.net/{TENANT}/"
V2 = f"https://login.microsoftonline.com/{TENANT}/v2.0"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Authority:
    """What login.microsoftonline.com publishes: metadata and keys of both versions."""

    def __init__(self) -> None:
        self.keys: dict[str, list[dict[str, Any]]] = {V1: [], V2: []}
        self.asked: list[str] = []
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.may_answer = threading.Event()
        self.may_answer.set()
        authority = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                authority.asked.append(self.path)
                authority.may_answer.wait(10)
                if self.path in authority.answers:
                    authority.answers[self.path](self)
                elif (document := authority.document(self.path)) is None:
                    self.send_error(404)
                else:
                    answer(self, json.dumps(document).encode())

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def document(self, path: str) -> dict[str, Any] | None:
        configuration = ".well-known/openid-configuration"
        return {
            f"/{TENANT}/{configuration}": {"issuer": V1, "jwks_uri": f"{self.url}/keys"},
            f"/{TENANT}/v2.0/{configuration}": {"issuer": V2, "jwks_uri": f"{self.url}/v2.0/keys"},
            "/keys": {"keys": self.keys[V1]},
            "/v2.0/keys": {"keys": self.keys[V2]},
        }.get(path)


def answer(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **more: str) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | more).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture(scope="module")
def signer() -> RSAPrivateKey:
    return generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def stranger() -> RSAPrivateKey:
    return generate_private_key(65537, 2048)


@pytest.fixture
def authority(signer: RSAPrivateKey) -> Iterator[Authority]:
    authority = Authority()
    published = {**public(signer), "kid": "first", "use": "sig"}
    authority.keys[V1] = [published]
    authority.keys[V2] = [{**published, "issuer": V2.replace(TENANT, "{tenantid}")}]
    thread = threading.Thread(target=authority.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield authority
    authority.may_answer.set()
    authority.server.shutdown()
    authority.server.server_close()
    thread.join()


def public(key: RSAPrivateKey) -> dict[str, Any]:
    published: dict[str, Any] = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return published


def claims(version: str = "1.0", **changes: Any) -> dict[str, Any]:
    """Of a token as Azure's clients get it; a change to None takes the claim away."""
    now = int(time.time())
    own = {"1.0": {"iss": V1, "appid": APPLICATION}, "2.0": {"iss": V2, "azp": APPLICATION}}
    all_claims = {
        **{"aud": "https://ml.azure.com", "iat": now, "nbf": now, "exp": now + 3600},
        **{"oid": OBJECT, "tid": TENANT, "ver": version, "sub": "s"},
        "scp": "user_impersonation",
        **own[version],
        **changes,
    }
    return {name: value for name, value in all_claims.items() if value is not None}


def sign(
    key: Any, payload: dict[str, Any] | None = None, algorithm: str = "RS256", **header: Any
) -> str:
    return jwt.encode(payload or claims(), key, algorithm, {"kid": "first", **header})


def verifier(authority: Authority, **settings: Any) -> TokenVerifier:
    settings = {"allowed": [OBJECT], "authority": authority.url, **settings}
    return TokenVerifier([TENANT], **settings)


def verify(tokens: TokenVerifier, token: str) -> str:
    return asyncio.run(tokens.verify(token))


@pytest.mark.parametrize(
    "make",  # when the test runs: what is collected may wait for long
    [
        lambda: claims(),
        lambda: claims("2.0"),
        lambda: claims(aud="https://ml.azure.com/"),
        lambda: claims(aud="https://cognitiveservices.azure.com"),
        lambda: claims(exp=int(time.time()) - LEEWAY_SECONDS + 60, nbf=1, iat=1),
        lambda: claims(nbf=int(time.time()) + LEEWAY_SECONDS - 60),
        lambda: claims(oid=OBJECT.upper(), tid=TENANT),
        lambda: claims(scp=None, roles=["Reader"]),
        lambda: claims("2.0", scp=None, roles=["Reader"]),
        lambda: claims(scp=None, idtyp="app"),
    ],
)
def test_tokens_that_are_believed(
    authority: Authority, signer: RSAPrivateKey, make: Callable[[], dict[str, Any]]
) -> None:
    assert verify(verifier(authority), sign(signer, make())) == f"entra:{OBJECT}"


def forged(signer: RSAPrivateKey, stranger: RSAPrivateKey) -> dict[str, str]:
    """Every kind of token that must not be believed, by what is wrong with it."""
    good = sign(signer)
    head, body, signature = good.split(".")
    pem = signer.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    now = int(time.time())
    no_kid = jwt.encode(claims(), signer, "RS256")
    return {
        "alg none": jwt.encode(claims(), None, "none", {"kid": "first"}),
        "alg none, signature kept": f"{b64({'alg': 'none', 'kid': 'first'})}.{body}.{signature}",
        "alg NONE": f"{b64({'alg': 'nOnE', 'kid': 'first'})}.{body}.{signature}",
        "HS256 with the public key": hs256(pem, body),
        "HS256 with an empty key": hs256(b"", body),
        "RS512": sign(signer, algorithm="RS512"),
        "PS256": sign(signer, algorithm="PS256"),
        "wrong kid": sign(signer, kid="second"),
        "kid of a path": sign(signer, kid="../../dev/null"),
        "no kid": no_kid,
        "kid is a list": f"{b64({'alg': 'RS256', 'kid': ['first']})}.{body}.{signature}",
        "another key, same kid": sign(stranger),
        "jku": sign(stranger, jku="https://example.com/keys"),
        "jku, right key": sign(signer, jku="https://example.com/keys"),
        "jwk": sign(stranger, jwk=public(stranger)),
        "x5u": sign(stranger, x5u="https://example.com/chain"),
        "crit": sign(signer, crit=["exp"]),
        "wrong issuer": sign(signer, claims(iss="https://example.com/")),
        "issuer of another tenant": sign(signer, claims(iss=V1.replace(TENANT, OTHER_TENANT))),
        "issuer without its slash": sign(signer, claims(iss=V1.rstrip("/"))),
        "v2 issuer, v1 ver": sign(signer, claims(iss=V2)),
        "v1 issuer, v2 ver": sign(signer, claims(ver="2.0")),
        "unknown version": sign(signer, claims(ver="3.0")),
        "wrong audience": sign(signer, claims(aud="https://graph.microsoft.com")),
        "an audience that begins alike": sign(signer, claims(aud="https://ml.azure.com.evil")),
        "no audience": sign(signer, claims(aud=None)),
        "tenant that is not allowed": sign(
            signer, claims(tid=OTHER_TENANT, iss=V1.replace(TENANT, OTHER_TENANT))
        ),
        "tid does not match iss": sign(signer, claims(tid=OTHER_TENANT)),
        "tid is a path": sign(signer, claims(tid=f"{TENANT}/../{OTHER_TENANT}")),
        "tid is a number": sign(signer, claims(tid=5)),
        "no tid": sign(signer, claims(tid=None)),
        "expired": sign(signer, claims(exp=now - LEEWAY_SECONDS - 60, nbf=1, iat=1)),
        "not yet valid": sign(signer, claims(nbf=now + LEEWAY_SECONDS + 60)),
        "issued in the future": sign(signer, claims(iat=now + LEEWAY_SECONDS + 60)),
        "no exp": sign(signer, claims(exp=None)),
        "exp is a text": sign(signer, claims(exp="never")),
        "no nbf": sign(signer, claims(nbf=None)),
        "no oid": sign(signer, claims(oid=None)),
        "oid is no GUID": sign(signer, claims(oid="*")),
        "no iss": sign(signer, claims(iss=None)),
        "no ver": sign(signer, claims(ver=None)),
        # What an ID token has: no scopes, and no application that holds it; roles it may have.
        "ID token": sign(signer, claims("2.0", scp=None, azp=None, nonce="n", name="Alice")),
        "ID token of version 1.0": sign(signer, claims(scp=None, appid=None, nonce="n")),
        "ID token with roles": sign(signer, claims("2.0", scp=None, azp=None, roles=["Reader"])),
        "no scp, no roles": sign(signer, claims(scp=None)),
        "empty scp and roles": sign(signer, claims(scp=" ", roles=[])),
        "scp is a list": sign(signer, claims(scp=["user_impersonation"])),
        "roles is a text": sign(signer, claims(scp=None, roles="Reader")),
        "roles of numbers": sign(signer, claims(scp=None, roles=[1])),
        "idtyp of a user": sign(signer, claims(scp=None, idtyp="user")),
        "claims changed": f"{head}.{b64(claims(exp=now + 9999))}.{signature}",
        "header changed": f"{b64({'alg': 'RS256', 'kid': 'first', 'x': 1})}.{body}.{signature}",
        "truncated by 1": good[:-1],
        "truncated by 40": good[:-40],
        "no signature": f"{head}.{body}.",
        "signature of zeros": f"{head}.{body}.{'A' * len(signature)}",
        "no claims": f"{head}..{signature}",
        "no header": f".{body}.{signature}",
        "empty parts": "..",
        "trailing garbage": f"{good}AAAA",
        "trailing garbage that decoders skip": f"{good}!!",
        "padded": f"{good}==",
        "line end": f"{good}\n",
        "non-ASCII": f"{good}\xe9",
        "claims are a list": f"{head}.{b64([1])}.{signature}",
        "header is a list": f"{b64([1])}.{body}.{signature}",
        "no JSON": f"{head}.AAAA.{signature}",
        "deep JSON": f"{head}.{b64_raw(b'[' * 9000)}.{signature}",
        "huge": sign(signer, claims(groups=["x" * LONGEST_TOKEN])),
    }


def test_every_forged_token_is_refused(
    authority: Authority, signer: RSAPrivateKey, stranger: RSAPrivateKey
) -> None:
    tokens = verifier(authority, allowed=["*"])

    async def believed() -> list[str]:
        found = []
        for name, token in forged(signer, stranger).items():
            try:
                await tokens.verify(token)
                found.append(name)
            except Unauthenticated as error:
                assert "auth token validation failed: " in str(error), name
        # Not for a reason that would refuse everything.
        await tokens.verify(sign(signer))
        return found

    assert asyncio.run(believed()) == []
    # Nothing that a token says was ever asked for, and one fetch for all key ids.
    assert len(authority.asked) == len(set(authority.asked)) == 4


def test_who_is_on_the_list(authority: Authority, signer: RSAPrivateKey) -> None:
    for allowed in ([OBJECT], [OBJECT.upper()], [APPLICATION], ["*"], [TENANT, OBJECT]):
        for version in ("1.0", "2.0"):
            tokens = verifier(authority, allowed=allowed)
            assert verify(tokens, sign(signer, claims(version))) == f"entra:{OBJECT}"
    for allowed in ([], [TENANT]):
        with pytest.raises(Forbidden, match=f"oid {OBJECT} is not among"):
            verify(verifier(authority, allowed=allowed), sign(signer))


def test_a_role_may_be_asked_for_besides(authority: Authority, signer: RSAPrivateKey) -> None:
    tokens = verifier(authority, roles=["Chat.Ask", "Chat.Admin"])
    for roles in (["Chat.Ask"], ["other", "Chat.Admin"]):
        assert verify(tokens, sign(signer, claims(roles=roles))) == f"entra:{OBJECT}"
    for wrong in (None, [], ["chat.ask"], "Chat.Ask", [{"Chat.Ask": 1}]):
        with pytest.raises(Forbidden, match=f"oid {OBJECT} has none of the roles"):
            verify(tokens, sign(signer, claims(roles=wrong)))
    # A role does not replace the list.
    with pytest.raises(Forbidden, match="is not among"):
        verify(
            verifier(authority, allowed=[], roles=["Chat.Ask"]),
            sign(signer, claims(roles=["Chat.Ask"])),
        )


def test_keys_on_this_machine_are_an_authoritys_on_this_machine_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = {"issuer": V1, "jwks_uri": ""}
    asked: list[str] = []

    def read(url: str) -> dict[str, Any]:
        asked.append(url)
        return document

    monkeypatch.setattr("serving.access.jwks._read_json", read)
    for address in ("http://127.0.0.1:9/keys", "http://localhost/keys", "https://[::1]/keys"):
        document["jwks_uri"] = address
        with pytest.raises(ValueError, match="names an address of this machine"):
            fetch("https://login.example/openid-configuration")
    assert asked == ["https://login.example/openid-configuration"] * 3


def test_audiences_are_the_operators_choice(authority: Authority, signer: RSAPrivateKey) -> None:
    tokens = verifier(authority, audiences=["api://own/"])
    assert verify(tokens, sign(signer, claims(aud="api://own")))
    with pytest.raises(Unauthenticated, match="[Aa]udience"):
        verify(tokens, sign(signer))


@pytest.mark.parametrize(
    ("issuer", "is_believed"),
    [
        (None, True),
        (V2, True),
        (V2.replace(TENANT, "{tenantid}"), True),
        (V1, False),
        (V2.replace(TENANT, OTHER_TENANT), False),
        ("https://sts.windows.net/{tenantid}/", False),
    ],
)
def test_a_key_signs_for_its_own_issuer(
    authority: Authority, signer: RSAPrivateKey, issuer: str | None, is_believed: bool
) -> None:
    authority.keys[V2] = [{**public(signer), "kid": "first", "issuer": issuer}]
    token = sign(signer, claims("2.0"))
    if is_believed:
        assert verify(verifier(authority), token)
    else:
        with pytest.raises(Unauthenticated, match="another issuer's key"):
            verify(verifier(authority), token)


def test_metadata_of_another_tenant_are_not_believed(
    authority: Authority, signer: RSAPrivateKey
) -> None:
    other = V1.replace(TENANT, OTHER_TENANT)
    document = {"issuer": other, "jwks_uri": f"{authority.url}/keys"}
    path = f"/{TENANT}/.well-known/openid-configuration"
    authority.answers[path] = lambda handler: answer(handler, json.dumps(document).encode())
    with pytest.raises(Unauthenticated, match="issuer is not its tenant's"):
        verify(verifier(authority), sign(signer, claims(iss=other)))


def test_keys_are_kept_a_day_and_fetched_again_for_a_new_one(
    authority: Authority, signer: RSAPrivateKey, stranger: RSAPrivateKey
) -> None:
    clock = Clock()
    tokens = verifier(authority, clock=clock)
    new = sign(stranger, kid="second")

    async def run() -> None:
        for _ in range(3):
            await tokens.verify(sign(signer))
        assert len(authority.asked) == 2  # metadata and keys
        authority.keys[V1].append({**public(stranger), "kid": "second"})
        with pytest.raises(Unauthenticated, match="does not publish"):
            await tokens.verify(new)  # too soon to ask again
        assert len(authority.asked) == 2
        clock.now += REST_SECONDS
        assert await tokens.verify(new)
        assert len(authority.asked) == 4
        # A day later the old keys still open while new ones are fetched.
        del authority.keys[V1][0]
        clock.now += KEEP_SECONDS + 1
        assert await tokens.verify(sign(signer))
        await until(lambda: len(authority.asked) == 6)
        while True:
            try:
                await tokens.verify(sign(signer))
            except Unauthenticated:
                break
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_one_fetch_serves_all_who_wait(authority: Authority, signer: RSAPrivateKey) -> None:
    authority.may_answer.clear()

    async def run() -> None:
        tokens = verifier(authority)
        waiting = [asyncio.create_task(tokens.verify(sign(signer))) for _ in range(20)]
        await until(lambda: bool(authority.asked))
        waiting[0].cancel()  # the client that came first goes away
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting[1:])  # and the loop runs meanwhile
        authority.may_answer.set()
        assert await asyncio.gather(*waiting[1:]) == [f"entra:{OBJECT}"] * 19

    asyncio.run(asyncio.wait_for(run(), 10))
    assert len(authority.asked) == 2


@pytest.mark.parametrize(
    "broken",
    [
        lambda handler: answer(handler, b"", 500),
        lambda handler: answer(handler, b"", 302, Location="/keys"),
        lambda handler: answer(handler, b"{"),
        lambda handler: answer(handler, b"[]"),
        lambda handler: answer(handler, b'{"keys": []}'),
        lambda handler: answer(handler, b'{"keys": [{"kid": "first", "kty": "RSA"}, 5]}'),
        lambda handler: answer(handler, b" " * LONGEST_DOCUMENT + b"{}"),
        lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"),
    ],
)
def test_old_keys_stay_in_use_while_new_ones_cannot_be_had(
    authority: Authority,
    signer: RSAPrivateKey,
    broken: Callable[[BaseHTTPRequestHandler], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    tokens = verifier(authority, clock=clock)

    async def run() -> None:
        authority.answers["/keys"] = broken
        with pytest.raises(Unavailable, match="cannot be fetched"):
            await tokens.verify(sign(signer))
        assert "none are known" in caplog.text
        asked = len(authority.asked)
        with pytest.raises(Unavailable):
            await tokens.verify(sign(signer))  # too soon to ask again
        assert len(authority.asked) == asked
        del authority.answers["/keys"]
        clock.now += RETRY_SECONDS
        assert await tokens.verify(sign(signer))

        authority.answers["/keys"] = broken
        clock.now += KEEP_SECONDS + 1
        for kid in ("unknown", "first"):
            with pytest.raises(Unauthenticated) if kid == "unknown" else nullcontext():
                await tokens.verify(sign(signer, kid=kid))
        assert "those known before stay" in caplog.text

    asyncio.run(asyncio.wait_for(run(), 10))


def test_keys_that_are_none_for_signatures_are_left_out(
    authority: Authority, signer: RSAPrivateKey
) -> None:
    small = {
        "kty": "RSA",
        "n": base64.urlsafe_b64encode(b"\xff" * 128).rstrip(b"=").decode(),
        "e": "AQAB",
    }
    authority.keys[V1] += [
        {**public(signer), "kid": "encrypts", "use": "enc"},
        {"kid": "curve", "kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kid": "secret", "kty": "oct", "k": "AA"},
        {**small, "kid": "small"},
        public(signer),
    ]
    tokens = verifier(authority)

    async def run() -> None:
        assert await tokens.verify(sign(signer))
        for kid in ("encrypts", "curve", "secret", "small"):
            with pytest.raises(Unauthenticated, match="does not publish"):
                await tokens.verify(sign(signer, kid=kid))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("tenants", "settings", "words"),
    [
        (["contoso.com"], {}, "is no tenant"),
        ([TENANT], {"allowed": ["alice"]}, "is no allowed id"),
        ([TENANT], {"authority": "http://login.example"}, "must begin with https"),
        ([TENANT], {"authority": "file:///etc"}, "must begin with https"),
    ],
)
def test_settings_that_cannot_be(tenants: list[str], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TokenVerifier(tenants, **settings)


def b64(value: object) -> str:
    return b64_raw(json.dumps(value).encode())


def b64_raw(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def hs256(secret: bytes, body: str) -> str:
    """As an attacker writes it: the library refuses to sign with a public key."""
    signed = f"{b64({'alg': 'HS256', 'kid': 'first', 'typ': 'JWT'})}.{body}"
    return f"{signed}.{b64_raw(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)
