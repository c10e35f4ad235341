"""Parameters written in pieces make a plain Orbax checkpoint."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from mixtral_jax.checkpoint.writer import ParameterReader, ParameterWriter
from mixtral_jax.config import ModelConfig


def test_a_piece_may_change_once_it_is_written(tmp_path: Path) -> None:
    """Buffers are used again. The smallest arrays are kept elsewhere by the store: try both."""
    shapes = {
        name: jax.ShapeDtypeStruct((size,), jnp.float32)
        for name, size in dict(a=8, b=8, c=100_000, d=100_000).items()
    }
    writer = ParameterWriter(tmp_path, shapes)
    for number, (name, shape) in enumerate(shapes.items()):
        buffer = np.full(shape.shape, number, np.float32)
        writer.write(name, (slice(None),), buffer)
        buffer[...] = -1
    reader = ParameterReader(tmp_path)
    for number, (name, shape) in enumerate(shapes.items()):
        out = np.empty(shape.shape, np.float32)
        reader.read(name, (slice(None),), out)
        np.testing.assert_array_equal(out, number)


CONFIG = ModelConfig.tiny(vocab_size=32)


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
