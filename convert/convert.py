"""convert: from the weights that others publish to a checkpoint folder of ours.

    open_source   what is there, by headers alone
    the table     what should be there (mapping.py)
    the account   every tensor expected is present, of its shape, readable, and none is left over
    the stream    piece by piece into the checkpoint, read in one thread and written in another
    the rename    only a whole checkpoint gets its name

All faults are found before anything is written, and reported together. Memory does not grow with
the model: two pieces of 32 MiB, what decoding one of them takes, and the libraries.
"""

import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from convert.errors import ConversionError
from convert.name_table import REFUSED, Row, ignored, rows, tied_pair, untied, upcycled
from convert.pieces import (
    Piece,
    check_space,
    filled,
    overlaps,
    pieces,
    total_bytes,
)
from convert.progress import Progress
from convert.quantize import calibration_text, quantize
from convert.served_name import served_as
from convert.source import gguf_tokenizer
from convert.source.open import Source, open_source
from convert.source.safetensors import Reader, Tensor, is_readable, is_same
from mixtral_jax.checkpoint.folder import (
    DTYPES,
    Card,
    ParameterWriter,
    finished_at,
    parameter_shapes,
)
from mixtral_jax.config import ModelConfig
from mixtral_jax.tokenization import tokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Experts per token of an upcycled model. Their weights sum to 1, and all experts are equal.
_UPCYCLED_PICKS = 2


def convert(
    source: Path,
    destination: Path,
    *,
    dtype: str | None = None,
    upcycle_experts: int = 0,
    seed: int = 0,
    name: str | None = None,
    provider: str | None = None,
    progress: Progress | None = None,
) -> Card:
    """Writes the weights at `source` as a checkpoint folder, with the tokenizer beside them.

    Args:
        source: a folder or file as `convert.source.open` describes.
        destination: a folder that does not exist or is empty.
        dtype: "float32" or "bfloat16" for all parameters, or "int8" as `convert.quantize` makes
            them, which needs the tokenizer. By default bfloat16 where most bytes of the source are
            bf16, else float32: nothing is lost unless it is asked for. (f16 and the quantised
            forms of GGUF have values that bf16 has not.)
        upcycle_experts: make a mixture of this many experts out of a dense model, each a copy of
            its feed-forward layer, with random routers. It computes what the dense model does.
        seed: of the random routers.
        name: what the model is called when served; by default from the path, see convert.names.
        provider: who made it; likewise.
        progress: called with bytes written and bytes in all.

    A tokenizer that is missing or not supported is logged as a warning: weights alone are a
    checkpoint, but one that can not be served.

    Raises ConversionError, with everything that is wrong, and FileExistsError if `destination` is
    not empty. Nothing is left at `destination` then.
    """
    plan = _plan(source, destination, dtype, upcycle_experts)
    served, maker = served_as(source)
    card = Card(
        model=plan.config, dtype=plan.dtype, name=name or served, provider=provider or maker
    )
    with finished_at(destination) as partial:
        words = _write_tokenizer(plan.source, partial, plan.config.vocab_size)
        _write_parameters(plan, words, partial, seed, progress or (lambda done, total: None))
        card.write(partial)
    return card


@dataclass(frozen=True)
class _Plan:
    source: Source
    config: ModelConfig
    dtype: str
    table: Mapping[str, list[Row]]  # by parameter
    shapes: Mapping[str, jax.ShapeDtypeStruct]


def _plan(path: Path, destination: Path, dtype: str | None, upcycle_experts: int) -> _Plan:
    """Everything that can be known before data is read. Raises ConversionError."""
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError([f"dtype {dtype!r} is not supported; use {' or '.join(DTYPES)}"])
    source = open_source(path)
    config = source.config
    if config is None:
        raise ConversionError(source.problems)
    table = rows(config, source.dialect, source.tensors)
    problems = source.problems + _account(source, config, table)
    if upcycle_experts:
        problems += _check_upcycle(config, upcycle_experts)
    if problems:
        raise ConversionError(problems)
    if upcycle_experts:
        config = replace(config, num_experts=upcycle_experts, experts_per_token=_UPCYCLED_PICKS)
        table = upcycled(table, upcycle_experts)
    dtype = dtype or _default_dtype(source, table)
    if dtype == "int8" and config.tied_embeddings:
        config, table = replace(config, tied_embeddings=False), untied(table)
    shapes = parameter_shapes(config, dtype)
    check_space(total_bytes(shapes), destination)
    by_parameter = defaultdict(list)
    for row in table:
        by_parameter[row.parameter].append(row)
    return _Plan(source, config, dtype, by_parameter, shapes)


def _account(source: Source, config: ModelConfig, table: list[Row]) -> list[str]:
    """What is wrong with the tensors: missing, misshapen, unreadable, left over."""
    wanted = {row.source: row.shape for row in table}
    embedding, head = tied_pair(source.dialect)
    problems = []
    for name, shape in wanted.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            if source.whole:
                hint = "; if embeddings are tied, the config must say so" if name == head else ""
                problems.append(f"tensor {name} is missing{hint}")
        elif tensor.shape != shape:
            problems.append(
                f"tensor {name} has shape {list(tensor.shape)} where the config asks for "
                f"{list(shape)} ({tensor.file.name})"
            )
        elif not is_readable(tensor.encoding):
            problems.append(
                f"tensor {name} is stored as {tensor.encoding}, which is not supported; fetch the "
                f"weights as bf16, f16 or f32 ({tensor.file.name})"
            )
    expected = wanted.keys() | ignored(config, source.dialect)
    for name, tensor in source.tensors.items():
        if name in expected:
            continue
        if name in REFUSED:
            problems.append(f"tensor {name}: {REFUSED[name]}")
        elif name == head and embedding in source.tensors:
            if not is_same(tensor, source.tensors[embedding]):
                problems.append(
                    f"tensor {head} differs from {embedding} though the config says that they are "
                    "tied; correct tie_word_embeddings"
                )
        else:
            problems.append(
                f"tensor {name} is not known for a model of this config, and refusing to leave it "
                f"out ({tensor.file.name})"
            )
    return problems


def _check_upcycle(config: ModelConfig, experts: int) -> list[str]:
    if config.is_moe:
        return ["upcycle_experts: the source is a mixture of experts already"]
    if experts < _UPCYCLED_PICKS:
        return [f"upcycle_experts={experts}: at least {_UPCYCLED_PICKS} experts are needed"]
    return []


def _default_dtype(source: Source, table: list[Row]) -> str:
    used = {row.source: source.tensors[row.source] for row in table}.values()
    total = sum(tensor.nbytes for tensor in used)
    half = sum(tensor.nbytes for tensor in used if tensor.encoding == "BF16")
    return "bfloat16" if 2 * half > total else "float32"


def _write_parameters(
    plan: _Plan, words: Tokenizer | None, folder: Path, seed: int, progress: Progress
) -> None:
    if plan.dtype == "int8" and words is None:
        raise ConversionError(
            ["int8 is calibrated with a text, which needs the model's tokenizer; fetch it"]
        )
    writer = ParameterWriter(folder, plan.shapes)
    routers = np.random.default_rng(seed)
    with Reader() as reader:

        def fill(piece: Piece, out: np.ndarray) -> None:
            if piece.parameter not in plan.table:
                # The router of an upcycled model: as a new one is initialised.
                out[...] = 0.02 * routers.standard_normal(out.size, np.float32)
            for row, start, within in overlaps(piece, plan.table.get(piece.parameter, ())):
                tensor = plan.source.tensors[row.source]
                if row.interleaved:
                    _read_interleaved(
                        reader, tensor, row.start + start, out[within], plan.config.head_size
                    )
                else:
                    reader.read(tensor, row.start + start, out[within])

        if words is not None and plan.dtype == "int8":
            quantize(plan.config, fill, words.encode(calibration_text()), writer, progress)
            return
        done, total = 0, total_bytes(plan.shapes)
        progress(done, total)
        for piece, values in filled(pieces(plan.shapes), np.dtype(plan.dtype), fill):
            writer.write(piece.parameter, piece.index, values.reshape(piece.shape))
            done += values.nbytes
            progress(done, total)


def _read_interleaved(
    reader: Reader, tensor: Tensor, start: int, out: np.ndarray, head_size: int
) -> None:
    """Reads whole heads [head_size, D], turning rows 0 1 2 3 4 5 into 0 2 4 1 3 5."""
    columns = tensor.shape[-1]
    # A piece cuts within a head only if a single head is larger than a piece.
    assert start % (head_size * columns) == 0 and out.size % (head_size * columns) == 0
    stored = np.empty_like(out)
    reader.read(tensor, start, stored)
    pairs = stored.reshape(-1, head_size // 2, 2, columns)
    out.reshape(-1, 2, head_size // 2, columns)[...] = pairs.swapaxes(1, 2)


def _write_tokenizer(source: Source, folder: Path, vocab_size: int) -> Tokenizer | None:
    """Copies the tokenizer, or writes the one that a GGUF file carries. None: there is none."""
    refusal = ""
    if source.metadata:
        try:
            gguf_tokenizer.write(source.metadata, folder)
        except ValueError as error:
            refusal = f"{error}; "
    if not source.metadata or refusal:
        for file in tokenizer.files(source.folder):
            shutil.copy(file, folder)
    try:
        words = tokenizer.load(folder)
    except FileNotFoundError:
        refusal += f"found no tokenizer.model and no tokenizer.json in {source.folder}"
    except ValueError as error:
        refusal += str(error)
    else:
        _check_vocabulary(source, words.vocab_size, vocab_size)
        return words
    logger.warning("without a tokenizer, the checkpoint cannot be served: %s", refusal)
    return None


def _check_vocabulary(source: Source, num_ids: int, vocab_size: int) -> None:
    if num_ids > vocab_size:
        raise ConversionError(
            [
                f"the tokenizer in {source.folder} has {num_ids} ids where the model has "
                f"{vocab_size}; it belongs to another model"
            ]
        )
