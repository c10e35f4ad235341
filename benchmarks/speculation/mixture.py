"""A mixture of experts that is made of a dense model in memory, for which that model is a draft."""

import jax
import jax.numpy as jnp

from benchmarks.device.tokens import upcycled
from mixtral_jax.model.transformer import Transformer, named_parameters


def mixture_of(model: Transformer, experts: int, noise: float) -> Transformer:
    """Returns the mixture whose experts are the dense model's feed-forward, but for some noise.

    Args:
        model: the dense model.
        experts: number of experts of each layer.
        noise: standard deviation of the factors, of mean 1, by which the values of each expert
            differ: single weights where they are floats, else the scales of rows. With 0 the
            mixture computes what the dense model computes.
    """
    mixture = upcycled(model, experts)
    if not noise:
        return mixture
    for number, (name, variable) in enumerate(sorted(named_parameters(mixture).items())):
        value = variable.get_value()
        if ".feed_forward." not in name or ".router." in name:
            continue
        if jnp.issubdtype(value.dtype, jnp.floating):
            normal = jax.random.normal(jax.random.key(number), value.shape, jnp.float32)
            factors = (1 + noise * normal).astype(value.dtype)
            variable.set_value(value * factors)
    return mixture
