"""Operations of a training step, for the model FLOPs utilisation of a run.

The compiler counts the body of a loop once, however often it runs, so the figure of a step with
micro-batches, or with logits in chunks, cannot be read off its program. A test holds these figures
to the compiler's where there is no loop.
"""

import math

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import AdapterConfig, adapter_letters
from mixtral_jax.training.config import TrainingConfig


def step_flops(model: ModelConfig, run: TrainingConfig) -> float:
    """Operations of the matrix products of a step over all devices, a multiplication being one of
    two, as arXiv:2204.02311 (appendix B) counts them.

    What is computed again in the backward pass does not count. Padding counts: it is computed.
    Frozen weights have no gradient, so they count twice, and trained ones three times.
    """
    positions = run.rows * run.length * (2 if run.objective == "preference" else 1)
    weights = 2.0 * _weights_of_a_token(model)
    seen = min(run.length, model.sliding_window or run.length)
    scores = 4.0 * model.num_layers * model.num_heads * model.head_size * seen
    passes = 3 if run.adapter is None else 2
    total = passes * weights + 3 * scores
    if run.adapter is not None:
        total += 3 * 2.0 * _adapter_weights_of_a_token(model, run.adapter)
    if run.objective == "preference":  # the reference
        total += weights + scores
    return positions * total


def _weights_of_a_token(model: ModelConfig) -> int:
    """Weights that a token is multiplied with, those of its own experts only."""
    size = model.hidden_size
    attention = size * model.head_size * 2 * (model.num_heads + model.num_kv_heads)
    experts = model.experts_per_token if model.is_moe else 1
    feed_forward = 3 * size * model.feed_forward_size * experts + size * model.num_experts
    return model.num_layers * (attention + feed_forward) + model.vocab_size * size


def _adapter_weights_of_a_token(model: ModelConfig, adapter: AdapterConfig) -> int:
    total = 0
    sizes = model.axis_sizes | {"U": adapter.rank, "E": model.experts_per_token}
    for target in adapter.targets:
        for letters in adapter_letters(target, model):
            total += math.prod(sizes[letter] for letter in letters)
    return model.num_layers * total
