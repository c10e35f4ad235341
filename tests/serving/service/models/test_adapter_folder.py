"""The watched folder of adapters, looked at by hand before a host that only writes down."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.errors import AdapterError
from serving.engine.adapters import NoRoom, SlotsBusy
from serving.errors import Overloaded
from serving.service.models.adapter_folder import SETTLE_SECONDS, AdapterFolder
from serving.service.models.served_models import ServedModels

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Host:
    """Has two slots for adapters, whose digests are their files; one of "broken" is refused.

    `num_held` slots are of adapters that were unloaded while `busy` ones still answered.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.calls: list[str] = []
        self.busy: set[str] = set()
        self.num_held = 0
        self.on_read: Callable[[], object] = lambda: None

    def read(self, name: str, folder: Path) -> Callable[[], None]:
        self.calls.append(f"read {name}")
        files = [folder / CONFIG, folder / WEIGHTS]
        if not all(file.is_file() for file in files):
            raise AdapterError(f"{folder} is half an adapter")
        config, weights = (file.read_text(encoding="utf-8") for file in files)
        self.on_read()
        if "broken" in (config, weights):
            raise AdapterError(f"{folder} is damaged")

        def load() -> None:
            if len(self.loaded) + self.num_held == 2:
                if self.num_held:
                    raise SlotsBusy(f"'{name}' waits")
                raise NoRoom("no room; raise --max-adapters")
            self.calls.append(f"load {name}")
            self.loaded[name] = weights if config == "{}" else config + weights

        return load

    def unload(self, name: str) -> None:
        self.calls.append(f"unload {name}")
        self.num_held += name in self.busy
        del self.loaded[name]

    def digests(self) -> dict[str, str]:
        return self.loaded

    @property
    def changes(self) -> list[str]:
        return [call for call in self.calls if not call.startswith("read")]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write(folder: Path, name: str, weights: str) -> None:
    place = folder / name
    place.mkdir(exist_ok=True)
    (place / CONFIG).write_text("{}", encoding="utf-8")
    (place / WEIGHTS).write_text(weights, encoding="utf-8")


def remove(folder: Path, name: str) -> None:
    for file in (folder / name).iterdir():
        file.unlink()
    (folder / name).rmdir()


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def failures() -> list[None]:
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(tmp_path: Path, host: Host, failures: list[None], clock: Clock) -> AdapterFolder:
    names = ServedModels("toy", ["azureai"])
    return AdapterFolder(tmp_path, host, names.check_name, lambda: failures.append(None), clock)


def look(watch: AdapterFolder, times: int = 2) -> None:
    """So many looks within a second."""
    for _ in range(times):
        watch.look()


def settle(watch: AdapterFolder, clock: Clock) -> None:
    """Looks for as long as half a copy is waited for."""
    look(watch)
    clock.now += SETTLE_SECONDS
    look(watch)


def test_adapters_come_change_and_go(tmp_path: Path, host: Host, watch: AdapterFolder) -> None:
    look(watch)
    write(tmp_path, "one", "1")
    watch.look()
    assert host.loaded == {}  # it may still be written
    watch.look()
    assert host.loaded == {"one": "1"}
    write(tmp_path, "two", "2")
    write(tmp_path, "one", "11")
    look(watch, 3)
    assert host.loaded == {"one": "11", "two": "2"}
    remove(tmp_path, "one")
    look(watch)
    assert host.loaded == {"two": "2"}
    assert host.changes == ["load one", "load one", "load two", "unload one"]


def test_a_changed_one_takes_its_own_place_where_there_is_no_other(
    tmp_path: Path, host: Host, watch: AdapterFolder, clock: Clock
) -> None:
    write(tmp_path, "one", "1")
    write(tmp_path, "two", "2")
    look(watch)
    write(tmp_path, "two", "22")
    look(watch, 3)
    assert host.loaded == {"one": "1", "two": "22"} and watch.num_failed == 0
    assert host.changes == ["load one", "load two", "unload two", "load two"]
    write(tmp_path, "two", "broken")
    settle(watch, clock)
    assert host.loaded == {"one": "1", "two": "22"} and watch.num_failed == 1


def test_what_is_being_written_is_left_alone(
    tmp_path: Path, host: Host, watch: AdapterFolder
) -> None:
    for size in range(1, 4):
        write(tmp_path, "one", "1" * size)
        watch.look()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / CONFIG).write_text("{}", encoding="utf-8")
    write(tmp_path, ".hidden", "3")
    (tmp_path / "file").write_text("", encoding="utf-8")
    look(watch)
    assert host.changes == ["load one"] and host.loaded == {"one": "111"}


def test_a_broken_one_is_told_once_and_changes_nothing(
    tmp_path: Path,
    host: Host,
    watch: AdapterFolder,
    failures: list[None],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, "good", "1")
    write(tmp_path, "bad", "broken")
    look(watch, 5)
    assert host.loaded == {"good": "1"} and watch.num_failed == len(failures) == 0
    settle(watch, clock)
    look(watch, 5)
    assert host.loaded == {"good": "1"} and watch.num_failed == len(failures) == 1
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        f"the adapter 'bad' is not loaded: {tmp_path / 'bad'} is damaged"
    ]
    write(tmp_path, "good", "broken")  # the one that was loaded stays
    settle(watch, clock)
    assert host.loaded == {"good": "1"} and watch.num_failed == 2
    write(tmp_path, "bad", "2")
    write(tmp_path, "good", "3")
    look(watch, 3)
    assert host.loaded == {"good": "3", "bad": "2"} and watch.num_failed == 0


def test_what_may_pass_is_tried_again_and_told_once(
    tmp_path: Path,
    host: Host,
    watch: AdapterFolder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def busy(name: str, folder: Path) -> Callable[[], None]:
        def load() -> None:
            raise Overloaded("come again")

        return load

    write(tmp_path, "one", "1")
    with monkeypatch.context() as patched:
        patched.setattr(host, "read", busy)
        look(watch, 5)
        assert watch.num_failed == 1
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    look(watch, 1)
    assert host.loaded == {"one": "1"} and watch.num_failed == 0


def test_half_a_copy_is_neither_loaded_nor_an_error(
    tmp_path: Path, host: Host, watch: AdapterFolder, failures: list[None], clock: Clock
) -> None:
    """The config comes first, and the weights in two parts, with pauses of several looks."""
    place = tmp_path / "one"
    place.mkdir()
    for file, text in [(CONFIG, "{}"), (WEIGHTS, "broken"), (WEIGHTS, "1")]:
        (place / file).write_text(text, encoding="utf-8")
        clock.now += SETTLE_SECONDS - 1
        look(watch, 5)
        clock.now += SETTLE_SECONDS / 2
        assert failures == [] and watch.num_failed == 0
        assert host.loaded == ({"one": "1"} if text == "1" else {})
    assert host.changes == ["load one"]
    (tmp_path / "bin").mkdir()  # one that stays so is an error
    (tmp_path / "bin" / CONFIG).write_text("{}", encoding="utf-8")
    settle(watch, clock)
    assert watch.num_failed == len(failures) == 1


def test_an_older_half_and_a_newer_one_are_no_adapter(
    tmp_path: Path, host: Host, watch: AdapterFolder, clock: Clock
) -> None:
    write(tmp_path, "one", "1")
    look(watch)
    place = tmp_path / "one"
    (place / CONFIG).write_text("2", encoding="utf-8")
    look(watch, 5)
    partial = place / ".adapter_model.safetensors.xY3"  # as rsync does
    for size in range(5):
        clock.now += SETTLE_SECONDS - 1
        partial.write_text("2" * size, encoding="utf-8")
        look(watch, 5)
    assert host.loaded == {"one": "1"} and host.calls.count("read one") == 1
    partial.rename(place / WEIGHTS)
    look(watch)
    assert host.loaded == {"one": "22222"}
    (place / CONFIG).write_text("3", encoding="utf-8")  # one that was changed alone, by intent
    look(watch, 5)
    assert host.loaded == {"one": "22222"}
    settle(watch, clock)
    assert host.loaded == {"one": "32222"} and watch.num_failed == 0


def test_what_changes_while_it_is_read_is_read_again(
    tmp_path: Path, host: Host, watch: AdapterFolder
) -> None:
    write(tmp_path, "one", "1")
    watch.look()
    host.on_read = lambda: write(tmp_path, "one", "22")
    watch.look()
    assert host.calls == ["read one"]
    host.on_read = lambda: None
    look(watch)
    assert host.loaded == {"one": "22"} and watch.num_failed == 0


def test_one_that_waits_for_requests_holds_up_no_other(
    tmp_path: Path,
    host: Host,
    watch: AdapterFolder,
    failures: list[None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a sleep: a look returns at once, and the one that waits keeps its turn."""
    caplog.set_level("INFO")
    host.busy = {"z"}
    write(tmp_path, "b", "1")
    write(tmp_path, "z", "1")
    look(watch)
    write(tmp_path, "z", "2")
    look(watch, 5)
    assert host.loaded == {"b": "1"} and host.num_held == 1
    assert [r.message for r in caplog.records].count("'z' waits") == 1
    write(tmp_path, "a", "1")
    look(watch, 5)
    remove(tmp_path, "b")
    watch.look()
    assert host.loaded == {"z": "2"}  # in the place of b, before a
    watch.look()
    assert host.loaded == {"z": "2"}
    host.num_held = 0  # the requests have ended
    watch.look()
    assert host.loaded == {"a": "1", "z": "2"}
    assert host.calls.count("read z") == 2 and failures == [] and watch.num_failed == 0


def test_links_may_lead_to_other_places_of_the_folder_and_not_out_of_it(
    tmp_path: Path, host: Host, failures: list[None], clock: Clock
) -> None:
    folder, outside = tmp_path / "followed", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    write(outside, "secret", "1")
    write(folder, ".v1", "1")
    write(folder, ".v2", "2")
    watch = AdapterFolder(folder, host, lambda name: None, lambda: failures.append(None), clock)
    (folder / "mine").symlink_to(".v1")
    (folder / "theirs").symlink_to(outside / "secret")
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("nothing")
    (folder / "file").mkdir()
    (folder / "file" / CONFIG).symlink_to(outside / "secret" / CONFIG)
    (folder / "file" / WEIGHTS).symlink_to(folder / ".v1" / WEIGHTS)
    look(watch)
    assert host.calls == ["read mine", "load mine"] and host.loaded == {"mine": "1"}
    assert watch.num_failed == 3  # theirs, file, loop
    os.unlink(folder / "mine")
    (folder / "mine").symlink_to(".v2")
    look(watch)
    assert host.loaded == {"mine": "2"}


def test_one_that_cannot_be_looked_at_stays_as_it_is(
    tmp_path: Path,
    host: Host,
    watch: AdapterFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, "one", "1")
    write(tmp_path, "two", "2")
    look(watch)
    stat = Path.stat

    def refused(path: Path, **given: Any) -> os.stat_result:
        if path.parent.name == "one":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **given)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", refused)
        write(tmp_path, "two", "22")
        look(watch, 3)
    assert host.loaded == {"one": "1", "two": "22"} and watch.num_failed == 1
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    look(watch)
    assert host.loaded == {"one": "1", "two": "22"} and watch.num_failed == 0


def test_a_bug_in_reading_ends_no_other(
    tmp_path: Path, host: Host, watch: AdapterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = host.read

    def fails(name: str, folder: Path) -> Callable[[], None]:
        if name == "a":
            raise ZeroDivisionError("a bug")
        return read(name, folder)

    monkeypatch.setattr(host, "read", fails)
    write(tmp_path, "a", "1")
    write(tmp_path, "b", "2")
    look(watch, 3)
    assert host.loaded == {"b": "2"} and watch.num_failed == 1


def test_one_without_room_is_loaded_when_another_goes(
    tmp_path: Path, host: Host, watch: AdapterFolder
) -> None:
    for name in "abc":
        write(tmp_path, name, name)
    look(watch, 4)
    assert host.loaded.keys() == {"a", "b"} and watch.num_failed == 1
    remove(tmp_path, "a")
    look(watch)
    assert host.loaded.keys() == {"b", "c"} and watch.num_failed == 0
    remove(tmp_path, "c")
    look(watch)
    assert host.loaded.keys() == {"b"}


@pytest.mark.parametrize("name", ["toy", "azureai", "a b", "x" * 129, "ü", "-a"])
def test_some_names_are_not_for_adapters(
    tmp_path: Path, host: Host, watch: AdapterFolder, failures: list[None], name: str
) -> None:
    write(tmp_path, name, "1")
    look(watch, 3)
    assert host.calls == [] and len(failures) == 1
    remove(tmp_path, name)
    look(watch)
    assert watch.num_failed == 0


def test_a_folder_that_cannot_be_read_unloads_nothing(
    tmp_path: Path, host: Host, watch: AdapterFolder, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "one", "1")
    look(watch)
    os.rename(tmp_path, tmp_path.with_name("away"))
    look(watch, 3)
    assert host.loaded == {"one": "1"} and len(caplog.records) == 1
    os.rename(tmp_path.with_name("away"), tmp_path)
    look(watch)
    assert host.changes == ["load one"]


def test_a_thread_looks(
    tmp_path: Path, host: Host, watch: AdapterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.service.models.adapter_folder.LOOK_SECONDS", 0.01)
    write(tmp_path, "one", "1")
    watch.start()
    assert host.loaded == {"one": "1"}  # before anybody can ask for it
    write(tmp_path, "two", "2")
    deadline = time.monotonic() + 10
    while "two" not in host.loaded:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    watch.stop()
    assert not watch._thread.is_alive()
