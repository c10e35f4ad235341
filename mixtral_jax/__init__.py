"""Mistral and Mixtral as a JAX library.

    import mixtral_jax
    model, tokenizer = mixtral_jax.load("checkpoints/smollm2-135m-instruct")
    logits = model(tokens)                                        # [B T] -> [B T V]
    for text in mixtral_jax.generate(model, tokenizer, "Once upon a time", max_tokens=20):
        print(text, end="")

A checkpoint folder is made by `mixtral-jax convert SRC DST`.
"""

from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike

from mixtral_jax.config import ModelConfig
from mixtral_jax.generate import generate, generate_tokens
from mixtral_jax.model import Transformer
from mixtral_jax.pretrained import load_pretrained
from mixtral_jax.sharding import ShardingRules, make_mesh
from mixtral_jax.tokenizer import Tokenizer

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


def load(
    path: str | Path, mesh: Mesh | None = None, dtype: DTypeLike | None = None
) -> tuple[Transformer, Tokenizer]:
    """Loads a checkpoint folder: the model, straight onto the devices of `mesh`, and its tokenizer.

    `path` may also be "tiny-random", a toy that needs no files. `dtype` is float32 or bfloat16;
    None keeps the stored one. Raises ConfigError (a ValueError) where `path` is not a checkpoint.
    """
    model, tokenizer, _ = load_pretrained(path, mesh, dtype)
    return model, tokenizer
