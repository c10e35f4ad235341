"""Parameters have shapes and dtypes, and are stored in even chunks."""

import jax
import jax.numpy as jnp

from mixtral_jax.checkpoint.parameters import chunk_shape, parameter_shapes
from mixtral_jax.config import ModelConfig

CONFIG = ModelConfig.tiny(vocab_size=32)


def test_chunks_cut_leading_axes_evenly() -> None:
    def chunks(*shape: int) -> tuple[int, ...]:
        return chunk_shape(jax.ShapeDtypeStruct(shape, jnp.bfloat16))

    assert chunks(4096) == (4096,)
    # One expert's matrix is 112 MiB: four chunks of 28 MiB, none of them partly empty.
    assert chunks(8, 14_336, 4096) == (1, 3584, 4096)
    assert chunks(8, 4096) == (8, 4096)


def test_shapes_know_the_dtype() -> None:
    assert parameter_shapes(CONFIG, "bfloat16")["norm.weight"].dtype == jnp.bfloat16
