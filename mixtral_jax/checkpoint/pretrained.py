"""A model with its tokenizer: loaded from a checkpoint folder, or the toy, and saved to one."""

import logging
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mixtral_jax.checkpoint import parameters, restore, store, writer
from mixtral_jax.checkpoint.adapter import read_adapter, write_adapter
from mixtral_jax.checkpoint.folder import CONFIG_FILE, Card
from mixtral_jax.checkpoint.sampling_defaults import read_sampling_defaults
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError, TokenizerError, UserError
from mixtral_jax.model.adapter import Adapter, AdapterConfig, placed
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement, checked_dtype
from mixtral_jax.sampling_params import SamplingFields
from mixtral_jax.tokenization import tokenizer
from mixtral_jax.tokenization.huggingface import TemplateTokenizer
from mixtral_jax.tokenization.mistral import MistralTokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer

TINY_RANDOM = "tiny-random"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint before its weights are read."""

    card: Card
    folder: Path | None  # None for the toy; a copy of the small files where `store` has the rest
    store: str | None = None  # URL of the folder, where that is in an object store

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights.

        Raises FileNotFoundError where there is none, TokenizerError for one that is not supported.
        """
        return ByteTokenizer() if self.folder is None else tokenizer.load(self.folder)

    @cached_property
    def sampling_defaults(self) -> SamplingFields:
        """The parameters of sampling that the model's makers name; empty where they name none.

        Raises ConfigError for values that are out of range.
        """
        return {} if self.folder is None else read_sampling_defaults(self.folder)

    def placement(
        self,
        dtype: DTypeLike | None = None,
        mesh: Mesh | str | None = "auto",
        dp_attention: bool = False,
    ) -> Placement:
        """Places the model on devices; `dtype` None keeps the stored one. See `Placement.of`."""
        return Placement.of(
            self.card.model,
            self.loadable_dtype(dtype),
            mesh,
            dp_attention,
            weight_dtypes=self.card.weight_dtypes,
        )

    def load(self, placement: Placement) -> Transformer:
        """Reads the weights straight onto the devices of a placement."""
        if self.folder is not None:
            return restore.load_placed(self.store or self.folder, self.card, placement)
        return Transformer(self.card.model, placement, rngs=nnx.Rngs(0))

    def loadable_dtype(self, dtype: DTypeLike | None) -> str:
        """Returns the dtype that `load` would give for `dtype`; raises ConfigError as it would."""
        if self.folder is None:
            return checked_dtype(self.card.dtype if dtype is None else dtype)
        return parameters.loadable_dtype(self.store or self.folder, self.card, dtype)


def open_pretrained(path: str | Path) -> Pretrained:
    """Reads the config of a checkpoint folder, or of the toy "tiny-random".

    Raises ConfigError (a ValueError) where `path` is neither, and CheckpointError for a store that
    is not known or cannot be read.
    """
    if str(path) == TINY_RANDOM:
        config = ModelConfig.tiny(vocab_size=ByteTokenizer().vocab_size)
        card = Card(model=config, dtype="float32", name=TINY_RANDOM, provider="mixtral-jax")
        return Pretrained(card, None)
    place = store.place_of(path)
    if isinstance(place, Path):
        return Pretrained(Card.read(place), place)
    url = place.rstrip("/")
    folder = store.scratch_folder()
    if CONFIG_FILE not in store.fetch(url, folder):
        raise ConfigError(
            f"{url} has no {CONFIG_FILE}, or there is no such bucket; give the folder that "
            "`mixtral-jax convert SRC DST` made, as it was copied into the store"
        )
    with store.renamed(folder, url):
        return Pretrained(Card.read(folder), folder, url)


def load(
    path: str | Path,
    mesh: Mesh | str | None = "auto",
    dtype: DTypeLike | None = None,
    dp_attention: bool = False,
) -> tuple[Transformer, Tokenizer | None]:
    """Loads a checkpoint folder: the model, straight onto its devices, and its tokenizer.

    Args:
        path: a folder that `mixtral-jax convert` made, on this machine or in an object store
            (gs://BUCKET/FOLDER, s3://BUCKET/FOLDER), or "tiny-random", a toy without files.
        mesh: "auto" for all devices, a text such as "expert=8,tensor=1", a mesh, or None for one
            device.
        dtype: float32 or bfloat16; None keeps the stored one. int8 and fp8 are for what is
            stored so, or the toy.
        dp_attention: splits sequences, not heads, over the mesh's expert axis.

    The tokenizer is None, and a warning is logged, where it is missing or not supported.

    Raises ConfigError (a ValueError) where `path` is not a checkpoint, or not of a dtype that can
    become `dtype`, or where the model cannot be split over the mesh.
    """
    pretrained = open_pretrained(path)
    placement = pretrained.placement(dtype, mesh, dp_attention)
    words: Tokenizer | None = None
    try:
        words = pretrained.tokenizer
    except (FileNotFoundError, TokenizerError) as error:
        logger.warning("%s is loaded without a tokenizer, which cannot be used: %s", path, error)
    return pretrained.load(placement), words


def load_adapter(folder: str | Path, model: Transformer) -> Adapter:
    """Loads a LoRA adapter for a model, onto the model's devices.

        adapter = mixtral_jax.load_adapter("runs/mine", model)
        logits = model(tokens, adapter)                      # beside the model, of any dtype
        tuned = mixtral_jax.merge(model, adapter)            # or within: generate(tuned, ...)

    Args:
        folder: adapter_config.json and adapter_model.safetensors, as PEFT saves them or a training
            run does, on this machine or in an object store. Experts one by one or fused.
        model: its base.

    Returns its matrices in float32, with the scaling in B; None beside weights that stay as they
    are. Raises AdapterError for an adapter that is broken, asks for what is not supported, or does
    not fit the model.
    """
    stored = read_adapter(folder, model.config)
    return placed(stored.adapter.folded(stored.settings), model.config, model.placement.layout)


def save_adapter(adapter: Adapter, folder: str | Path, *, base: str) -> None:
    """Writes an adapter as PEFT, vLLM, SGLang and `load_adapter` read it.

    Args:
        adapter: as `load_adapter` gives it and `model(tokens, adapter)` takes it, with the scaling
            in B, so that alpha is the rank in what is written.
        folder: a folder that does not exist or is empty; may be the URL of one in an object store.
        base: the name under which others find the base, such as mistralai/Mixtral-8x7B-v0.1.

    Raises AdapterError for values that are not finite, and what `finished_at` raises for the
    folder.
    """
    rank = max([low.b.shape[-1] for _, _, low in adapter.pairs()], default=1)
    write_adapter(
        store.place_of(folder), adapter, AdapterConfig(rank=rank, alpha=float(rank)), base
    )


def save(
    model: Transformer,
    words: Tokenizer | None,
    folder: str | Path,
    *,
    name: str | None = None,
    provider: str = "unknown",
) -> None:
    """Writes a model, such as one that was changed in memory, as a checkpoint folder.

    Args:
        model: whole, or split over a mesh of this process.
        words: its tokenizer, whose files are copied from where it was loaded; None for none.
        folder: a folder that does not exist or is empty; may be the URL of one in an object store.
        name: the name under which the model is served; by default the folder's.
        provider: the name of its maker.

    Raises what `finished_at` raises for the folder, UserError for a tokenizer of another kind than
    `load` gives, and FileNotFoundError if the tokenizer's files are gone. Nothing is left at
    `folder` then.
    """
    place = store.place_of(folder)
    card = Card(
        model=model.config,
        dtype=model.placement.dtype,
        name=name or Path(folder).absolute().name,
        provider=provider,
        weight_dtypes=model.placement.weight_dtypes,
    )
    with tempfile.TemporaryDirectory() as scratch:
        _copy_tokenizer(words, Path(scratch))
        writer.save(place, model, card, tokenizer.files(Path(scratch)))


def _copy_tokenizer(words: Tokenizer | None, folder: Path) -> None:
    if isinstance(words, ByteTokenizer):
        words.save(folder)
    elif isinstance(words, MistralTokenizer | TemplateTokenizer):
        if not words.folder.is_dir():
            raise FileNotFoundError(f"the tokenizer's files were in {words.folder}, which is gone")
        tokenizer.copy(words.folder, folder)
    elif words is not None:
        raise UserError(
            f"a tokenizer of type {type(words).__name__} has no files to save; give the one that "
            "mixtral_jax.load gave, or None to save the model without"
        )
