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
from mixtral_jax.placement import Placement, checked_dtype
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

    def placement(
        self,
        dtype: DTypeLike | None = None,
        mesh: Mesh | str | None = "auto",
        dp_attention: bool = False,
    ) -> Placement:
        """Places the model on devices; `dtype` None keeps the stored one. See `Placement.of`."""
        return Placement.of(self.card.model, self.loadable_dtype(dtype), mesh, dp_attention)

    def load(self, placement: Placement) -> Transformer:
        """Reads the weights straight onto the devices of a placement."""
        if self.folder is not None:
            return restore.load_placed(self.folder, self.card, placement)
        return Transformer(self.card.model, placement, rngs=nnx.Rngs(0))

    def loadable_dtype(self, dtype: DTypeLike | None) -> str:
        """What `load(dtype=dtype)` gives; raises ConfigError as that does, at once."""
        if self.folder is None:
            return checked_dtype(dtype or self.card.dtype)
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
    path: str | Path,
    mesh: Mesh | str | None = "auto",
    dtype: DTypeLike | None = None,
    dp_attention: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """Loads a checkpoint folder: the model, straight onto its devices, and its tokenizer.

    Args:
        path: a folder that `mixtral-jax convert` made, or "tiny-random", a toy without files.
        mesh: "auto" for all devices, a text such as "expert=8,tensor=1", a mesh, or None for one
            device.
        dtype: float32 or bfloat16; None keeps the stored one. int8 is for what is stored so, or
            the toy.
        dp_attention: splits sequences, not heads, over the mesh's expert axis.

    Raises ConfigError (a ValueError) where `path` is not a checkpoint, or not of a dtype that can
    become `dtype`, or where the model cannot be split over the mesh.
    """
    pretrained = open_pretrained(path)
    placement = pretrained.placement(dtype, mesh, dp_attention)
    return pretrained.load(placement), pretrained.tokenizer
