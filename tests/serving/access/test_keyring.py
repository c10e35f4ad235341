"""Keys in a file, and how a server follows it."""

import errno
import hashlib
import hmac
import json
import os
import resource
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixtral_jax.cli.main import app
from serving.access.key_file import KeyFile, StoredKey
from serving.access.keyring import RELOAD_SECONDS, Keyring, check_key


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "settings" / "keys.json")


def names(ring: Keyring, *keys: str) -> list[str | None]:
    """The callers that these keys belong to."""
    callers = [ring.find(key) for key in keys]
    return [None if caller is None else caller.name for caller in callers]


def test_a_key_is_random_and_only_its_digest_is_kept(file: KeyFile) -> None:
    one, other = file.add("alice"), file.add("bob")
    assert len(one) == len(other) == 32 and one != other
    assert one not in file.path.read_text()
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert [key.name for key in file.read()] == ["alice", "bob"]
    ring = Keyring({}, file)
    assert names(ring, one, other) == ["alice", "bob"]
    for wrong in (
        "",
        one[:-1],
        one + "0",
        one.upper(),
        "alice",
        file.read()[0].digests[0].sha256,
        "\xe9",
    ):
        assert ring.find(wrong) is None
    file.remove("alice")
    assert [key.name for key in file.read()] == ["bob"]
    assert [path.name for path in file.path.parent.iterdir()] == ["keys.json"]


def test_the_digest_is_sha256(file: KeyFile) -> None:
    """`printf secret | sha256sum`, so that a key can be put there by other means."""
    digest = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
    write(file, {"keys": [{"name": "alice", "sha256": digest, "created": "2026-01-01"}]})
    assert names(Keyring({}, file), "secret") == ["alice"]


@pytest.mark.parametrize("name", ["", "default", "gateway", "anonymous", "entra:x", "a b", "-a"])
def test_names_that_a_key_cannot_have(file: KeyFile, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a key"):
        file.add(name)
    assert not file.path.exists()


def test_a_name_is_given_once_and_taken_away_once(file: KeyFile) -> None:
    key = file.add("alice")
    with pytest.raises(ValueError, match="has a key 'alice'"):
        file.add("alice")
    assert names(Keyring({}, file), key) == ["alice"]
    with pytest.raises(ValueError, match="no key 'bob'; its keys: alice"):
        file.remove("bob")


def test_keys_that_are_added_at_once_are_all_kept(file: KeyFile) -> None:
    names = [f"caller{i}" for i in range(16)]
    threads = [threading.Thread(target=file.add, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.name for key in file.read()) == sorted(names)


def test_a_keyring_follows_its_file(file: KeyFile) -> None:
    clock = Clock()
    old = file.add("old")
    ring = Keyring({"default": "fixed"}, file, clock)
    new = file.add("new")
    file.remove("old")
    assert names(ring, "fixed", old, new) == ["default", "old", None]
    clock.now += RELOAD_SECONDS
    assert names(ring, "fixed", old, new) == ["default", None, "new"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"keys": [1]}', '{"keys": [{}]}', None])
def test_a_broken_file_keeps_the_old_keys_and_is_told_once(
    file: KeyFile, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    key = file.add("alice")
    ring = Keyring({}, file, clock)
    if content is None:
        file.path.unlink()
    else:
        file.path.write_text(content)
    for _ in range(3):
        clock.now += RELOAD_SECONDS
        assert names(ring, key) == ["alice"]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert str(file.path) in caplog.text
    file.path.unlink(missing_ok=True)
    other = file.add("bob")
    clock.now += RELOAD_SECONDS
    assert names(ring, key, other) == [None, "bob"]


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_read_that_fails_is_tried_again_each_second(
    file: KeyFile, error: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    alice, bob = file.add("alice"), file.add("bob")
    ring = Keyring({}, file, clock)
    file.remove("alice")
    reads = 0

    def fail() -> list[StoredKey]:
        nonlocal reads
        reads += 1
        raise OSError(error, os.strerror(error))

    caplog.set_level("INFO")
    with monkeypatch.context() as broken:
        broken.setattr(file, "read", fail)
        for seconds in range(1, 6):
            clock.now += RELOAD_SECONDS
            assert names(ring, alice, bob) == ["alice", "bob"]
            assert (reads, ring.reload_failed) == (seconds, True)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    clock.now += RELOAD_SECONDS
    assert names(ring, alice, bob) == [None, "bob"]
    assert not ring.reload_failed
    assert "1 keys, 0 of operators, 0 expired" in caplog.text
    monkeypatch.setattr(file, "read", fail)  # nothing has changed: nothing is read
    clock.now += RELOAD_SECONDS
    assert names(ring, bob) == ["bob"] and reads == 5


def test_wrong_content_is_read_once(file: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    key = file.add("alice")
    ring = Keyring({}, file, clock)
    reads: list[None] = []
    read = file.read

    def count() -> list[StoredKey]:
        reads.append(None)
        return read()

    monkeypatch.setattr(file, "read", count)
    file.path.write_text("{", encoding="utf-8")
    for _ in range(5):
        clock.now += RELOAD_SECONDS
        assert names(ring, key) == ["alice"] and ring.reload_failed
    assert len(reads) == 1


def test_every_digest_is_compared_whatever_is_presented(
    file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a look-up tells neither whether a key is right nor which one it is."""
    keys = [file.add(name) for name in ("alice", "bob", "carol")]
    ring = Keyring({"default": "the-first-of-all"}, file)
    compare, compared = hmac.compare_digest, 0

    def count(one: bytes, other: bytes) -> bool:
        nonlocal compared
        compared += 1
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", count)
    for presented in ("the-first-of-all", *keys, "wrong", ""):
        compared = 0
        ring.find(presented)
        assert compared == 4


def test_a_key_of_two_names_is_the_first_ones_that_is_valid(file: KeyFile) -> None:
    digest, created = hashlib.sha256(b"shared").hexdigest(), "2026-01-01T00:00:00+00:00"
    old = {"sha256": digest, "created": created, "expires": created}
    shared = {"sha256": digest, "created": created}
    write(
        file,
        {
            "keys": [
                {"name": "expired", "digests": [old]},
                {"name": "alice", "digests": [shared]},
                {"name": "bob", "digests": [shared]},
            ]
        },
    )
    assert names(Keyring({}, file), "shared") == ["alice"]
    assert names(Keyring({"default": "shared"}, file), "shared") == ["default"]


def test_a_removed_key_opens_no_longer_than_the_process_lacks_descriptors(
    file: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    """Finding 5 of the review: 300 idle connections kept a revoked key valid for ever."""
    clock = Clock()
    alice, bob = file.add("alice"), file.add("bob")
    ring = Keyring({}, file, clock)
    file.remove("alice")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        for _ in range(60):
            clock.now += RELOAD_SECONDS
            assert names(ring, alice, bob) == ["alice", "bob"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ring.reload_failed and caplog.text.count("Too many open files") == 1
    clock.now += RELOAD_SECONDS
    assert names(ring, alice, bob) == [None, "bob"]
    assert not ring.reload_failed


def test_a_file_that_comes_back_unchanged_is_read_again(file: KeyFile) -> None:
    clock = Clock()
    key = file.add("alice")
    ring = Keyring({}, file, clock)
    away = file.path.with_suffix(".away")
    file.path.rename(away)
    clock.now += RELOAD_SECONDS
    assert names(ring, key) == ["alice"] and ring.reload_failed
    away.rename(file.path)
    clock.now += RELOAD_SECONDS
    assert names(ring, key) == ["alice"] and not ring.reload_failed


def test_entries_that_are_not_as_written_here(file: KeyFile) -> None:
    digest = "00" * 32
    for entry in (
        {"name": "alice", "sha256": digest[2:], "created": ""},
        {"name": "alice", "sha256": "x" * 64, "created": ""},
        {"name": "alice", "sha256": 5, "created": ""},
        {"name": "gateway", "sha256": digest, "created": ""},
        {"name": 5, "sha256": digest, "created": ""},
        {"name": "alice", "sha256": digest, "created": "", "key": "secret"},
    ):
        write(file, {"keys": [entry]})
        with pytest.raises(ValueError, match="not a file of keys"):
            file.read()


def test_a_file_that_others_may_write_is_refused(file: KeyFile) -> None:
    file.add("alice")
    os.chmod(file.path, 0o620)
    with pytest.raises(ValueError, match="chmod 600"):
        Keyring({}, file)


def test_a_link_stays_a_link(file: KeyFile, tmp_path: Path) -> None:
    file.add("alice")
    link = KeyFile(tmp_path / "link.json")
    link.path.symlink_to(file.path)
    link.add("bob")
    assert link.path.is_symlink()
    assert [key.name for key in file.read()] == ["alice", "bob"]


@pytest.mark.parametrize("key", ["", "with space", "line\n", "clé"])
def test_keys_that_no_header_could_carry_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="visible ASCII"):
        Keyring({"default": key})
    with pytest.raises(ValueError, match="visible ASCII"):
        check_key(key, "MIXTRAL_JAX_API_KEY")


def test_keys_of_the_environment_that_can_be_guessed_are_refused() -> None:
    with pytest.raises(ValueError, match="MIXTRAL_JAX_API_KEY .* 15 characters .*openssl rand"):
        check_key("k" * 15, "MIXTRAL_JAX_API_KEY")
    check_key("k" * 16, "MIXTRAL_JAX_API_KEY")


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    run = CliRunner()
    added = run.invoke(app, ["keys", "add", "alice"])
    key = added.stdout.strip()
    ring = Keyring({}, KeyFile(tmp_path / "mixtral-jax" / "keys.json"))
    assert names(ring, key) == ["alice"]
    elsewhere = ["--file", str(tmp_path / "mine.json")]
    assert run.invoke(app, ["keys", "add", "bob", *elsewhere]).exit_code == 0
    assert run.invoke(app, ["keys", "list", *elsewhere]).stdout.startswith("bob\t20")
    assert run.invoke(app, ["keys", "list"]).stdout.startswith("alice\t20")
    assert run.invoke(app, ["keys", "remove", "alice"]).exit_code == 0
    assert run.invoke(app, ["keys", "list"]).stdout == ""
    assert run.invoke(app, ["keys", "remove", "alice"]).exit_code != 0


def write(file: KeyFile, content: object) -> None:
    file.path.parent.mkdir(exist_ok=True)
    file.path.write_text(json.dumps(content))
