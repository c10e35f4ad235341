"""The table: which tensors of a checkpoint from elsewhere make up each of our parameters.

Every dialect stores matrices as `[out, in]`, as we do, so each row below copies one contiguous run
of elements: a whole tensor, one expert's matrix into its place in the stack, or one half of a fused
gate-and-up tensor. Heads are split by shape alone: `[N*H, D]` and `[N, H, D]` are the same bytes.

The exception is rotary order. Hugging Face rotates element j of a head with element j + H/2
("half-split"), which is ours; Mistral's own files and GGUF rotate 2j with 2j + 1 ("interleaved").
A head of six rows stored there as 0 1 2 3 4 5 is 0 2 4 1 3 5 here. Getting this wrong gives a
model that runs and talks nonsense.

Sources of the names:
    hf       transformers' modeling_mistral, modeling_mixtral, modeling_llama; the fused experts
             are what transformers 5 holds in memory
    mistral  mistral-inference, transformer_layers.py and moe.py
    gguf     gguf.constants.TENSOR_NAMES for the architecture "llama"
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from mixtral_jax.config import ModelConfig


class Line(NamedTuple):
    """One line of the table. `{i}` runs over layers and `{e}` over experts."""

    ours: str
    theirs: str
    # Their dimensions in the letters of axes.py: "N*H D" is a matrix with N*H rows.
    shape: str
    # Where ours is one half of their second dimension: 0 the first, 1 the second.
    half: int | None = None
    # Heads are stored in interleaved rotary order.
    interleaved: bool = False


class Dialect(NamedTuple):
    """All names of one kind of source. The first of the `experts` variants is the usual one."""

    shared: tuple[Line, ...]
    dense: tuple[Line, ...]
    experts: tuple[tuple[Line, ...], ...]
    # Derived constants that old files carry, to be passed over.
    ignored: tuple[str, ...] = ()


_ATTENTION = "layers.{i}.attention."
_FEED_FORWARD = "layers.{i}.feed_forward."

_HF_LAYER = "model.layers.{i}."
_HF = Dialect(
    shared=(
        Line("embed.weight", "model.embed_tokens.weight", "V D"),
        Line("layers.{i}.attention_norm.weight", _HF_LAYER + "input_layernorm.weight", "D"),
        Line(_ATTENTION + "q.weight", _HF_LAYER + "self_attn.q_proj.weight", "N*H D"),
        Line(_ATTENTION + "k.weight", _HF_LAYER + "self_attn.k_proj.weight", "K*H D"),
        Line(_ATTENTION + "v.weight", _HF_LAYER + "self_attn.v_proj.weight", "K*H D"),
        Line(_ATTENTION + "o.weight", _HF_LAYER + "self_attn.o_proj.weight", "D N*H"),
        Line(
            "layers.{i}.feed_forward_norm.weight",
            _HF_LAYER + "post_attention_layernorm.weight",
            "D",
        ),
        Line("norm.weight", "model.norm.weight", "D"),
        Line("head.weight", "lm_head.weight", "V D"),
    ),
    dense=(
        Line(_FEED_FORWARD + "gate.weight", _HF_LAYER + "mlp.gate_proj.weight", "F D"),
        Line(_FEED_FORWARD + "up.weight", _HF_LAYER + "mlp.up_proj.weight", "F D"),
        Line(_FEED_FORWARD + "down.weight", _HF_LAYER + "mlp.down_proj.weight", "D F"),
    ),
    experts=(
        (
            Line(
                _FEED_FORWARD + "router.weight", _HF_LAYER + "block_sparse_moe.gate.weight", "E D"
            ),
            Line(
                _FEED_FORWARD + "gate.weight",
                _HF_LAYER + "block_sparse_moe.experts.{e}.w1.weight",
                "F D",
            ),
            Line(
                _FEED_FORWARD + "up.weight",
                _HF_LAYER + "block_sparse_moe.experts.{e}.w3.weight",
                "F D",
            ),
            Line(
                _FEED_FORWARD + "down.weight",
                _HF_LAYER + "block_sparse_moe.experts.{e}.w2.weight",
                "D F",
            ),
        ),
        (
            Line(_FEED_FORWARD + "router.weight", _HF_LAYER + "mlp.gate.weight", "E D"),
            Line(
                _FEED_FORWARD + "gate.weight",
                _HF_LAYER + "mlp.experts.gate_up_proj",
                "E 2*F D",
                half=0,
            ),
            Line(
                _FEED_FORWARD + "up.weight",
                _HF_LAYER + "mlp.experts.gate_up_proj",
                "E 2*F D",
                half=1,
            ),
            Line(_FEED_FORWARD + "down.weight", _HF_LAYER + "mlp.experts.down_proj", "E D F"),
        ),
    ),
    ignored=(_HF_LAYER + "self_attn.rotary_emb.inv_freq",),
)

_MISTRAL_FF = "layers.{i}.feed_forward."
_MISTRAL = Dialect(
    shared=(
        Line("embed.weight", "tok_embeddings.weight", "V D"),
        Line("layers.{i}.attention_norm.weight", "layers.{i}.attention_norm.weight", "D"),
        Line(
            _ATTENTION + "q.weight", "layers.{i}.attention.wq.weight", "N*H D", interleaved=True
        ),
        Line(
            _ATTENTION + "k.weight", "layers.{i}.attention.wk.weight", "K*H D", interleaved=True
        ),
        Line(_ATTENTION + "v.weight", "layers.{i}.attention.wv.weight", "K*H D"),
        Line(_ATTENTION + "o.weight", "layers.{i}.attention.wo.weight", "D N*H"),
        Line("layers.{i}.feed_forward_norm.weight", "layers.{i}.ffn_norm.weight", "D"),
        Line("norm.weight", "norm.weight", "D"),
        Line("head.weight", "output.weight", "V D"),
    ),
    dense=(
        Line(_FEED_FORWARD + "gate.weight", _MISTRAL_FF + "w1.weight", "F D"),
        Line(_FEED_FORWARD + "up.weight", _MISTRAL_FF + "w3.weight", "F D"),
        Line(_FEED_FORWARD + "down.weight", _MISTRAL_FF + "w2.weight", "D F"),
    ),
    experts=(
        (
            Line(_FEED_FORWARD + "router.weight", _MISTRAL_FF + "gate.weight", "E D"),
            Line(_FEED_FORWARD + "gate.weight", _MISTRAL_FF + "experts.{e}.w1.weight", "F D"),
            Line(_FEED_FORWARD + "up.weight", _MISTRAL_FF + "experts.{e}.w3.weight", "F D"),
            Line(_FEED_FORWARD + "down.weight", _MISTRAL_FF + "experts.{e}.w2.weight", "D F"),
        ),
    ),
)

_GGUF_LAYER = "blk.{i}."
_GGUF_ROUTER = Line(_FEED_FORWARD + "router.weight", _GGUF_LAYER + "ffn_gate_inp.weight", "E D")
_GGUF = Dialect(
    shared=(
        Line("embed.weight", "token_embd.weight", "V D"),
        Line("layers.{i}.attention_norm.weight", _GGUF_LAYER + "attn_norm.weight", "D"),
        Line(_ATTENTION + "q.weight", _GGUF_LAYER + "attn_q.weight", "N*H D", interleaved=True),
        Line(_ATTENTION + "k.weight", _GGUF_LAYER + "attn_k.weight", "K*H D", interleaved=True),
        Line(_ATTENTION + "v.weight", _GGUF_LAYER + "attn_v.weight", "K*H D"),
        Line(_ATTENTION + "o.weight", _GGUF_LAYER + "attn_output.weight", "D N*H"),
        Line("layers.{i}.feed_forward_norm.weight", _GGUF_LAYER + "ffn_norm.weight", "D"),
        Line("norm.weight", "output_norm.weight", "D"),
        Line("head.weight", "output.weight", "V D"),
    ),
    dense=(
        Line(_FEED_FORWARD + "gate.weight", _GGUF_LAYER + "ffn_gate.weight", "F D"),
        Line(_FEED_FORWARD + "up.weight", _GGUF_LAYER + "ffn_up.weight", "F D"),
        Line(_FEED_FORWARD + "down.weight", _GGUF_LAYER + "ffn_down.weight", "D F"),
    ),
    experts=(
        (
            _GGUF_ROUTER,
            Line(_FEED_FORWARD + "gate.weight", _GGUF_LAYER + "ffn_gate_exps.weight", "E F D"),
            Line(_FEED_FORWARD + "up.weight", _GGUF_LAYER + "ffn_up_exps.weight", "E F D"),
            Line(_FEED_FORWARD + "down.weight", _GGUF_LAYER + "ffn_down_exps.weight", "E D F"),
        ),
        # Files made before April 2024.
        (
            _GGUF_ROUTER,
            Line(_FEED_FORWARD + "gate.weight", _GGUF_LAYER + "ffn_gate.{e}.weight", "F D"),
            Line(_FEED_FORWARD + "up.weight", _GGUF_LAYER + "ffn_up.{e}.weight", "F D"),
            Line(_FEED_FORWARD + "down.weight", _GGUF_LAYER + "ffn_down.{e}.weight", "D F"),
        ),
    ),
)

DIALECTS = {"hf": _HF, "mistral": _MISTRAL, "gguf": _GGUF}

# Tensors whose presence means that something is computed which we do not compute.
REFUSED = {
    "rope_freqs.weight": "it rescales the rotary frequencies (as Llama 3.1 does), which is not "
    "supported"
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One piece of one parameter, and the run of elements that it is copied from.

    Counted in elements of the flattened tensors, source elements `start` to `start + size` become
    elements `index * size` onwards of the parameter.
    """

    parameter: str
    index: int  # the piece's place in the parameter: an expert, or 0 where the piece is all of it
    source: str
    shape: tuple[int, ...]  # of the whole source tensor
    start: int
    size: int
    interleaved: bool


def rows(config: ModelConfig, dialect: str, names: Collection[str] = ()) -> list[Row]:
    """The whole table for one model, in the order of our parameters' layers.

    `names` are the source's tensors; where a dialect writes experts in two ways, they tell which
    one it is. Whether they are complete is for the caller to check.
    """
    table = DIALECTS[dialect]
    lines = list(table.shared)
    if config.is_moe:
        lines += _variant(table.experts, names)
    else:
        lines += table.dense
    if config.tied_embeddings:
        lines = [line for line in lines if line.ours != "head.weight"]
    layers = [line for line in lines if "{i}" in line.ours]
    first = [line for line in lines if line.ours == "embed.weight"]
    last = [line for line in lines if line not in layers and line not in first]
    found = [row for line in first for row in _expand(line, config, 0)]
    for i in range(config.num_layers):
        found += [row for line in layers for row in _expand(line, config, i)]
    return found + [row for line in last for row in _expand(line, config, 0)]


def ignored(config: ModelConfig, dialect: str) -> set[str]:
    """Names that a source may have and that no parameter needs."""
    patterns = DIALECTS[dialect].ignored
    return {pattern.format(i=i) for pattern in patterns for i in range(config.num_layers)}


def tied_pair(dialect: str) -> tuple[str, str]:
    """Source names of the embedding and of the head, which may be stored though it is tied."""
    names = {line.ours: line.theirs for line in DIALECTS[dialect].shared}
    return names["embed.weight"], names["head.weight"]


def upcycled(table: list[Row], experts: int) -> list[Row]:
    """Rows that put a dense model's feed-forward matrices into each of E experts.

    Routers get no row: there is nothing to copy (arXiv:2212.05055, "Sparse Upcycling").
    """
    return [
        replace(row, index=e)
        for row in table
        for e in range(experts if ".feed_forward." in row.parameter else 1)
    ]


def _variant(variants: tuple[tuple[Line, ...], ...], names: Collection[str]) -> tuple[Line, ...]:
    for lines in variants:
        if any(line.theirs.format(i=0, e=0) in names for line in lines if line.ours[-13:] != _R):
            return lines
    return variants[0]


_R = "router.weight"


def _expand(line: Line, config: ModelConfig, layer: int) -> Iterator[Row]:
    shape = tuple(_size(dimension, config) for dimension in line.shape.split())
    pieces, size, stride, start = 1, math.prod(shape), 0, 0
    if "{e}" in line.theirs:
        pieces = config.num_experts
    elif line.half is not None:
        pieces, stride = shape[0], math.prod(shape[1:])
        size = stride // 2
        start = line.half * size
    for index in range(pieces):
        yield Row(
            parameter=line.ours.format(i=layer),
            index=index,
            source=line.theirs.format(i=layer, e=index),
            shape=shape,
            start=start + index * stride,
            size=size,
            interleaved=line.interleaved,
        )


def _size(dimension: str, config: ModelConfig) -> int:
    """ "N*H" -> number of heads times head size; "2*F" -> twice the feed-forward size."""
    factors = dimension.split("*")
    return math.prod(int(f) if f.isdigit() else config.axis_sizes[f] for f in factors)
