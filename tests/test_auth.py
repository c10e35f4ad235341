"""Keys as headers carry them."""

import pytest

from serving.errors import Unauthenticated
from serving.gateway.auth import Keys


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first"},
        {"authorization": "bearer  second "},
        {"authorization": "first"},
        {"api-key": "second"},
        {"authorization": "Bearer wrong", "api-key": "first"},
        {"authorization": "Bearer first", "api-key": "wrong"},
    ],
)
def test_a_key_opens_in_every_form(headers: dict[str, str]) -> None:
    Keys(["first", "second"]).check(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer firs"},
        {"authorization": "Bearer first!"},
        {"authorization": "Basic first"},
        {"api-key": ""},
        {"api-key": "Bearer first"},
        {"api-key": "\xe9"},
    ],
)
def test_anything_else_does_not(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthenticated, match="auth token validation failed"):
        Keys(["first"]).check(headers)


@pytest.mark.parametrize("keys", [[], [""], ["good", "with space"], ["line\n"], ["clé"]])
def test_keys_that_no_header_could_carry_are_refused(keys: list[str]) -> None:
    with pytest.raises(ValueError, match="key"):
        Keys(keys)
