"""The optimiser: gradients become changes, by optax; and the learning rate of each step.

The learning rate is a function of the step's number alone and multiplies what the optimiser gives,
so that a skipped step changes nothing but the number.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mixtral_jax.training.config import TrainingConfig


def optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Clipping, the moments and the weight decay; its output is still without a learning rate.

    Moments are float32, as the trained arrays are. What comes out is to be added, times the
    learning rate.
    """
    chain = []
    if config.max_grad_norm is not None:
        chain.append(optax.clip_by_global_norm(config.max_grad_norm))
    if config.optimizer == "adamw":
        chain.append(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
    else:
        chain += [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=_decays))
    return optax.chain(*chain, optax.scale(-1.0))


def learning_rate(config: TrainingConfig, step: jax.Array) -> jax.Array:
    """The learning rate of a step, counted from 0, as an f32 scalar.

    The warmup rises linearly, so that its first step has the rate learning_rate / (warmup_steps +
    1); `steps` must be known.
    """
    assert config.steps is not None, "epochs are not resolved yet"
    peak, end = config.learning_rate, config.learning_rate * config.final_share
    position = step.astype(jnp.float32)
    warmup = jnp.minimum(1.0, (position + 1) / (config.warmup_steps + 1))
    rest = max(1, config.steps - 1 - config.warmup_steps)
    share = jnp.clip((position - config.warmup_steps) / rest, 0.0, 1.0)
    match config.schedule:
        case "constant":
            after = jnp.full_like(share, peak)
        case "linear":
            after = peak + (end - peak) * share
        case _:
            after = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * share))
    return warmup * after


def _decays(trained: Any) -> Any:
    """True for every array but vectors, which are the weights of norms."""
    return jax.tree.map(lambda array: array.ndim > 1, trained)
