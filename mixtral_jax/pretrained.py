"""From a checkpoint folder, or the name of the toy, to a model with its tokenizer."""

from pathlib import Path
from typing import NamedTuple

from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mixtral_jax import checkpoint, tokenizer
from mixtral_jax.checkpoint import Card
from mixtral_jax.config import ModelConfig
from mixtral_jax.model import Transformer
from mixtral_jax.tokenizer import ByteTokenizer, Tokenizer

TINY_RANDOM = "tiny-random"


class Pretrained(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    card: Card


def load_pretrained(
    path: str | Path, mesh: Mesh | None = None, dtype: DTypeLike | None = None
) -> Pretrained:
    """Loads a checkpoint folder, or makes the toy Mixtral that is called "tiny-random".

    Raises ConfigError (a ValueError) where `path` is neither.
    """
    words: Tokenizer
    if str(path) == TINY_RANDOM:
        words = ByteTokenizer()
        config = ModelConfig.tiny(vocab_size=words.vocab_size)
        model = Transformer(config, dtype=dtype or "float32", rngs=nnx.Rngs(0), mesh=mesh)
        card = Card(model=config, dtype="float32", name=TINY_RANDOM, provider="mixtral-jax")
        return Pretrained(model, words, card)
    folder = Path(path)
    # The tokenizer first: it fails faster.
    card = Card.read(folder)
    words = tokenizer.load(folder)
    return Pretrained(checkpoint.load(folder, mesh, dtype)[0], words, card)


def load(
    path: str | Path, mesh: Mesh | None = None, dtype: DTypeLike | None = None
) -> tuple[Transformer, Tokenizer]:
    """Loads a checkpoint folder: the model, straight onto the devices of `mesh`, and its tokenizer.

    `path` may also be "tiny-random", a toy that needs no files. `dtype` is float32 or bfloat16;
    None keeps the stored one. Raises ConfigError (a ValueError) where `path` is not a checkpoint.
    """
    model, words, _ = load_pretrained(path, mesh, dtype)
    return model, words
