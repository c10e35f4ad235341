"""Saving, restoring under another mesh, and folders that are whole or not there."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from mixtral_jax.checkpoint.folder import Card, finished_at
from mixtral_jax.checkpoint.parameters import chunk_shape, parameter_shapes
from mixtral_jax.checkpoint.restore import load
from mixtral_jax.checkpoint.writer import ParameterWriter, save
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sharding import make_mesh
from tests.support.models import model_of

CONFIG = ModelConfig.tiny(vocab_size=32)
CARD = Card(model=CONFIG, dtype="float32", name="toy", provider="nobody")
TOKENS = jnp.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return model_of(CONFIG, seed=2)


@pytest.fixture(scope="module")
def folder(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "toy"
    save(path, model, CARD, [])
    return path


def test_what_is_saved_is_loaded(model: Transformer, folder: Path) -> None:
    loaded, card = load(folder)
    assert card == CARD
    np.testing.assert_array_equal(loaded(TOKENS), model(TOKENS))


def test_a_mesh_gets_its_shards(model: Transformer, folder: Path) -> None:
    loaded, _ = load(folder, make_mesh(data=1, expert=4, tensor=2))
    gate = loaded.layers[0].feed_forward.gate.weight.get_value()
    assert gate.shape == (4, 96, 64)
    assert {shard.data.shape for shard in gate.addressable_shards} == {(1, 48, 64)}
    logits = jax.jit(lambda model, tokens: model(tokens))
    np.testing.assert_allclose(logits(loaded, TOKENS), logits(model, TOKENS), rtol=0, atol=1e-5)


def test_the_stored_dtype_can_be_overridden(folder: Path) -> None:
    loaded, _ = load(folder, dtype="bfloat16")
    assert loaded.embed.weight.get_value().dtype == jnp.bfloat16


def test_written_in_pieces_it_is_a_plain_orbax_checkpoint(tmp_path: Path) -> None:
    shapes = {
        "embed.weight": jax.ShapeDtypeStruct((6, 4), jnp.bfloat16),
        "layers.0.gate.weight": jax.ShapeDtypeStruct((3, 5, 2), jnp.float32),
    }
    writer = ParameterWriter(tmp_path, shapes)
    for expert in range(3):
        writer.write("layers.0.gate.weight", expert, np.full((5, 2), expert, np.float32))
    writer.write("embed.weight", slice(0, 4), np.ones((4, 4), jnp.bfloat16))
    writer.write("embed.weight", slice(4, 6), np.zeros((2, 4), jnp.bfloat16))
    tree = ocp.load(tmp_path / "params")
    assert tree["layers"]["0"]["gate"]["weight"][:, 4, 1].tolist() == [0, 1, 2]
    assert tree["embed"]["weight"][:, 0].tolist() == [1, 1, 1, 1, 0, 0]
    assert tree["embed"]["weight"].dtype == jnp.bfloat16


def test_chunks_cut_leading_axes_evenly() -> None:
    def chunks(*shape: int) -> tuple[int, ...]:
        return chunk_shape(jax.ShapeDtypeStruct(shape, jnp.bfloat16))

    assert chunks(4096) == (4096,)
    # One expert's matrix is 112 MiB: four chunks of 28 MiB, none of them partly empty.
    assert chunks(8, 14_336, 4096) == (1, 3584, 4096)
    assert chunks(8, 4096) == (8, 4096)


def test_an_error_leaves_nothing_and_a_stale_attempt_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with pytest.raises(RuntimeError), finished_at(path) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "left").write_text("x")
    with finished_at(path) as partial:
        (partial / "whole").write_text("x")
    assert [file.name for file in path.iterdir()] == ["whole"]
    with pytest.raises(FileExistsError, match="is not empty"), finished_at(path):
        pass


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the folder that"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(ConfigError, match="convert it first"):
        load(tmp_path)


def test_shapes_know_the_dtype() -> None:
    assert parameter_shapes(CONFIG, "bfloat16")["norm.weight"].dtype == jnp.bfloat16
