"""A source by its path: its dialect, its tensors, its config. No weights are read.

A folder is searched in this order, so that one with several forms of the same weights (as
Mistral-7B-Instruct-v0.3 is published) gives Hugging Face's:

    config.json with *.safetensors           `hf`; by *.safetensors.index.json where there is one
    params.json with consolidated*.safetensors   `mistral`
    one *.gguf                               `gguf`

A single file of these kinds may be given too; its config is looked for beside it.
"""

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.errors import ConversionError
from convert.source import configs, packed, scaled
from convert.source.compressed_tensors import Scheme, from_compressed_tensors
from convert.source.gguf import gguf_header
from convert.source.quantization import unsupported
from convert.source.safetensors import safetensors_header, without_duplicates
from convert.source.tensor import Tensor
from mixtral_jax.checkpoint.folder import CONFIG_FILE, is_checkpoint
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.hf_config import from_hf

PARAMS_FILE = "params.json"
WHOLE_FILE = "model.safetensors"
# The head of a GGUF file; llama.cpp ties it to the embedding where the file lacks it.
_GGUF_HEAD = "output.weight"
# A file of a model that was cut into several.
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass
class Source:
    """Everything about a source but its data.

    `problems` has a sentence for each fault of its files and its config, which is None if it is at
    fault. `whole` is true if every file could be read: else a missing tensor means nothing.
    """

    path: Path
    dialect: str
    folder: Path  # where tokenizer files may be
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)  # of a GGUF file
    config: ModelConfig | None = None
    problems: list[str] = field(default_factory=list)
    whole: bool = True
    scheme: Scheme | None = None  # how its rounded weights are stored, if its config says so

    def add(self, file: Path) -> None:
        """Adds the tensors of a safetensors file."""
        try:
            tensors = safetensors_header(file)
        except (ConversionError, OSError) as error:
            self.fail(error)
            return
        for name, tensor in tensors.items():
            if name in self.tensors:
                other = self.tensors[name].file.name
                self.problems.append(f"tensor {name} is in both {other} and {file.name}")
            self.tensors[name] = tensor

    def fail(self, error: ConversionError | OSError | str) -> None:
        """Notes that a file could not be read."""
        self.problems += error.problems if isinstance(error, ConversionError) else [str(error)]
        self.whole = False


def open_source(path: Path) -> Source:
    """Reads a source's headers and config; raises ConversionError if `path` is no source at all."""
    source = _open(path)
    scheme = source.scheme
    scales = scheme if isinstance(scheme, scaled.Scheme) else None
    words = scheme if isinstance(scheme, packed.Scheme) else None
    attached = scaled.attach_scales(source.tensors, source.dialect, scales, source.whole)
    source.problems += attached.problems
    attached = packed.attach_packings(attached.tensors, words, source.whole)
    source.problems += attached.problems
    source.tensors = attached.tensors
    return source


def scheme_of(fields: Any) -> Scheme:
    """Reads the `quantization_config` of a Hugging Face folder.

    Raises ConfigError, with the field and a remedy, for what cannot be read.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"config field quantization_config={fields!r} must be an object")
    method = str(fields.get("quant_method")).replace("_", "-")
    match method:
        case "fp8":
            return scaled.from_fp8(fields)
        case "compressed-tensors":
            return from_compressed_tensors(fields)
        case "gptq":
            return packed.from_gptq(fields)
        case "awq":
            return packed.from_awq(fields)
    raise unsupported("quant_method", fields.get("quant_method"))


def _open(path: Path) -> Source:
    if not path.exists():
        raise ConversionError([f"{path} does not exist"])
    if is_checkpoint(path):
        raise ConversionError([f"{path} is a mixtral-jax checkpoint already"])
    if path.is_file():
        return _open_file(path)
    shards = _files(path, "*.safetensors")
    consolidated = [file for file in shards if file.name.startswith("consolidated")]
    shards = [file for file in shards if file not in consolidated]
    indexes = [
        file
        for file in _files(path, "*.safetensors.index.json")
        if not file.name.startswith("consolidated")
    ]
    gguf_files = _files(path, "*.gguf")
    if (path / CONFIG_FILE).is_file() and (shards or indexes):
        return _open_hf(path, path, shards, indexes)
    if (path / PARAMS_FILE).is_file() and consolidated:
        return _open_consolidated(path, path, consolidated)
    if len(gguf_files) == 1:
        return _open_gguf(gguf_files[0])
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files[:5])
        raise ConversionError([f"{path} holds several GGUF files; name one of them: {names}"])
    raise ConversionError([_nothing_found(path, shards, consolidated)])


def _files(folder: Path, pattern: str) -> list[Path]:
    """Returns the files of a pattern in their order, without hidden ones.

    macOS puts a hidden "._NAME" beside NAME on disks that cannot hold its attributes.
    """
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def _open_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if path.suffix == ".safetensors":
        if path.name.startswith("consolidated"):
            return _open_consolidated(path, path.parent, [path])
        return _open_hf(path, path.parent, [path], [])
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ConversionError([_pickled(path)])
    raise ConversionError([f"{path} is neither a .safetensors nor a .gguf file"])


def _open_hf(path: Path, folder: Path, shards: Sequence[Path], indexes: Sequence[Path]) -> Source:
    source = Source(path, "hf", folder)

    def translate(content: dict[str, Any]) -> ModelConfig:
        # The first releases of llm-compressor had another name for it.
        fields = content.pop("quantization_config", None) or content.pop("compression_config", None)
        if fields is not None:
            source.scheme = scheme_of(fields)
        return from_hf(content)

    source.config = _read_config(source, folder / CONFIG_FILE, translate)
    if len(indexes) > 1:
        names = " and ".join(file.name for file in indexes)
        source.problems.append(f"{path} has two indexes, {names}; remove one")
    placed = _read_index(source, indexes[0]) if indexes else None
    whole = folder / WHOLE_FILE
    if whole in shards and (placed is None or WHOLE_FILE not in placed.values()):
        _open_whole(source, whole, shards, set((placed or {}).values()))
    elif placed is not None:
        _add_indexed(source, indexes[0], placed)
    elif not indexes:
        for file in shards:
            source.add(file)
    return source


def _open_whole(source: Source, whole: Path, shards: Sequence[Path], placed: Set[str]) -> None:
    """Takes in a whole model.safetensors, unless shards of another model are there too.

    An index whose shards are gone, as when a model is saved over another one, says nothing. Files
    that are neither shards nor indexed are adapters or variants.
    """
    others = [file.name for file in shards if file.name in placed or _SHARD.fullmatch(file.name)]
    if others:
        source.fail(
            f"{source.path} holds both {whole.name} and shards such as {others[0]}, which may be "
            "another model; remove or move one of the two"
        )
    else:
        source.add(whole)


def _read_index(source: Source, index: Path) -> dict[str, str] | None:
    """Returns the file of each tensor by an index; None, and a problem, if it is malformed."""
    try:
        text = index.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=without_duplicates)
        return {str(name): str(file) for name, file in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        source.fail(f"{index} is malformed: {error!r}")
        return None


def _add_indexed(source: Source, index: Path, placed: Mapping[str, str]) -> None:
    """Takes in the files that an index names, and compares it with their content."""
    for name in sorted(set(placed.values())):
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            source.fail(f"{index.name} names {name}, which is not in {index.parent}; fetch it")
        else:
            source.add(file)
    if not source.whole:
        return
    for name, wanted in placed.items():
        held = source.tensors.get(name)
        if held is None or held.file.name != wanted:
            source.problems.append(f"{index.name} places {name} in {wanted}, which lacks it")
            # The tensor need not be reported as missing as well.
            source.whole = False


def _open_consolidated(path: Path, folder: Path, shards: Sequence[Path]) -> Source:
    source = Source(path, "mistral", folder)

    def translate(content: dict[str, Any]) -> ModelConfig:
        if isinstance(fields := content.pop("quantization", None), dict):
            source.scheme = scaled.from_params_quantization(fields)
        elif fields is not None:
            raise ConfigError(f"config field quantization={fields!r} must be an object")
        return configs.from_params(content)

    source.config = _read_config(source, folder / PARAMS_FILE, translate)
    for file in shards:
        source.add(file)
    return source


def _open_gguf(path: Path) -> Source:
    source = Source(path, "gguf", path.parent)
    try:
        source.tensors, source.metadata = gguf_header(path)
    except (ConversionError, OSError) as error:
        source.fail(error)
        return source
    tied = _GGUF_HEAD not in source.tensors
    try:
        source.config = configs.from_gguf(source.metadata, tied_embeddings=tied)
    except ConfigError as error:
        source.problems.append(f"{path}: {error}")
    return source


def _read_config(source: Source, file: Path, translate: Any) -> ModelConfig | None:
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=without_duplicates)
        if not isinstance(content, dict):
            raise ValueError("it is no json object")
        config: ModelConfig = translate(content)
        return config
    except FileNotFoundError:
        source.problems.append(f"{file} is missing; it says how the tensors are to be read")
    except (OSError, ValueError, RecursionError) as error:
        source.problems.append(f"{file}: {error}")
    return None


def _nothing_found(path: Path, shards: Sequence[Path], consolidated: Sequence[Path]) -> str:
    if shards:
        return f"{path} has safetensors but no {CONFIG_FILE}; fetch it from where they came"
    if consolidated:
        return f"{path} has consolidated safetensors but no {PARAMS_FILE}"
    for pattern in ("pytorch_model*.bin", "consolidated*.pth", "*.bin", "*.pth", "*.pt"):
        for file in _files(path, pattern):
            return _pickled(file)
    return (
        f"{path} holds no weights that can be read; looked for {CONFIG_FILE} with *.safetensors, "
        f"{PARAMS_FILE} with consolidated*.safetensors, and *.gguf"
    )


def _pickled(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run code when it is read; fetch the model as safetensors, "
        "or load it with transformers and save_pretrained() it"
    )
