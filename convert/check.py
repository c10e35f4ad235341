"""The account of a source's tensors against the table: all that is wrong, before data is read.

Every tensor that the table names must be there, of its shape, in an encoding that can be read; no
tensor may be left over; the tokenizer must fit the model; the result must fit on the disk.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from convert.errors import ConversionError
from convert.name_table import REFUSED, UPCYCLED_EXPERTS_PER_TOKEN, NameTable
from convert.source.open import Source
from convert.source.read import is_same
from mixtral_jax.checkpoint.parameters import stored_bytes
from mixtral_jax.checkpoint.store import is_remote

# The fields of a config that say how many layers and experts there are, by dialect.
_SIZE_NAMES = {
    "hf": ("num_hidden_layers", "num_local_experts"),
    "mistral": ("n_layers", "moe.num_experts"),
    "gguf": ("llama.block_count", "llama.expert_count"),
}
# Dtypes that are rounded by what a text shows of the activations, where they are not kept.
CALIBRATED = ("int8", "int4")
# Up to so many, a source may lack tensors, whose names are listed then.
_UNDISPUTED_LAYERS, _UNDISPUTED_EXPERTS = 256, 1024


def check(
    source: Source,
    table: NameTable,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    destination: Path | str,
    dtype: str,
    upcycle_experts: int = 0,
    num_ids: int | None = None,
    needs_text: bool = False,
) -> None:
    """Raises ConversionError with everything that is wrong with a source and its tokenizer.

    Args:
        source: what there is, and what was wrong with its files.
        table: what there should be.
        shapes: of the parameters that will be written.
        destination: where they will be.
        dtype: in which they will be.
        upcycle_experts: as in `name_table`.
        num_ids: how many ids the tokenizer has; None where there is none.
        needs_text: whether weights are rounded by what a text shows, which needs a tokenizer.
    """
    problems = [
        *source.problems,
        *_missing_or_misshapen(source, table),
        *_left_over(source, table),
    ]
    if upcycle_experts:
        problems += _upcycling(source, upcycle_experts)
    if num_ids is None and needs_text:
        problems.append(
            f"{dtype} is calibrated with a text, which needs the model's tokenizer; fetch it"
        )
    if num_ids is not None and num_ids > table.config.vocab_size:
        problems.append(
            f"the tokenizer in {source.folder} has {num_ids} ids where the model has "
            f"{table.config.vocab_size}; it belongs to another model"
        )
    if problems:
        raise ConversionError(problems)
    check_space(shapes, destination)


def check_size(source: Source, upcycle_experts: int = 0) -> None:
    """Raises ConversionError if a config asks for so many layers or experts that no table fits.

    Smaller contradictions are left to `check`, which names every tensor that is missing.
    """
    config, names = source.config, _SIZE_NAMES[source.dialect]
    assert config is not None
    # Each layer and, but where they are stacked, each expert has tensors of its own.
    num_tensors = len(source.tensors)
    problems = [
        f"config field {name}={size} asks for more than the {num_tensors} tensors of {source.path} "
        "can hold; correct it"
        for name, size, least in zip(
            names,
            (config.num_layers, config.num_experts),
            (_UNDISPUTED_LAYERS, _UNDISPUTED_EXPERTS),
            strict=True,
        )
        if size > max(num_tensors, least)
    ]
    if upcycle_experts > _UNDISPUTED_EXPERTS:
        problems.append(
            f"upcycle_experts={upcycle_experts}: use {_UNDISPUTED_EXPERTS} experts at most"
        )
    if problems:
        raise ConversionError([*source.problems, *problems])


def check_space(shapes: Mapping[str, jax.ShapeDtypeStruct], destination: Path | str) -> None:
    """Raises ConversionError if arrays of these shapes do not fit where `destination` will be.

    What goes to an object store is in the folder of temporary files first.
    """
    nbytes = stored_bytes(shapes)
    scratch = Path(tempfile.gettempdir())
    folder = scratch if is_remote(destination) else Path(destination).resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise ConversionError(
            [f"{destination} needs {nbytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there"]
        )


def _missing_or_misshapen(source: Source, table: NameTable) -> Iterator[str]:
    for name, shape in {row.source: row.shape for row in table.rows}.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            if source.whole:
                is_head = name == table.head
                hint = "; if embeddings are tied, the config must say so" if is_head else ""
                yield f"tensor {name} is missing{hint}"
        elif tensor.shape != shape:
            yield (
                f"tensor {name} has shape {list(tensor.shape)} where the config asks for "
                f"{list(shape)} ({tensor.file.name})"
            )
        elif not tensor.is_readable:
            yield (
                f"tensor {name} is stored as {tensor.encoding}, which is not supported; fetch the "
                f"weights as bf16, f16 or f32 ({tensor.file.name})"
            )


def _left_over(source: Source, table: NameTable) -> Iterator[str]:
    expected = {row.source for row in table.rows} | table.ignored
    embedding = source.tensors.get(table.embedding)
    for name, tensor in source.tensors.items():
        if name in expected:
            continue
        if name in REFUSED:
            yield f"tensor {name}: {REFUSED[name]}"
        elif name == table.head and embedding is not None:
            if not is_same(tensor, embedding):
                yield (
                    f"tensor {name} differs from {table.embedding} though the config says that "
                    "they are tied; correct tie_word_embeddings"
                )
        else:
            yield (
                f"tensor {name} is not known for a model of this config, and refusing to leave it "
                f"out ({tensor.file.name})"
            )


def _upcycling(source: Source, experts: int) -> Iterator[str]:
    if source.config is not None and source.config.is_moe:
        yield "upcycle_experts: the source is a mixture of experts already"
    elif experts < UPCYCLED_EXPERTS_PER_TOKEN:
        yield (
            f"upcycle_experts={experts}: at least {UPCYCLED_EXPERTS_PER_TOKEN} experts are needed"
        )
