"""From a checkpoint folder, or the name of the toy, to a model with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mixtral_jax.checkpoint import parameters, restore
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sharding import ShardingRules
from mixtral_jax.tokenization import tokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer

TINY_RANDOM = "tiny-random"


@dataclass(frozen=True)
class Pretrained:
    """What is known of a checkpoint before its weights are read."""

    card: Card
    tokenizer: Tokenizer
    folder: Path | None  # None for the toy

    def load(
        self,
        mesh: Mesh | None = None,
        dtype: DTypeLike | None = None,
        rules: ShardingRules | None = None,
        activations: DTypeLike | None = None,
    ) -> Transformer:
        """The weights, straight onto the devices of `mesh`, or onto the default device.

        `rules` and `activations` are those of Transformer.
        """
        if self.folder is not None:
            return restore.load(self.folder, mesh, dtype, rules, activations)[0]
        return Transformer(
            self.card.model,
            dtype=self.loadable_dtype(dtype),
            activations=activations,
            rngs=nnx.Rngs(0),
            mesh=mesh,
            rules=rules,
        )

    def loadable_dtype(self, dtype: DTypeLike | None) -> str:
        """What `load(dtype=dtype)` gives; raises ConfigError as that does, at once."""
        if self.folder is None:
            return parameters.checked_dtype(dtype or self.card.dtype)
        return parameters.loadable_dtype(self.folder, self.card, dtype)


def open_pretrained(path: str | Path) -> Pretrained:
    """Reads the config and the tokenizer of a checkpoint folder, or of the toy "tiny-random".

    Raises ConfigError (a ValueError) where `path` is neither.
    """
    if str(path) == TINY_RANDOM:
        words = ByteTokenizer()
        config = ModelConfig.tiny(vocab_size=words.vocab_size)
        card = Card(model=config, dtype="float32", name=TINY_RANDOM, provider="mixtral-jax")
        return Pretrained(card, words, None)
    folder = Path(path)
    return Pretrained(Card.read(folder), tokenizer.load(folder), folder)


def load(
    path: str | Path, mesh: Mesh | None = None, dtype: DTypeLike | None = None
) -> tuple[Transformer, Tokenizer]:
    """Loads a checkpoint folder: the model, straight onto the devices of `mesh`, and its tokenizer.

    `path` may also be "tiny-random", a toy that needs no files. `dtype` is float32 or bfloat16;
    None keeps the stored one, and int8 is for what is stored so, or the toy. Raises ConfigError (a
    ValueError) where `path` is not a checkpoint, or not of a dtype that can become `dtype`.
    """
    pretrained = open_pretrained(path)
    return pretrained.load(mesh, dtype), pretrained.tokenizer
