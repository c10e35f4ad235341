"""Roles, expiry, rotation and limits of named keys, and the commands that set them."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mixtral_jax.cli.main import app
from serving.access.caller import Caller, CallerLimits
from serving.access.key_file import KeyFile
from serving.access.keyring import Keyring
from serving.errors import Unauthenticated

DAY = 86_400.0
# `printf first | sha256sum`, and of second.
FIRST = "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e"
SECOND = "16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4"


class Calendar:
    """A clock that starts at 2026-01-01T00:00:00 UTC."""

    def __init__(self) -> None:
        self.now = 1_767_225_600.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def calendar() -> Calendar:
    return Calendar()


@pytest.fixture
def file(tmp_path: Path, calendar: Calendar) -> KeyFile:
    return KeyFile(tmp_path / "keys.json", calendar)


def ring(file: KeyFile, calendar: Calendar) -> Keyring:
    return Keyring({}, file, calendar=calendar)


def opens(ring: Keyring, key: str) -> bool:
    try:
        return ring.find(key) is not None
    except Unauthenticated:
        return False


def test_a_caller_is_what_its_entry_says(file: KeyFile, calendar: Calendar) -> None:
    limits = CallerLimits(60, 1000, 4)
    root = file.add("root", role="operator")
    batch = file.add("batch", limits=limits, batch_only=True)
    keys = ring(file, calendar)
    assert keys.find(root) == Caller("root", is_operator=True)
    assert keys.find(batch) == Caller("batch", limits=limits, may_be_interactive=False)
    fixed = Keyring({"default": "d", "gateway": "g", "bob": "b"})
    assert [fixed.find(key) for key in "dgb"] == [
        Caller("default", is_operator=True),
        Caller("gateway", is_operator=True),
        Caller("bob"),
    ]


def test_a_key_opens_until_it_expires(file: KeyFile, calendar: Calendar) -> None:
    key = file.add("alice", lifetime=timedelta(days=90))
    assert file.read()[0].digests[0].expires == "2026-04-01T00:00:00+00:00"
    keys = ring(file, calendar)
    calendar.now += 90 * DAY - 1
    assert keys.find(key) == Caller("alice")
    calendar.now += 1
    with pytest.raises(Unauthenticated, match="this key has expired") as caught:
        keys.find(key)
    assert "alice" not in str(caught.value) and key not in str(caught.value)
    assert keys.find("a stranger's key") is None


def test_a_rotated_name_has_two_keys_and_one_account(file: KeyFile, calendar: Calendar) -> None:
    old = file.add("alice", role="operator", limits=CallerLimits(5))
    new = file.rotate("alice", overlap=timedelta(days=7))
    assert new != old
    keys = ring(file, calendar)
    assert keys.find(old) == keys.find(new) == Caller("alice", True, CallerLimits(5))
    calendar.now += 7 * DAY - 1
    assert opens(keys, old)
    calendar.now += 1
    assert not opens(keys, old) and opens(keys, new)
    # An expired key leaves its place to the next.
    third = file.rotate("alice")
    keys = ring(file, calendar)
    assert [opens(keys, key) for key in (old, new, third)] == [False, True, True]
    calendar.now += 999 * DAY
    assert opens(keys, new)  # no overlap was given: until it is removed
    with pytest.raises(ValueError, match="two valid keys; `mixtral-jax keys remove alice --old`"):
        file.rotate("alice")
    file.remove_old("alice")
    keys = ring(file, calendar)
    assert [opens(keys, key) for key in (new, third)] == [False, True]
    with pytest.raises(ValueError, match="one key only"):
        file.remove_old("alice")
    with pytest.raises(ValueError, match="no key 'bob'; its keys: alice"):
        file.rotate("bob")


def test_a_new_key_lives_as_long_as_the_old_one_did(file: KeyFile, calendar: Calendar) -> None:
    file.add("alice", lifetime=timedelta(days=30))
    calendar.now += 20 * DAY
    file.rotate("alice", overlap=timedelta(days=20))
    digests = file.read()[0].digests
    # The overlap shortens a life, and never lengthens it.
    assert [digest.expires for digest in digests] == [
        "2026-01-31T00:00:00+00:00",
        "2026-02-20T00:00:00+00:00",
    ]
    file.remove_old("alice")
    file.rotate("alice", lifetime=timedelta(days=1))
    assert file.read()[0].digests[-1].expires == "2026-01-22T00:00:00+00:00"
    with pytest.raises(ValueError, match="after the year 9999"):
        file.add("bob", lifetime=timedelta(weeks=999_999))


def write(file: KeyFile, *entries: Any) -> None:
    file.path.write_text(json.dumps({"keys": entries}), encoding="utf-8")
    file.path.chmod(0o600)


def test_entries_of_version_0_1_are_read_beside_new_ones(file: KeyFile, calendar: Calendar) -> None:
    old = {"name": "alice", "sha256": FIRST, "created": "2026-01-01T00:00:00+00:00"}
    digest = {"sha256": SECOND, "created": "2026-01-01T00:00:00+00:00", "expires": None}
    write(file, old, {"name": "bob", "role": "operator", "digests": [digest]})
    keys = ring(file, calendar)
    assert keys.find("first") == Caller("alice")
    assert keys.find("second") == Caller("bob", is_operator=True)
    file.add("carol")
    assert ring(file, calendar).find("first") == Caller("alice")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"role": "root"}, "role of alice"),
        ({"role": None}, "role of alice"),
        ({"digests": []}, "0 digests"),
        ({"digests": [{"sha256": FIRST, "created": "x"}] * 3}, "3 digests"),
        ({"digests": [{"sha256": FIRST}]}, "created"),
        ({"digests": [{"sha256": "no", "created": "x"}]}, "hex"),
        ({"digests": [{"sha256": FIRST, "created": "x", "expires": "soon"}]}, "soon"),
        ({"digests": [{"sha256": FIRST, "created": "x", "expires": "2026-01-01"}]}, "zone"),
        ({"limits": {"requests_per_minute": 0}}, "requests_per_minute of alice"),
        ({"limits": {"tokens_per_minute": True}}, "tokens_per_minute of alice"),
        ({"limits": {"concurrent_requests": "4"}}, "concurrent_requests of alice"),
        ({"limits": {"requests": 4}}, "requests"),
        ({"batch_only": 1}, "batch_only of alice"),
        ({"expire": "2026-01-01"}, "expire"),
        ({"name": "default"}, "cannot name a key"),
    ],
)
def test_an_entry_that_would_be_half_ignored_is_refused(
    file: KeyFile, changes: dict[str, Any], words: str
) -> None:
    entry = {"name": "alice", "digests": [{"sha256": FIRST, "created": "x"}]}
    write(file, entry)
    assert file.read()[0].caller == Caller("alice")
    write(file, entry | changes)
    with pytest.raises(ValueError, match=f"not a file of keys.*{words}"):
        file.read()


def test_the_documented_entry_is_one(file: KeyFile) -> None:
    page = (Path(__file__).parents[3] / "docs/secure.md").read_text(encoding="utf-8")
    file.path.write_text(page.partition("```json\n")[2].partition("```")[0], encoding="utf-8")
    file.path.chmod(0o600)
    (key,) = file.read()
    assert key.caller == Caller("alice", limits=CallerLimits(60, 100_000, 4))
    assert key.digests[0].expires_at == 1_775_001_600


def test_a_name_stands_once(file: KeyFile) -> None:
    entry = {"name": "alice", "sha256": FIRST, "created": ""}
    write(file, entry, entry | {"sha256": SECOND})
    with pytest.raises(ValueError, match="stands in it twice"):
        file.read()


def test_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def keys(*words: str) -> Result:
        return CliRunner().invoke(app, ["keys", *words, "--file", str(path)])

    limits = ["--requests-per-minute=60", "--tokens-per-minute=1000", "--concurrent=4"]
    added = keys("add", "alice", "--role", "operator", "--expires", "90d", *limits, "--batch-only")
    assert added.exit_code == 0, added.output
    key = added.stdout.strip()
    expected = Caller("alice", True, CallerLimits(60, 1000, 4), may_be_interactive=False)
    assert Keyring({}, KeyFile(path)).find(key) == expected
    # The audit line is on stderr and shows no key.
    assert added.stderr.startswith("mixtral-jax: added alice, operator, expiry 20")
    assert str(path) in added.stderr and key not in added.stderr
    rotated = keys("rotate", "alice", "--overlap", "7d")
    second = rotated.stdout.strip()
    assert Keyring({}, KeyFile(path)).find(second) == expected
    assert rotated.stderr.startswith("mixtral-jax: rotated alice") and second not in rotated.stderr
    listed = keys("list").stdout.splitlines()
    assert [line.split("\t")[::2] for line in listed] == [
        ["alice", "operator", "60 requests/min, 1000 tokens/min, 4 at once, batch only"]
    ] * 2
    assert not any(secret in "".join(listed) for secret in (key, second))
    removed = keys("remove", "alice", "--old")
    assert removed.stderr.startswith("mixtral-jax: removed the older key of alice")
    assert Keyring({}, KeyFile(path)).find(key) is None
    assert keys("remove", "alice").stderr == f"mixtral-jax: removed alice; {path}\n"
    for wrong in (
        ("add", "bob", "--expires", "90"),
        ("add", "bob", "--expires", "-1d"),
        ("add", "bob", "--concurrent", "0"),
        ("add", "bob", "--role", "root"),
        ("rotate", "alice"),
    ):
        assert keys(*wrong).exit_code != 0
    assert keys("list").stdout == ""
