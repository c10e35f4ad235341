"""`python -m benchmarks.rounding.layers`: what rounding does to the layers of Mistral-7B's shape.

Weights are random, of deviation 0.02; the tokens' hidden states before the first layer of 1. Each
weight is rounded to the nearest, without a text: to int8 by outputs, to int4 by groups of 32. The
first table has the products of each weight with the rows that the float model gives it; the second
has whole layers, alone (on the float model's hidden states) and one after the other (each on what
its rounded predecessors leave). An error is the root mean square of the difference over that of the
float output. One layer is in memory at a time.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.model.capture import Capture
from mixtral_jax.model.layers import Rotary
from mixtral_jax.model.transformer import Block
from mixtral_jax.placement import Placement
from mixtral_jax.weight import Weight

_TOKENS = 64
_DEVIATION = 0.02
_DTYPES = ("int8", "int4")
_ROWS = 1024  # outputs that are rounded at a time
# The rows that each weight meets, by the names of `Capture`.
_INPUTS = {
    "attention.q": "attention.qkv",
    "attention.k": "attention.qkv",
    "attention.v": "attention.qkv",
    "attention.o": "attention.o",
    "feed_forward.gate": "feed_forward.in",
    "feed_forward.up": "feed_forward.in",
    "feed_forward.down": "feed_forward.down",
}
_Arrays = dict[str, jax.Array]


class _Layer:
    """A block of a model's shape in one dtype, run with any weights."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        self._config = config
        placement = Placement.of(config, dtype, mesh=None)
        self.kernels = placement.full_kernels
        self._graph, state = nnx.split(Block(config, placement, rngs=None))
        self.state = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
        self._paths = [path for path, _ in nnx.to_flat_state(state)]
        self.run = jax.jit(self._traced)

    def _traced(self, arrays: Mapping[str, jax.Array], x: jax.Array) -> tuple[jax.Array, _Arrays]:
        state = [
            (path, self.state[name].replace(arrays[name]))
            for path, name in zip(self._paths, self.state, strict=True)
        ]
        block: Block = nnx.merge(self._graph, nnx.from_flat_state(state))
        rotary = Rotary.at(jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], self._config)
        capture = Capture(set(_INPUTS.values()))
        return block.full(x, rotary, capture), dict(capture.values)


@partial(jax.jit, static_argnames="dtype")
def _rounded(rows: jax.Array, dtype: str) -> Weight:
    return Weight.quantized(rows, dtype)


def rounded(weight: np.ndarray, dtype: str) -> Weight:
    """A weight [O I] rounded to the nearest, some outputs at a time."""
    pieces = [_rounded(weight[i : i + _ROWS], dtype) for i in range(0, len(weight), _ROWS)]
    scales = [piece.scale for piece in pieces if piece.scale is not None]
    return Weight(jnp.concatenate([piece.values for piece in pieces]), jnp.concatenate(scales))


class Errors(NamedTuple):
    """The errors of one layer in one dtype."""

    products: dict[str, float]
    alone: float
    so_far: float


def error(have: jax.Array, want: jax.Array) -> float:
    """The root mean square of the difference over that of what is wanted."""
    return float(jnp.sqrt(jnp.mean(jnp.square(have - want)) / jnp.mean(jnp.square(want))))


def measured(config: ModelConfig, layers: int) -> Iterator[dict[str, Errors]]:
    """Yields the errors of one layer after the other, by dtype."""
    generator = np.random.default_rng(0)
    runs = {dtype: _Layer(config, dtype) for dtype in ("float32", *_DTYPES)}
    wide = runs["float32"]
    x = jnp.asarray(generator.standard_normal((1, _TOKENS, config.hidden_size), np.float32))
    so_far = dict.fromkeys(_DTYPES, x)
    for _ in range(layers):
        arrays: _Arrays = {}
        for name, variable in wide.state.items():
            shape = variable.get_value().shape
            is_norm = len(shape) == 1
            drawn = generator.standard_normal(shape, np.float32) * np.float32(_DEVIATION)
            arrays[name] = jnp.ones(shape) if is_norm else jnp.asarray(drawn)
        after, inputs = wide.run(arrays, x)
        errors: dict[str, Errors] = {}
        for dtype in _DTYPES:
            own = dict(arrays)
            products: dict[str, float] = {}
            for name, rows in _INPUTS.items():
                flat = inputs[rows].reshape(_TOKENS, -1)
                matrix = np.asarray(arrays[f"{name}.weight"]).reshape(-1, flat.shape[1])
                weight = rounded(matrix, dtype)
                have = runs[dtype].kernels.linear(flat, [weight])[0]
                products[name] = error(have, xla.product(flat, Weight(jnp.asarray(matrix), None)))
                for end, values in (("weight", weight.values), ("scale", weight.scale)):
                    assert values is not None
                    stored = runs[dtype].state[f"{name}.{end}"].get_value()
                    own[f"{name}.{end}"] = values.reshape(stored.shape)
            alone, _ = runs[dtype].run(own, x)
            so_far[dtype], _ = runs[dtype].run(own, so_far[dtype])
            errors[dtype] = Errors(products, error(alone, after), error(so_far[dtype], after))
        yield errors
        x = after


def table(head: str, rows: Mapping[str, list[float]]) -> str:
    """A table of Markdown, of errors in percent."""
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    lines += [
        f"| {name} | " + " | ".join(f"{100 * e:.2f} %" for e in row) + " |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    layers = parser.parse_args().layers
    config = replace(ModelConfig.mistral_7b_instruct_v03(), num_layers=1)
    errors = list(measured(config, layers))
    products = {
        name: [float(np.mean([row[dtype].products[name] for row in errors])) for dtype in _DTYPES]
        for name in _INPUTS
    }
    print(table("product with | int8 | int4", products))
    whole = {
        str(i + 1): [value for dtype in _DTYPES for value in errors[i][dtype][1:]]
        for i in range(layers)
        if i + 1 == layers or not i + 1 & i  # powers of two
    }
    print("\n" + table("layer | int8, alone | so far | int4, alone | so far", whole))


if __name__ == "__main__":
    main()
