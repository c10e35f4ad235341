"""A model in memory with an adapter's matrices added to its weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax.errors import AdapterError
from mixtral_jax.model.adapter import Adapter, adapter_letters, weight_name
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.weight import is_quantized


def merge(model: Transformer, adapter: Adapter) -> Transformer:
    """Returns a model with W + BA in the place of each weight that an adapter changes.

    The sum is computed in float32 and rounded to the model's dtype: bfloat16 keeps a part of a
    small change only, as `mixtral-jax merge` shows. All other weights are shared with `model`,
    which stays as it is, so two models take the memory of one and of what the adapter changes.

    Args:
        model: float32 or bfloat16, whole or split over a mesh.
        adapter: as `load_adapter` gives it, with its scaling in B.

    Raises AdapterError for a model of int8, int4 or fp8, which an adapter can only run beside.
    """
    if is_quantized(model.placement.dtype):
        raise AdapterError(
            f"W + BA of {model.placement.dtype} weights would be rounded anew with other scales; "
            "run the adapter beside the model (model(tokens, adapter)), or load weights of bfloat16"
        )
    changed: dict[str, Any] = {}
    for layer, target, low in adapter.pairs():
        name = f"layers.{layer}.{weight_name(target)}"
        changed[name] = (low, adapter_letters(target, model.config))
    graph, state = nnx.split(model)
    filled = []
    sums: dict[Any, Callable[..., jax.Array]] = {}  # compiled once for all layers
    for path, variable in nnx.to_flat_state(state):
        low, letters = changed.pop(".".join(map(str, path)), (None, None))
        if low is not None:
            weight = variable.get_value()
            key = (letters, weight.sharding)
            if key not in sums:
                sums[key] = jax.jit(partial(_sum, letters), out_shardings=weight.sharding)
            variable = variable.replace(sums[key](weight, low.a, low.b))
        filled.append((path, variable))
    if changed:
        raise AdapterError(f"the model has no {next(iter(changed))}, which the adapter changes")
    merged: Transformer = nnx.merge(graph, nnx.from_flat_state(filled))
    return merged


def _sum(letters: tuple[str, str], weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """W + BA, for a and b of the given letters and a weight of those of B, then those of A."""
    outputs, inputs = letters[1].removesuffix("U"), letters[0].removeprefix("E").removeprefix("U")
    with jax.default_matmul_precision("highest"):
        delta = jnp.einsum(f"{letters[0]},{letters[1]}->{outputs}{inputs}", a, b)
    return (weight.astype(jnp.float32) + delta.reshape(weight.shape)).astype(weight.dtype)
