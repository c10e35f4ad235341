"""A checkpoint of any mesh onto any other: the same bits, each device its own part, and no more."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint.folder import Card, finished_at
from mixtral_jax.checkpoint.parameters import parameter_shapes
from mixtral_jax.checkpoint.restore import load, restore
from mixtral_jax.checkpoint.writer import ParameterWriter, save
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.sharding import make_mesh
from tests.support.models import model_of

ROOT = Path(__file__).parents[3]
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2), (8, 1, 1)]
CONFIG = replace(
    ModelConfig.tiny(vocab_size=32), num_layers=1, num_experts=8, num_heads=8, num_kv_heads=8
)
Expected = dict[str, np.ndarray]


# Chunks that are smaller than shards, and larger, and end within them; few at a time.
CHUNK_BYTES, IN_FLIGHT = 3000, 10_000


@pytest.fixture(
    scope="module", params=[pytest.param("bfloat16", marks=pytest.mark.soak), "int8", "fp8"]
)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(dtype: str) -> Expected:
    model = model_of(CONFIG, dtype=dtype, seed=3)
    return {name: np.asarray(v.get_value()) for name, v in named_parameters(model).items()}


@pytest.fixture
def written(dtype: str, expected: Expected, tmp_path: Path) -> Path:
    """As a conversion writes it."""
    folder = tmp_path / "written"
    with finished_at(folder) as partial:
        writer = ParameterWriter(partial, parameter_shapes(CONFIG, dtype), CHUNK_BYTES)
        for name, value in expected.items():
            writer.write(name, ..., value)
        Card(model=CONFIG, dtype=dtype, name="toy", provider="nobody").write(partial)
    return folder


def check(model: Transformer, expected: Expected, mesh: tuple[int, int, int]) -> None:
    """Each device holds its part of each parameter, and only that, bit for bit."""
    layout = model.layout
    assert layout is not None
    for name, variable in named_parameters(model).items():
        array, want = variable.get_value(), expected[name]
        assert array.dtype == want.dtype and array.shape == want.shape
        assert array.sharding.is_equivalent_to(
            layout.sharding(variable.get_metadata("axes")), array.ndim
        )
        assert len(array.addressable_shards) == 8
        part = array.sharding.shard_shape(array.shape)
        for shard in array.addressable_shards:
            assert shard.data.shape == part
            assert np.asarray(shard.data).tobytes() == want[shard.index].tobytes(), name
    gate = named_parameters(model)["layers.0.feed_forward.gate.weight"].get_value()
    _, expert, tensor = mesh
    held = gate.addressable_shards[0].data.shape
    assert held == (8 // expert, CONFIG.feed_forward_size // tensor, CONFIG.hidden_size)


@pytest.mark.slow
def test_what_was_converted_loads_onto_any_mesh(written: Path, expected: Expected) -> None:
    for mesh in MESHES:
        check(load(written, make_mesh(*mesh), bytes_in_flight=IN_FLIGHT)[0], expected, mesh)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(mesh, id=str(mesh), marks=() if mesh == (2, 2, 2) else pytest.mark.soak)
        for mesh in MESHES
    ],
)
def test_what_one_mesh_saved_loads_onto_any_other(
    source: tuple[int, int, int], written: Path, expected: Expected, tmp_path: Path
) -> None:
    model, card = load(written, make_mesh(*source), bytes_in_flight=IN_FLIGHT)
    saved = tmp_path / "saved"
    save(saved, model, card, [], CHUNK_BYTES)
    for mesh in MESHES:
        check(load(saved, make_mesh(*mesh), bytes_in_flight=IN_FLIGHT)[0], expected, mesh)


def test_one_device_holds_all(written: Path, expected: Expected) -> None:
    for name, variable in named_parameters(load(written, bytes_in_flight=IN_FLIGHT)[0]).items():
        array = variable.get_value()
        assert array.devices() == {jax.devices()[0]}
        assert np.asarray(array).tobytes() == expected[name].tobytes()


def test_a_float_is_cast_on_its_way(tmp_path: Path) -> None:
    value = np.linspace(-3, 3, 24, dtype=np.float32).reshape(6, 4)
    writer = ParameterWriter(tmp_path, {"a": jax.ShapeDtypeStruct(value.shape, value.dtype)})
    writer.write("a", ..., value)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.ShapeDtypeStruct(value.shape, jax.numpy.bfloat16, sharding=sharding)
    found = restore(tmp_path / "params", {"a": wanted})["a"]
    np.testing.assert_array_equal(found, value.astype(jax.numpy.bfloat16))


@pytest.mark.parametrize("chunk_bytes", [1 << 25, 3000])
def test_a_file_cut_short_is_named(tmp_path: Path, chunk_bytes: int) -> None:
    """With its array, where the index was not cut off too: it may lie in the same file."""
    value = np.arange(100_000, dtype=np.float32)
    shapes = {"a": jax.ShapeDtypeStruct(value.shape, value.dtype)}
    writer = ParameterWriter(tmp_path, shapes, chunk_bytes)
    writer.write("a", ..., value)
    file = max((tmp_path / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    damaged = "params(: a)? is damaged; copy the checkpoint or convert"
    with pytest.raises(ValueError, match=damaged):
        restore(tmp_path / "params", {"a": wanted})


def test_a_store_without_its_beginning_is_called_damaged(tmp_path: Path) -> None:
    ParameterWriter(tmp_path, {"a": jax.ShapeDtypeStruct((3,), np.dtype(np.float32))})
    (manifest,) = (tmp_path / "params").rglob("state/manifest.ocdbt")
    os.truncate(manifest, 10)
    with pytest.raises(ValueError, match="params is damaged; copy the checkpoint or convert"):
        restore(tmp_path / "params", {})


def test_another_models_checkpoint_is_refused(written: Path) -> None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = written / "params"

    def wanted(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
        dtype = Card.read(written).dtype
        return {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
            for name, shape in parameter_shapes(config, dtype).items()
        }

    with pytest.raises(ValueError, match="params lacks layers.1.attention"):
        restore(params, wanted(replace(CONFIG, num_layers=2)))
    with pytest.raises(ValueError, match="params has head.*, unlike the model"):
        restore(params, wanted(replace(CONFIG, tied_embeddings=True)))
    with pytest.raises(ValueError, match=r"has the shape \(32,.*, not \(64,"):
        restore(params, wanted(replace(CONFIG, vocab_size=64)))


@pytest.mark.soak
def test_four_processes_hold_no_more_than_their_parts(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.restore_memory", "--size-gb", "1.5"]
    command += ["--narrow", "2", "--dtype", "bfloat16", "--mesh", "1,8,1", "--mesh", "2,2,2"]
    command += ["--verify", "--json", str(figures), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reports = json.loads(figures.read_text())
    assert len(reports) == 8
    quarter = [report for report in reports if report["mesh"] == "1,8,1"]
    whole = sum(report["share"] for report in quarter)
    # Not even the part itself a second time, to say nothing of the whole.
    allowed = 256 << 20
    assert min(report["share"] for report in quarter) > allowed and whole > 1.2e9
    for report in reports:
        assert report["peak"] - report["before"] - report["share"] < allowed, report
