"""Mistral and Mixtral as a JAX library.

    import mixtral_jax
    model, tokenizer = mixtral_jax.load("checkpoints/smollm2-135m-instruct")
    logits = model(tokens)                                        # [B T] -> [B T V]
    for text in mixtral_jax.generate(model, tokenizer, "Once upon a time", max_tokens=20):
        print(text, end="")

A checkpoint folder is made by `mixtral-jax convert SRC DST`.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from mixtral_jax.checkpoint.pretrained import load
    from mixtral_jax.config import ModelConfig
    from mixtral_jax.generation import generate, generate_tokens
    from mixtral_jax.model.transformer import Transformer
    from mixtral_jax.sharding import ShardingRules, make_mesh
    from mixtral_jax.tokenization.tokenizer import Tokenizer

__all__ = [
    "ModelConfig",
    "ShardingRules",
    "Tokenizer",
    "Transformer",
    "generate",
    "generate_tokens",
    "load",
    "make_mesh",
]

_HOMES = {
    "ModelConfig": "config",
    "ShardingRules": "sharding",
    "Tokenizer": "tokenization.tokenizer",
    "Transformer": "model.transformer",
    "generate": "generation",
    "generate_tokens": "generation",
    "load": "checkpoint.pretrained",
    "make_mesh": "sharding",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: jax takes seconds, `--help` should not."""
    if name == "__version__":
        return importlib.metadata.version("mixtral-jax")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

    globals()[name] = value
    return value
