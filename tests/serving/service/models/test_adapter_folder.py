"""The watched folder of adapters, looked at by hand before a host that only writes down."""

import os
import time
from pathlib import Path

import pytest

from mixtral_jax.errors import AdapterError
from serving.engine.adapters import NoRoom
from serving.errors import Overloaded
from serving.service.models.adapter_folder import AdapterFolder
from serving.service.models.served_models import ServedModels

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Host:
    """Has room for two adapters, whose digests are their weights; one of "broken" is refused."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.calls: list[str] = []

    def load_adapter(self, name: str, folder: Path) -> None:
        self.calls.append(f"load {name}")
        text = (folder / WEIGHTS).read_text(encoding="utf-8")
        if text == "broken":
            raise AdapterError(f"{folder} is damaged")
        if len(self.loaded) == 2:  # also an older one of this name is there until it is replaced
            raise NoRoom("no room; raise --max-adapters")
        self.loaded[name] = text

    def unload_adapter(self, name: str) -> None:
        self.calls.append(f"unload {name}")
        del self.loaded[name]

    def adapters(self) -> dict[str, str]:
        return self.loaded


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
def watch(tmp_path: Path, host: Host, failures: list[None]) -> AdapterFolder:
    names = ServedModels("toy", ["azureai"])
    return AdapterFolder(tmp_path, host, names.check_name, lambda: failures.append(None))


def look(watch: AdapterFolder, times: int = 2) -> None:
    for _ in range(times):
        watch.look()


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
    assert host.calls == ["load one", "load one", "load two", "unload one"]


def test_a_changed_one_takes_its_own_place_where_there_is_no_other(
    tmp_path: Path, host: Host, watch: AdapterFolder
) -> None:
    write(tmp_path, "one", "1")
    write(tmp_path, "two", "2")
    look(watch)
    write(tmp_path, "two", "22")
    look(watch, 3)
    assert host.loaded == {"one": "1", "two": "22"} and watch.num_failed == 0
    assert host.calls == ["load one", "load two", "load two", "unload two", "load two"]
    write(tmp_path, "two", "broken")
    look(watch, 3)
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
    assert host.calls == ["load one"] and host.loaded == {"one": "111"}


def test_a_broken_one_is_told_once_and_changes_nothing(
    tmp_path: Path,
    host: Host,
    watch: AdapterFolder,
    failures: list[None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, "good", "1")
    write(tmp_path, "bad", "broken")
    look(watch, 5)
    assert host.loaded == {"good": "1"} and watch.num_failed == len(failures) == 1
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        f"the adapter 'bad' is not loaded: {tmp_path / 'bad'} is damaged"
    ]
    write(tmp_path, "good", "broken")  # the one that was loaded stays
    look(watch, 3)
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
    def busy(name: str, folder: Path) -> None:
        raise Overloaded("wait for the slot")

    write(tmp_path, "one", "1")
    with monkeypatch.context() as patched:
        patched.setattr(host, "load_adapter", busy)
        look(watch, 5)
        assert watch.num_failed == 1
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    look(watch, 1)
    assert host.loaded == {"one": "1"} and watch.num_failed == 0


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
    assert host.calls == ["load one"]


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
