"""Tiny random Hugging Face models with values unlike every default, and their twins here."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.transformer import Transformer, named_parameters
from tests.support.models import model_of

# Every value differs from the default of the class that reads it.
SHAPE: dict[str, Any] = dict(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=3e-4,
    rope_parameters={"rope_theta": 12_345.0, "rope_type": "default"},
    max_position_embeddings=321,
    initializer_range=0.2,
    attn_implementation="eager",
)
MIXTRAL: dict[str, Any] = dict(num_local_experts=3, num_experts_per_tok=2)
MODELS = {
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=5),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, **MIXTRAL, sliding_window=7),
    "llama": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
}


def random_model(kind: str) -> Transformer:
    """Ours alone, with weights large enough for logits that differ."""
    config = from_hf(MODELS[kind]().to_dict())
    model = model_of(config)
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, state))


def huggingface(kind: str) -> Any:
    """A transformers model of one of the kinds, see `random_huggingface`."""
    return random_huggingface(MODELS[kind]())


def random_huggingface(config: Any) -> Any:
    """A transformers model in f32 whose norms, too, are random."""
    torch = pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model.eval()


def twin(model: Any) -> Transformer:
    """Builds ours with a transformers model's weights."""
    source = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    return twin_of(source, model.config.to_dict())


def twin_of(source: dict[str, np.ndarray], hf_config: dict[str, Any]) -> Transformer:
    """Builds ours from weights by transformers' names.

    They are copied by hand here, so that the converter is not trusted.
    """
    config = from_hf(hf_config)
    ours = model_of(config)
    names = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    values: dict[str, np.ndarray] = {}
    for i in range(config.num_layers):
        here, there = f"layers.{i}.", f"model.layers.{i}."
        names[here + "attention_norm.weight"] = there + "input_layernorm.weight"
        names[here + "feed_forward_norm.weight"] = there + "post_attention_layernorm.weight"
        for part in "qkvo":
            names[f"{here}attention.{part}.weight"] = f"{there}self_attn.{part}_proj.weight"
        if config.is_moe:
            names[here + "feed_forward.router.weight"] = there + "mlp.gate.weight"
            fused = source[there + "mlp.experts.gate_up_proj"]
            gate, up = np.split(fused, 2, axis=1)
            values[here + "feed_forward.gate.weight"] = gate
            values[here + "feed_forward.up.weight"] = up
            names[here + "feed_forward.down.weight"] = there + "mlp.experts.down_proj"
        else:
            for part in ("gate", "up", "down"):
                names[f"{here}feed_forward.{part}.weight"] = f"{there}mlp.{part}_proj.weight"
    for name, variable in named_parameters(ours).items():
        value = values[name] if name in values else source[names[name]]
        variable.set_value(jnp.asarray(value.reshape(variable.get_value().shape)))
    return ours
