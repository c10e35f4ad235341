"""A store's folder of adapters is copied, file by file as they come, change and go."""

from collections.abc import Iterator

import pytest

from mixtral_jax.errors import AdapterError
from serving.launch.adapter_mirror import AdapterMirror
from tests.support.object_store import ObjectStore, running_store

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with running_store() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        store.buckets["bucket"] = {}
        yield store


def files(mirror: AdapterMirror) -> dict[str, bytes]:
    found = [file for file in mirror.folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(mirror.folder)): file.read_bytes() for file in found}


def test_files_come_change_and_go(store: ObjectStore) -> None:
    objects = store.buckets["bucket"]
    objects |= {f"lora/mine/{CONFIG}": b"1", f"lora/mine/{WEIGHTS}": b"2", "lora/mine/README": b""}
    objects |= {"lora/readme.txt": b"", f"lora/.new/{CONFIG}": b"", f"else/other/{CONFIG}": b""}
    mirror = AdapterMirror("s3://bucket/lora/")
    mirror.look()
    assert files(mirror) == {f"mine/{CONFIG}": b"1", f"mine/{WEIGHTS}": b"2"}
    # Files that are the same are not copied again.
    untouched = (mirror.folder / "mine" / CONFIG).stat().st_ino
    objects[f"lora/mine/{WEIGHTS}"] = b"3"
    objects[f"lora/yours/{CONFIG}"] = b"4"
    mirror.look()
    assert files(mirror)[f"mine/{WEIGHTS}"] == b"3" and files(mirror)[f"yours/{CONFIG}"] == b"4"
    assert (mirror.folder / "mine" / CONFIG).stat().st_ino == untouched
    del objects[f"lora/mine/{WEIGHTS}"], objects[f"lora/mine/{CONFIG}"]
    mirror.look()
    assert files(mirror) == {f"yours/{CONFIG}": b"4"}
    assert not (mirror.folder / "mine").exists()


def test_a_bucket_that_is_missing_ends_the_start(store: ObjectStore) -> None:
    with pytest.raises(
        AdapterError, match="s3://none/lora cannot be read: there is no such bucket"
    ):
        AdapterMirror("s3://none/lora").start()
