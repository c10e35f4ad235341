"""Integers of 4 and 8 bits in words as others publish them: GPTQ, AWQ and compressed-tensors.

    gptq                 `qweight`, `qzeros`, `scales`, and `g_idx`, the group of each input; a
                         stored zero is one less than meant unless the format is gptq_v2. Where
                         `desc_act` put inputs into groups by their size, g_idx is not in order,
                         and has to be there
    awq                  `qweight`, `qzeros`, `scales`, in the form that AutoAWQ calls gemm
    compressed-tensors   `weight_packed`, `weight_scale`, `weight_shape`; `weight_zero_point` where
                         integers are not symmetric, `weight_g_idx` where groups are not in order

A weight is (code - zero) * scale; words.py says where each stands. The tensors themselves say
which weights are integers, so lists of exceptions are not read. AutoGPTQ writes a bias for each
weight also where a model has none: it must be zero.

GPTQ's first format takes one off each zero of a whole word at once, as GPTQModel does: below a zero
of 0 one is borrowed from the next. So one is added back to whole words, and zeros are 0 .. 15.

Sources: AutoGPTQ's and GPTQModel's quantize_config, AutoAWQ's AwqConfig; words.py has those of the
layouts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from convert.errors import ConversionError
from convert.source.quantization import REMEDY, check_fields, unsupported
from convert.source.read import Reader
from convert.source.scaled import Attached
from convert.source.tensor import PLAIN, Packing, Tensor
from convert.source.words import AWQ, COMPRESSED_TENSORS, GPTQ, Layout

_GPTQ_SILENT = (
    *("desc_act", "sym", "static_groups", "true_sequential", "act_group_aware", "meta", "lm_head"),
    *("damp_percent", "damp_auto_increment", "mse", "dataset", "tokenizer", "batch_size"),
    *("model_name_or_path", "model_file_base_name", "model_seqlen", "pad_token_id", "backend"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "cache_block_outputs"),
    *("modules_in_block_to_quantize", "use_exllama", "exllama_config", "disable_exllama"),
    *("use_cuda_fp16", "max_input_length", "quantizer", "offload_to_disk"),
)
_AWQ_SILENT = (
    *("do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config"),
    *("sym", "desc_act", "lm_head", "meta"),
)


class _Names(NamedTuple):
    """The endings of a weight's tensors, after its name's last dot."""

    codes: str
    scales: str
    zeros: str
    order: str
    shape: str


_OLD_NAMES = _Names("qweight", "scales", "qzeros", "g_idx", "")
_NAMES = {
    GPTQ: _OLD_NAMES,
    AWQ: _OLD_NAMES,
    COMPRESSED_TENSORS: _Names(
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
    ),
}
_BIAS = "bias"


@dataclass(frozen=True)
class Scheme:
    """The form of a source's integers.

    `group` is the number of inputs that share a scale, None where all do. `zero_offset` is added
    to each zero in a stored word. `needs_order` says that the group of each input has to be stored.
    """

    layout: Layout
    bits: int
    group: int | None
    has_zeros: bool = True
    zero_offset: int = 0
    needs_order: bool = False


def from_gptq(fields: Mapping[str, Any]) -> Scheme:
    """Reads a `quantization_config` of the method gptq.

    Raises ConfigError, with the field and a remedy, for what is not as described above.
    """
    fixed: dict[str, tuple[Any, ...]] = {
        "bits": (4, 8),
        "checkpoint_format": ("gptq", "gptq_v2", None),
        "format": ("gptq", "gptq_v2", None),
        "is_marlin_format": (False, None),
        "pack_dtype": ("int32", None),
        "dynamic": (None, {}),
        "adapter": (None, {}),
    }
    check_fields(fields, fixed, {"group_size", *_GPTQ_SILENT})
    form = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    group = _group(fields.get("group_size", 128))
    return Scheme(
        GPTQ,
        _required(fields, "bits"),
        group,
        zero_offset=0 if form == "gptq_v2" else 1,
        needs_order=group is not None and bool(fields.get("desc_act")),
    )


def from_awq(fields: Mapping[str, Any]) -> Scheme:
    """Reads a `quantization_config` of the method awq; raises ConfigError likewise."""
    fixed: dict[str, tuple[Any, ...]] = {
        "bits": (4,),
        "w_bit": (4,),
        "version": ("gemm", "GEMM", None),
        "format": ("gemm", None),
        "checkpoint_format": ("gemm", None),
        "backend": ("autoawq", "auto", "gptqmodel", None),
        "zero_point": (True,),
        "pack_dtype": ("int32", None),
        "dynamic": (None, {}),
    }
    check_fields(fields, fixed, {"group_size", "q_group_size", *_AWQ_SILENT})
    return Scheme(AWQ, 4, _group(fields.get("group_size", fields.get("q_group_size", 128))))


def _required(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise unsupported(name, None)
    return fields[name]


def _group(size: Any) -> int | None:
    if type(size) is not int or size < -1 or not size:
        raise unsupported("group_size", size)
    return None if size == -1 else size


def attach_packings(tensors: Mapping[str, Tensor], scheme: Scheme | None, whole: bool) -> Attached:
    """Makes one weight of the tensors that belong to it, wherever there are words of integers.

    Args:
        tensors: a source's, by name.
        scheme: what the source's config says; None if it says nothing of such integers.
        whole: all files could be read; else a missing tensor means nothing.

    The few bytes that say how a weight is packed are read: its shape, the groups of its inputs,
    and its bias, to see that it is zero.
    """
    names = _OLD_NAMES if scheme is None else _NAMES[scheme.layout]
    packed = [name for name in tensors if name.rpartition(".")[2] == names.codes]
    if packed and scheme is None:
        problem = (
            f"tensor {packed[0]} holds integers and the config does not say which; add "
            f"quantization_config, or {REMEDY} ({len(packed)} such tensors)"
        )
        return Attached(dict(tensors), [problem])
    result, problems = dict(tensors), list[str]()
    with Reader() as reader:
        for name in packed:
            assert scheme is not None
            stem = name.removesuffix(names.codes)
            group = _Group(stem, names, tensors, scheme, reader)
            for used in group.used:
                result.pop(used)
            try:
                weight = group.weight(whole)
            except ConversionError as error:
                problems += error.problems
                weight = None
            if stem + "weight" in result:
                problems.append(f"tensor {stem}weight is there beside {name}; remove one of them")
            elif weight is not None:
                result[stem + "weight"] = weight
    return Attached(result, problems)


class _Group:
    """The tensors of one weight."""

    def __init__(
        self,
        stem: str,
        names: _Names,
        tensors: Mapping[str, Tensor],
        scheme: Scheme,
        reader: Reader,
    ) -> None:
        self._stem, self._names, self._scheme, self._reader = stem, names, scheme, reader
        endings = {name for name in (*names, _BIAS) if name}
        self._own = {end: tensors[stem + end] for end in endings if stem + end in tensors}

    @property
    def used(self) -> list[str]:
        """The names of all of them."""
        return [self._stem + ending for ending in self._own]

    def weight(self, whole: bool) -> Tensor | None:
        """The weight that they are; None if a tensor is missing and not all files were read.

        Raises ConversionError for tensors that do not belong together.
        """
        scheme, names = self._scheme, self._names
        codes = self._own[names.codes]
        self._check(names.codes, codes, "I32", None)
        shape = scheme.layout.weight_shape(codes.shape, scheme.bits)
        outputs, inputs = shape
        group = scheme.group or inputs
        num_groups = -(-inputs // group)
        needed = [names.scales]
        needed += [names.zeros] if scheme.has_zeros else []
        needed += [names.order] if scheme.needs_order else []
        missing = [name for name in needed if name not in self._own]
        if missing:
            if not whole:
                return None
            raise self._problem(names.codes, f"has no {self._stem}{missing[0]} beside it; fetch it")
        scales, zeros = self._own[names.scales], self._own.get(names.zeros)
        self._check(names.scales, scales, "", scheme.layout.scales_shape(outputs, num_groups))
        if zeros is not None and scheme.has_zeros:
            wanted = scheme.layout.zeros_shape(outputs, num_groups, scheme.bits)
            self._check(names.zeros, zeros, "I32", wanted)
        self._check_values(shape)
        packing = Packing(
            layout=scheme.layout,
            bits=scheme.bits,
            group=group,
            codes=codes,
            scales=scales,
            zeros=zeros if scheme.has_zeros else None,
            zero_offset=scheme.zero_offset,
            order=self._order(inputs, group, num_groups),
        )
        encoding = f"{scheme.layout.name} of {scheme.bits} bits"
        return Tensor(codes.file, codes.offset, shape, encoding, packing=packing)

    def _order(self, inputs: int, group: int, num_groups: int) -> Tensor | None:
        """The tensor with each input's group, if inputs do not come in the order of groups."""
        order = self._own.get(self._names.order)
        if order is None:
            return None
        self._check(self._names.order, order, "I32", (inputs,))
        groups = self._reader.integers(order, self._stem + self._names.order)
        if groups.min(initial=0) < 0 or groups.max(initial=0) >= num_groups:
            raise self._problem(
                self._names.order, f"names groups other than 0 .. {num_groups - 1}; fetch it again"
            )
        return None if np.array_equal(groups, np.arange(inputs) // group) else order

    def _check_values(self, shape: tuple[int, int]) -> None:
        stored = self._own.get(self._names.shape)
        if stored is not None:
            values = self._reader.integers(stored, self._stem + self._names.shape).tolist()
            if values != list(shape):
                raise self._problem(
                    self._names.shape, f"is {values} where the words hold {list(shape)}"
                )
        bias = self._own.get(_BIAS)
        if bias is not None:
            if bias.encoding not in PLAIN:
                raise self._problem(_BIAS, f"is stored as {bias.encoding}")
            values = np.empty(bias.size, np.float32)
            self._reader.read(bias, 0, values)
            if values.any():
                raise self._problem(
                    _BIAS, "is not zero, and these models have no bias; refusing to leave it out"
                )

    def _check(
        self, ending: str, tensor: Tensor, encoding: str, shape: tuple[int, ...] | None
    ) -> None:
        """Raises ConversionError for another encoding (of floats where it is "") or shape."""
        if tensor.encoding != encoding if encoding else tensor.encoding not in PLAIN:
            wanted = encoding or "floats"
            raise self._problem(ending, f"is stored as {tensor.encoding} instead of {wanted}")
        if shape is None and len(tensor.shape) != 2:
            raise self._problem(ending, f"has shape {list(tensor.shape)} instead of a matrix's")
        if shape is not None and tensor.shape != shape:
            bits, group = self._scheme.bits, self._scheme.group or "all"
            raise self._problem(
                ending,
                f"has shape {list(tensor.shape)} where one beside {self._stem}{self._names.codes} "
                f"of {bits} bits in groups of {group} inputs has {list(shape)}",
            )

    def _problem(self, ending: str, text: str) -> ConversionError:
        file = self._own[ending].file.name
        return ConversionError([f"tensor {self._stem}{ending} {text} ({file})"])
