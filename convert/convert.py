"""Conversion: from the weights that others publish to a checkpoint folder of ours.

    open_source      what is there, by headers alone
    name_table       what should be there
    check            whether they agree: nothing is missing, misshapen or left over
    Assembly         fills a piece of a parameter with what the table says
    ParameterWriter  writes it, while another thread reads the next one

All faults are found before anything is written, and reported together. Memory does not grow with
the model: two pieces of 32 MiB, what decoding one of them takes, and the libraries. Only a complete
checkpoint gets its name.
"""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.assemble import Assembly
from convert.check import CALIBRATED, check, check_size
from convert.errors import ConversionError
from convert.name_table import NameTable, name_table
from convert.pieces import write_pieces
from convert.progress import Progress
from convert.pull import pull
from convert.quantize import int4, int8
from convert.quantize.calibration import calibration_text
from convert.quantize.fp8 import fp8_shapes, holds_fp8, keeps_fp8, write_fp8
from convert.recommended_sampling import add_recommended
from convert.served_name import served_as
from convert.source import gguf_tokenizer
from convert.source.open import Source, open_source
from convert.source.read import is_readable
from mixtral_jax.checkpoint.folder import Card, finished_at
from mixtral_jax.checkpoint.parameters import CHUNK_BYTES, parameter_shapes
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.placement import DTYPES
from mixtral_jax.tokenization import tokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def convert(
    path: Path,
    destination: Path | str,
    *,
    dtype: str | None = None,
    upcycle_experts: int = 0,
    seed: int = 0,
    name: str | None = None,
    provider: str | None = None,
    progress: Progress = lambda done, total: None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Card:
    """Writes the weights at `path` as a checkpoint folder, with the tokenizer beside them.

    Args:
        path: a folder or file as `convert.source.open` describes.
        destination: a folder that does not exist or is empty; may be the URL of one in an object
            store (gs://BUCKET/FOLDER, s3://BUCKET/FOLDER), which is written to at the end.
        dtype: "float32" or "bfloat16" for all parameters; "int8" and "int4" as the modules of
            `convert.quantize` make them, which need the tokenizer; or "fp8", which is kept or
            made. By default fp8 where the source's weights are FP8 with a scale for each output or
            tensor, bfloat16 where most other bytes are bf16, else float32: nothing is lost unless
            it is asked for. (f16 and the quantised forms of GGUF have values that bf16 has not.)
        upcycle_experts: make a mixture of this many experts out of a dense model, each a copy of
            its feed-forward layer, with random routers. It computes what the dense model does.
        seed: of the random routers.
        name: what the model is called when served; by default from the path, see
            `convert.served_name`.
        provider: who made it; likewise.
        progress: called with bytes written and bytes in all.
        chunk_bytes: bytes of a stored chunk, and of a piece that is moved at once.

    A tokenizer that is missing or not supported is logged as a warning: weights alone are a
    checkpoint, but one that cannot be served. Its files are copied all the same.

    Raises ConversionError, with everything that is wrong with the source, and what `finished_at`
    raises for the destination. Nothing is left at `destination` then.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError([f"dtype {dtype!r} is not supported; use {' or '.join(DTYPES)}"])
    source = open_source(path)
    if source.config is None:
        raise ConversionError(source.problems)
    check_size(source, upcycle_experts)
    table = name_table(
        source.config,
        source.dialect,
        source.tensors,
        upcycle_experts=upcycle_experts,
        own_head=dtype in CALIBRATED,
    )
    dtype = dtype or _default_dtype(source, table)
    shapes = parameter_shapes(table.config, dtype)
    if dtype == "fp8":
        shapes = fp8_shapes(shapes, _float_dtype(source, table))
    own_name, maker = served_as(path)
    card = Card(model=table.config, dtype=dtype, name=name or own_name, provider=provider or maker)
    with tempfile.TemporaryDirectory() as scratch:
        words = _tokenizer(source, Path(scratch))
        num_ids = None if words.tokenizer is None else words.tokenizer.required_vocab_size
        check(source, table, shapes, destination, dtype, upcycle_experts, num_ids)
        with finished_at(destination) as folder, Assembly(source.tensors, table, seed) as assembly:
            if words.tokenizer is not None:
                tokenizer.copy(words.folder, folder)
            else:  # kept for a release that supports it
                for file in tokenizer.files(words.folder):
                    shutil.copy(file, folder)
            add_recommended(folder, path.stem if path.is_file() else own_name)
            writer = ParameterWriter(folder, shapes, chunk_bytes)
            if words.tokenizer is not None and dtype in CALIBRATED:
                ids = words.tokenizer.encode(calibration_text())
                rounding = int8.quantize if dtype == "int8" else int4.quantize
                rounding(card.model, assembly.fill, ids, writer, progress)
            elif dtype == "fp8":
                lost = write_fp8(assembly, writer, progress)
                if lost.parameters and holds_fp8(source.tensors.values()):
                    logger.warning(
                        "%d parameters are not FP8 with a scale for each output or tensor, and "
                        "were rounded anew: %.1f %% of their size (root mean square) is lost; "
                        "--dtype bfloat16 keeps them",
                        *(lost.parameters, 100 * lost.error),
                    )
            else:
                write_pieces(writer, np.dtype(dtype), assembly.fill, progress)
            card.write(folder)
    return card


def convert_once(
    name: str, *, upcycle_experts: int = 0, folder: Path | str = "checkpoints"
) -> Path:
    """Pulls a model by its name and converts it, unless that was done; returns the checkpoint.

    Args:
        name: what `pull` takes.
        upcycle_experts: as for `convert`; the checkpoint's name ends with, for example, "-4x".
        folder: of the checkpoint, whose name is the model's.

    Raises what `pull` and `convert` raise.
    """
    ending = f"-{upcycle_experts}x" if upcycle_experts else ""
    checkpoint = Path(folder, name.rpartition("/")[2] + ending)
    if not checkpoint.exists():
        convert(pull(name), checkpoint, upcycle_experts=upcycle_experts)
    return checkpoint


def _default_dtype(source: Source, table: NameTable) -> str:
    """Returns fp8 where a source's weights can be kept so; else a float dtype."""
    if not holds_fp8(source.tensors.values()):
        return _float_dtype(source, table)
    if keeps_fp8(table, source.tensors, parameter_shapes(table.config, "fp8")):
        return "fp8"
    logger.warning(
        "some weights are not FP8 with a scale for each output or tensor: all are widened to "
        "bfloat16; --dtype fp8 rounds those anew"
    )
    return "bfloat16"


def _float_dtype(source: Source, table: NameTable) -> str:
    """Returns bfloat16 where most bytes of the table's float tensors are bf16, else float32."""
    names = {row.source for row in table.rows} & source.tensors.keys()
    tensors = [tensor for name in names if (tensor := source.tensors[name]).scale is None]
    nbytes = {tensor: tensor.nbytes for tensor in tensors if is_readable(tensor.encoding)}
    half = sum(size for tensor, size in nbytes.items() if tensor.encoding == "BF16")
    return "bfloat16" if 2 * half > sum(nbytes.values()) else "float32"


class _Words(NamedTuple):
    """A source's tokenizer, if it is supported, and the folder with its files."""

    tokenizer: Tokenizer | None
    folder: Path


def _tokenizer(source: Source, scratch: Path) -> _Words:
    """Loads the tokenizer beside a source, or the one that a GGUF file carries.

    `scratch` is an empty folder; files of a GGUF tokenizer are written there. If the tokenizer is
    missing or not supported, a warning is logged.
    """
    folder, refusal = source.folder, ""
    if source.metadata:
        try:
            gguf_tokenizer.write(source.metadata, scratch)
            folder = scratch
        except ValueError as error:
            refusal = f"{error}; "
    try:
        words = tokenizer.load(folder)
    except FileNotFoundError as error:
        refusal += f"found {error}"
    except ValueError as error:
        refusal += str(error)
    else:
        vocab_size = source.config.vocab_size if source.config else words.vocab_size
        if words.required_vocab_size <= vocab_size < words.vocab_size:
            logger.warning(
                "the tokenizer in %s has %d ids, of which the model knows %d: the others, such as "
                "one for padding, are not used",
                *(folder, words.vocab_size, vocab_size),
            )
        return _Words(words, folder)
    logger.warning("without a tokenizer, the checkpoint cannot be served: %s", refusal)
    return _Words(None, folder)
