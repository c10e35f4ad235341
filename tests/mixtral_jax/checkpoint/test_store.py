"""Checkpoints and adapters in object stores: what is read is what stands in a local folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.checkpoint.store import place_of, spec
from mixtral_jax.errors import AdapterError, CheckpointError, ConfigError
from mixtral_jax.model.adapter import Adapter, AdapterConfig
from mixtral_jax.model.transformer import named_parameters
from tests.support.object_store import ObjectStore, running_store


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with running_store() as store:
        yield store


@pytest.fixture(autouse=True)
def reachable(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def local(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, which is in the bucket too, as `models/tiny`."""
    folder = tmp_path_factory.mktemp("local") / "tiny"
    mixtral_jax.save(*mixtral_jax.load("tiny-random"), folder)
    store.upload(folder, "bucket", "models/tiny")
    return folder


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("mesh", [None, "expert=4,tensor=2"])
def test_a_checkpoint_of_a_store_is_the_local_one_bit_for_bit(
    local: Path, scheme: str, mesh: str | None
) -> None:
    model, tokenizer = mixtral_jax.load(f"{scheme}://bucket/models/tiny/", mesh)
    want, their_tokenizer = mixtral_jax.load(local, mesh)
    assert tokenizer is not None and their_tokenizer is not None
    assert tokenizer.encode("a fox") == their_tokenizer.encode("a fox")
    loaded, wanted = named_parameters(model), named_parameters(want)
    assert loaded.keys() == wanted.keys()
    for name, variable in wanted.items():
        ours, theirs = loaded[name].get_value(), variable.get_value()
        assert ours.sharding == theirs.sharding
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_an_adapter_of_a_store_is_the_local_one(
    local: Path, store: ObjectStore, tmp_path: Path
) -> None:
    model, _ = mixtral_jax.load(local, mesh=None)
    made = Adapter.random(model.config, AdapterConfig(rank=2), jax.random.key(0))
    mixtral_jax.save_adapter(made, tmp_path / "mine", base="tiny")
    store.upload(tmp_path / "mine", "bucket", "adapters/mine")
    ours = mixtral_jax.load_adapter("s3://bucket/adapters/mine", model)
    jax.tree.map(
        np.testing.assert_array_equal, ours, mixtral_jax.load_adapter(tmp_path / "mine", model)
    )
    with pytest.raises(AdapterError, match="^s3://bucket/adapters/none is no adapter: it has no"):
        mixtral_jax.load_adapter("s3://bucket/adapters/none", model)


def test_a_missing_bucket_or_folder_is_named(local: Path) -> None:
    """Google's store lists nothing for a bucket that there is not."""
    with pytest.raises(CheckpointError, match="^s3://other/x cannot be read: there is no such bu"):
        open_pretrained("s3://other/x")
    for url in ("gs://other/x", "gs://bucket/models/none", "s3://bucket/models/none"):
        with pytest.raises(ConfigError, match=f"^{url} has no config.json, or there is no such bu"):
            open_pretrained(url)
    for url in ("s3:///models", "s3://"):
        with pytest.raises(CheckpointError, match="names no bucket; give s3://BUCKET/FOLDER"):
            open_pretrained(url)


def test_a_url_of_another_store_is_no_folder(local: Path, tmp_path: Path) -> None:
    """As a path it would be a folder "az:" of this machine, which `save` would make."""
    unknown = "^az://bucket/x is in no store that is known; give gs://BUCKET/FOLDER, s3://BUCKET"
    model, words = mixtral_jax.load(local, mesh=None)
    with pytest.raises(CheckpointError, match=unknown):
        open_pretrained("az://bucket/x")
    with pytest.raises(CheckpointError, match=unknown):
        mixtral_jax.save(model, words, "az://bucket/x")
    with pytest.raises(AdapterError, match=unknown):
        mixtral_jax.load_adapter("az://bucket/x", model)
    with pytest.raises(AdapterError, match=unknown):
        place_of("az://bucket/x", AdapterError)
    assert place_of(str(tmp_path)) == tmp_path and place_of("gs://b") == "gs://b"


def test_a_missing_array_is_named(local: Path, store: ObjectStore) -> None:
    store.buckets["cut"] = {
        name: content for name, content in store.buckets["bucket"].items() if "/d/" not in name
    }
    with pytest.raises(CheckpointError, match="^s3://cut/models/tiny/params.* cannot be read"):
        mixtral_jax.load("s3://cut/models/tiny", mesh=None)


def test_without_credentials_one_error_names_them(local: Path, store: ObjectStore) -> None:
    """In a process of its own, because credentials are kept by a process."""
    environment = os.environ | store.environment()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del environment[name]
    program = "from mixtral_jax.checkpoint.pretrained import open_pretrained as read; import sys\n"
    program += "try: read('s3://bucket/models/tiny')\nexcept ValueError as error: print(error)\n"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (
        "s3://bucket/models/tiny cannot be read: the store refuses it; give a role, or "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, that may do this"
    )


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_what_is_saved_in_a_store_is_what_is_saved_locally(
    local: Path, store: ObjectStore, scheme: str
) -> None:
    """The config comes last, so that a process that was killed has left no checkpoint."""
    store.buckets["new"] = {}
    store.requests.clear()
    mixtral_jax.save(*mixtral_jax.load(local, mesh=None), f"{scheme}://new/tiny")
    writes = [line for line in store.requests if line.startswith(("PUT", "POST"))]
    assert writes[-1].endswith("new/tiny/config.json") and len(writes) > 5
    loaded = named_parameters(mixtral_jax.load(f"{scheme}://new/tiny", mesh=None)[0])
    for name, variable in named_parameters(mixtral_jax.load(local, mesh=None)[0]).items():
        np.testing.assert_array_equal(loaded[name].get_value(), variable.get_value())
    with pytest.raises(FileExistsError, match=f"{scheme}://new/tiny exists and is not empty"):
        mixtral_jax.save(*mixtral_jax.load(local, mesh=None), f"{scheme}://new/tiny")


def test_specs_of_tensorstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an endpoint tensorstore finds Amazon's, and the region of the bucket."""
    assert spec("gs://bucket/a/b/") == {"driver": "gcs", "bucket": "bucket", "path": "a/b/"}
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert spec("s3://bucket") == {"driver": "s3", "bucket": "bucket", "path": ""}
