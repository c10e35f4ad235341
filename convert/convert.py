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
from collections.abc import Mapping, Sequence
from functools import partial
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
from convert.quantize.kept import (
    FORMS,
    GGUF_FORMS,
    Lost,
    fp8_shapes,
    is_rounded,
    keeps_all,
    keeps_most,
    rounded_tensors,
    weights_beside,
    write_kept,
)
from convert.recommended_sampling import add_recommended
from convert.served_name import served_as
from convert.source import gguf_tokenizer
from convert.source.open import Source, open_source
from convert.source.tensor import FP8
from mixtral_jax.checkpoint.folder import Card, finished_at
from mixtral_jax.checkpoint.parameters import CHUNK_BYTES, parameter_shapes
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.errors import ConfigError
from mixtral_jax.placement import DTYPES, WeightDtypes, checked_weight_dtypes
from mixtral_jax.tokenization import tokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.weight import INT8_GROUPS

_FEW_TOKENS = 1024  # of a text by which weights are rounded
logger = logging.getLogger(__name__)


def convert(
    path: Path,
    destination: Path | str,
    *,
    dtype: str | None = None,
    weight_dtypes: Mapping[str, str] | WeightDtypes = (),
    mixed: bool = False,
    calibration: Path | None = None,
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
        dtype: "float32" or "bfloat16" for all parameters; "int8", "int4" and "fp8" are kept where
            the source's layers are in a form that they hold (`convert.quantize.kept`), else made:
            int8 and int4 by the tokenizer and a text. By default what the source's layers are kept
            as, else bfloat16 where most other bytes are bf16, else float32: no layer loses anything
            unless it is asked for. (f16 and the quantised forms of GGUF have values that bf16 has
            not.)
        weight_dtypes: of single weights of an int4 model that are int8 or int8x16, or of an int8
            model that are int8x16, by their names, such as "layers.0.attention.v".
        mixed: the weights that lose most in int4 are int8, see `convert.quantize.int4.mixed`; for
            an int4 model that is made, not kept.
        calibration: a file of text, in UTF-8, by which an int8 or int4 model is made; by default
            the one beside `convert.quantize.calibration`.
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
    check_dtype(dtype)
    source = open_source(path)
    if source.config is None:
        raise ConversionError(source.problems)
    check_size(source, upcycle_experts)
    table_of = partial(
        name_table,
        source.config,
        source.dialect,
        source.tensors,
        upcycle_experts=upcycle_experts,
    )
    dtype = dtype or _default_dtype(source, table_of())
    table = table_of(own_head=dtype in CALIBRATED)
    kept = _is_kept(source, table, dtype)
    is_made = dtype in CALIBRATED and not kept
    for option, is_given, dtypes in (
        ("mixed", mixed, ("int4",)),
        ("calibration", calibration is not None, CALIBRATED),
    ):
        if is_given and not (is_made and dtype in dtypes):
            whole = table_of(own_head=True)
            raise ConversionError([_unneeded(option, dtypes, source, whole, dtype)])
    if mixed:
        weight_dtypes = int4.mixed(table.config) | dict(weight_dtypes)
    if kept and source.dialect == "gguf":
        weight_dtypes = dict(weights_beside(table, source.tensors, dtype)) | dict(weight_dtypes)
    shapes = parameter_shapes(table.config, dtype, weight_dtypes)
    if dtype == "fp8":
        shapes = fp8_shapes(shapes, _float_dtype(source, table))
    own_name, maker = served_as(path)
    card = Card(
        model=table.config,
        dtype=dtype,
        name=name or own_name,
        provider=provider or maker,
        weight_dtypes=checked_weight_dtypes(table.config, dtype, weight_dtypes),
    )
    text = calibration_text(calibration) if is_made else ""
    with tempfile.TemporaryDirectory() as scratch:
        words = _tokenizer(source, Path(scratch))
        num_ids = None if words.tokenizer is None else words.tokenizer.required_vocab_size
        check(source, table, shapes, destination, dtype, upcycle_experts, num_ids, is_made)
        with finished_at(destination) as folder, Assembly(source.tensors, table, seed) as assembly:
            if words.tokenizer is not None:
                tokenizer.copy(words.folder, folder)
            else:  # kept for a release that supports it
                for file in tokenizer.files(words.folder):
                    shutil.copy(file, folder)
            add_recommended(folder, path.stem if path.is_file() else own_name)
            writer = ParameterWriter(folder, shapes, chunk_bytes)
            if kept:
                lost = write_kept(assembly, writer, progress)
                if lost.parameters and source.dialect == "gguf" and dtype in CALIBRATED:
                    _warn_of(lost, GGUF_FORMS[dtype], "float32")
                elif lost.parameters and rounded_tensors(table, source.tensors):
                    _warn_of(lost, FORMS[dtype], "bfloat16")
            elif words.tokenizer is not None and is_made:
                ids = words.tokenizer.encode(text)
                if len(ids) < _FEW_TOKENS:
                    logger.warning(
                        "%s has %d tokens only, which say little of what the model meets: give "
                        "some thousands",
                        calibration,
                        len(ids),
                    )
                rounding = int8.quantize if dtype == "int8" else int4.quantize
                rounding(card.model, assembly.fill, ids, writer, progress)
            else:
                write_pieces(writer, np.dtype(dtype), assembly.fill, progress)
            card.write(folder)
    return card


def check_dtype(dtype: str | None) -> None:
    """Raises ConversionError for a dtype that `convert` does not know."""
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError([f"dtype {dtype!r} is not supported; use {' or '.join(DTYPES)}"])


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


def _unneeded(
    name: str, dtypes: Sequence[str], source: Source, table: NameTable, dtype: str
) -> str:
    """Says that an option is given where nothing is rounded so, and what to do.

    Args:
        name: of the option.
        dtypes: for which it is.
        source: the model.
        table: of its parameters, with a head of their own.
        dtype: to which it is to be converted.
    """
    kept = [kind for kind in dtypes if _is_kept(source, table, kind)]
    possible = [kind for kind in dtypes if kind not in kept and _has_shapes(table, kind, {})]
    asked = f"give --dtype {' or '.join(possible)}"
    if dtype in kept:
        remedy = f"this source is {dtype} already, leave --{name} out"
        remedy += f" or {asked}" if possible else ""
    elif possible:
        remedy = asked
    else:
        remedy = f"leave --{name} out"
        remedy += f"; --dtype {kept[0]} keeps what this source is already" if kept else ""
    return f"{name} is for weights that are rounded to {' or '.join(dtypes)} here; {remedy}"


def _default_dtype(source: Source, table: NameTable) -> str:
    """Returns the dtype that keeps all layers' weights as they are, else a float dtype."""
    rounded = rounded_tensors(table, source.tensors)
    if not rounded:
        return _float_dtype(source, table)
    for dtype in CALIBRATED + ("fp8",):
        if _keeps_all(source, table, dtype):
            return dtype
    is_fp8 = any(tensor.encoding == FP8 for tensor in rounded)
    is_int4 = any(tensor.packing is not None and tensor.packing.bits == 4 for tensor in rounded)
    wide = "bfloat16" if is_fp8 else _float_dtype(source, table)
    narrow = "fp8" if is_fp8 else "int4" if is_int4 else "int8"
    logger.warning(
        "some weights are not %s: all are widened to %s; --dtype %s rounds those anew",
        *(FORMS[narrow], wide, narrow),
    )
    return wide


def _keeps_all(source: Source, table: NameTable, dtype: str) -> bool:
    if not _has_shapes(table, dtype, {}):
        return False
    return keeps_all(table, source.tensors, parameter_shapes(table.config, dtype), dtype)


def _has_shapes(table: NameTable, dtype: str, beside: Mapping[str, str]) -> bool:
    """Says whether a model of these dtypes exists: its sizes may be no whole groups."""
    try:
        parameter_shapes(table.config, dtype, beside)
    except ConfigError:
        return False
    return True


def _is_kept(source: Source, table: NameTable, dtype: str) -> bool:
    """Says whether a dtype is made without a text: fp8, and any whose weights the source has.

    Layers' weights that the source holds as floats are rounded plainly then. Of a GGUF file, whose
    types are usually mixed, most weights must be kept, and the others are int8x16.
    """
    if source.dialect == "gguf" and dtype in CALIBRATED:
        kept = "int4" if dtype == "int4" else INT8_GROUPS
        beside = dict(weights_beside(table, source.tensors, dtype))
        is_whole = _has_shapes(table, dtype, beside)
        return is_whole and keeps_most(table, source.tensors, kept)
    rounded = rounded_tensors(table, source.tensors)
    held = bool(rounded) and all(tensor.kept_dtype == dtype for tensor in rounded)
    return dtype == "fp8" or (dtype in CALIBRATED and held)


def _warn_of(lost: Lost, form: str, wide: str) -> None:
    """Says what was lost where weights were not of the form that could be kept."""
    logger.warning(
        "%d parameters are not %s, and were rounded anew: %.1f %% of their size (root mean square) "
        "is lost; --dtype %s keeps them",
        *(lost.parameters, form, 100 * lost.error, wide),
    )


def _float_dtype(source: Source, table: NameTable) -> str:
    """Returns bfloat16 where most bytes of the table's float tensors are bf16, else float32."""
    names = {row.source for row in table.rows} & source.tensors.keys()
    tensors = [tensor for name in names if not is_rounded(tensor := source.tensors[name])]
    nbytes = {tensor: tensor.nbytes for tensor in tensors if tensor.is_readable}
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
