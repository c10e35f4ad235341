"""Credentials as headers and metadata carry them."""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest

from serving.access.credentials import Access
from serving.access.key_file import KeyFile
from serving.access.keyring import Keyring
from serving.errors import Unauthenticated

ACCESS = Access(Keyring({"one": "first", "two": "second"}))


def admit(headers: Mapping[str, str], access: Access = ACCESS) -> str:
    return asyncio.run(access.admit(headers)).name


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"authorization": "Bearer first"}, "one"),
        ({"authorization": "bearer  second "}, "two"),
        ({"authorization": "first"}, "one"),
        ({"api-key": "second"}, "two"),
        ({"x-api-key": "second"}, "two"),
        ({"x-api-key": "wrong", "api-key": "first"}, "one"),
        ({"authorization": "Bearer wrong", "api-key": "first"}, "one"),
        ({"authorization": "Bearer first", "api-key": "wrong"}, "one"),
        ({"authorization": "Basic wrong", "api-key": "first"}, "one"),
    ],
)
def test_a_key_opens_in_every_form(headers: dict[str, str], name: str) -> None:
    assert admit(headers) == name


REFUSED: list[dict[str, str]] = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer "},
    {"authorization": "Bearer firs"},
    {"authorization": "Bearer first!"},
    {"authorization": "Bearer first second"},
    {"authorization": "Basic first"},
    {"authorization": "first second"},
    {"api-key": ""},
    {"api-key": "Bearer first"},
    {"api-key": "\xe9"},
    {"api-key": "a.b.c"},  # which would be a token, were there somebody to check it
    {"x-api-key": "Bearer first"},
    {"x-key": "first"},
]


@pytest.mark.parametrize("headers", REFUSED)
def test_anything_else_does_not(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthenticated, match="auth token validation failed"):
        admit(headers)


def test_open_access_still_knows_its_callers() -> None:
    access = Access(Keyring({"gateway": "secret"}), is_open=True)
    assert admit({"authorization": "Bearer secret"}, access) == "gateway"
    for headers in REFUSED:
        assert admit(headers, access) == "anonymous"


def test_a_keyring_without_keys_lets_nobody_in() -> None:
    for headers in ({}, {"authorization": ""}, {"api-key": "x"}):
        with pytest.raises(Unauthenticated):
            admit(headers, Access(Keyring({})))


def test_an_expired_key_is_told_so_unless_another_opens(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    old = file.add("old", lifetime=timedelta(0))
    access = Access(Keyring({"default": "valid"}, file))
    for headers in (
        {"api-key": old},
        {"authorization": f"Bearer {old}", "api-key": "wrong"},
        {"authorization": "Bearer wrong", "api-key": old},
    ):
        with pytest.raises(Unauthenticated, match="this key has expired"):
            admit(headers, access)
    assert admit({"authorization": f"Bearer {old}", "api-key": "valid"}, access) == "default"
    assert admit({"api-key": old}, Access(Keyring({}, file), is_open=True)) == "anonymous"
