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
from functools import cached_property
from typing import NamedTuple

from mixtral_jax.config import ModelConfig

# Experts per token of an upcycled model. Their weights sum to 1, and all experts are equal.
UPCYCLED_EXPERTS_PER_TOKEN = 2


class Line(NamedTuple):
    """One line of the table. `{e}` runs over experts; layers are the dialect's prefix."""

    ours: str
    theirs: str
    # Their dimensions in the letters of axes.py: "N*H D" is a matrix with N*H rows.
    shape: str
    # Where ours is one half of their second dimension: 0 the first, 1 the second.
    half: int | None = None
    # Heads are stored in interleaved rotary order.
    interleaved: bool = False


class Dialect(NamedTuple):
    """All names of one kind of source."""

    top: tuple[Line, ...]
    prefix: str  # of what follows; ours is "layers.{i}."
    layer: tuple[Line, ...]
    dense: tuple[Line, ...]
    experts: tuple[tuple[Line, ...], ...]  # ways of storing experts, the usual one first
    ignored: tuple[str, ...] = ()  # constants, derived, that old files carry in each layer


_HF = Dialect(
    top=(
        Line("embed.weight", "model.embed_tokens.weight", "V D"),
        Line("norm.weight", "model.norm.weight", "D"),
        Line("head.weight", "lm_head.weight", "V D"),
    ),
    prefix="model.layers.{i}.",
    layer=(
        Line("attention_norm.weight", "input_layernorm.weight", "D"),
        Line("attention.q.weight", "self_attn.q_proj.weight", "N*H D"),
        Line("attention.k.weight", "self_attn.k_proj.weight", "K*H D"),
        Line("attention.v.weight", "self_attn.v_proj.weight", "K*H D"),
        Line("attention.o.weight", "self_attn.o_proj.weight", "D N*H"),
        Line("feed_forward_norm.weight", "post_attention_layernorm.weight", "D"),
    ),
    dense=(
        Line("feed_forward.gate.weight", "mlp.gate_proj.weight", "F D"),
        Line("feed_forward.up.weight", "mlp.up_proj.weight", "F D"),
        Line("feed_forward.down.weight", "mlp.down_proj.weight", "D F"),
    ),
    experts=(
        (
            Line("feed_forward.router.weight", "block_sparse_moe.gate.weight", "E D"),
            Line("feed_forward.gate.weight", "block_sparse_moe.experts.{e}.w1.weight", "F D"),
            Line("feed_forward.up.weight", "block_sparse_moe.experts.{e}.w3.weight", "F D"),
            Line("feed_forward.down.weight", "block_sparse_moe.experts.{e}.w2.weight", "D F"),
        ),
        (
            Line("feed_forward.router.weight", "mlp.gate.weight", "E D"),
            Line("feed_forward.gate.weight", "mlp.experts.gate_up_proj", "E 2*F D", half=0),
            Line("feed_forward.up.weight", "mlp.experts.gate_up_proj", "E 2*F D", half=1),
            Line("feed_forward.down.weight", "mlp.experts.down_proj", "E D F"),
        ),
    ),
    ignored=("self_attn.rotary_emb.inv_freq",),
)

_MISTRAL = Dialect(
    top=(
        Line("embed.weight", "tok_embeddings.weight", "V D"),
        Line("norm.weight", "norm.weight", "D"),
        Line("head.weight", "output.weight", "V D"),
    ),
    prefix="layers.{i}.",
    layer=(
        Line("attention_norm.weight", "attention_norm.weight", "D"),
        Line("attention.q.weight", "attention.wq.weight", "N*H D", interleaved=True),
        Line("attention.k.weight", "attention.wk.weight", "K*H D", interleaved=True),
        Line("attention.v.weight", "attention.wv.weight", "K*H D"),
        Line("attention.o.weight", "attention.wo.weight", "D N*H"),
        Line("feed_forward_norm.weight", "ffn_norm.weight", "D"),
    ),
    dense=(
        Line("feed_forward.gate.weight", "feed_forward.w1.weight", "F D"),
        Line("feed_forward.up.weight", "feed_forward.w3.weight", "F D"),
        Line("feed_forward.down.weight", "feed_forward.w2.weight", "D F"),
    ),
    experts=(
        (
            Line("feed_forward.router.weight", "feed_forward.gate.weight", "E D"),
            Line("feed_forward.gate.weight", "feed_forward.experts.{e}.w1.weight", "F D"),
            Line("feed_forward.up.weight", "feed_forward.experts.{e}.w3.weight", "F D"),
            Line("feed_forward.down.weight", "feed_forward.experts.{e}.w2.weight", "D F"),
        ),
    ),
)

_GGUF = Dialect(
    top=(
        Line("embed.weight", "token_embd.weight", "V D"),
        Line("norm.weight", "output_norm.weight", "D"),
        Line("head.weight", "output.weight", "V D"),
    ),
    prefix="blk.{i}.",
    layer=(
        Line("attention_norm.weight", "attn_norm.weight", "D"),
        Line("attention.q.weight", "attn_q.weight", "N*H D", interleaved=True),
        Line("attention.k.weight", "attn_k.weight", "K*H D", interleaved=True),
        Line("attention.v.weight", "attn_v.weight", "K*H D"),
        Line("attention.o.weight", "attn_output.weight", "D N*H"),
        Line("feed_forward_norm.weight", "ffn_norm.weight", "D"),
    ),
    dense=(
        Line("feed_forward.gate.weight", "ffn_gate.weight", "F D"),
        Line("feed_forward.up.weight", "ffn_up.weight", "F D"),
        Line("feed_forward.down.weight", "ffn_down.weight", "D F"),
    ),
    experts=(
        (
            Line("feed_forward.router.weight", "ffn_gate_inp.weight", "E D"),
            Line("feed_forward.gate.weight", "ffn_gate_exps.weight", "E F D"),
            Line("feed_forward.up.weight", "ffn_up_exps.weight", "E F D"),
            Line("feed_forward.down.weight", "ffn_down_exps.weight", "E D F"),
        ),
        # Files made before April 2024.
        (
            Line("feed_forward.router.weight", "ffn_gate_inp.weight", "E D"),
            Line("feed_forward.gate.weight", "ffn_gate.{e}.weight", "F D"),
            Line("feed_forward.up.weight", "ffn_up.{e}.weight", "F D"),
            Line("feed_forward.down.weight", "ffn_down.{e}.weight", "D F"),
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

    Counted in elements of the flattened tensors, `size` elements of the source from `start` on
    become those of the parameter from `index * size` on.
    """

    parameter: str
    index: int  # the piece's place in the parameter: an expert, or 0 where the piece is all of it
    source: str
    shape: tuple[int, ...]  # of the whole source tensor
    start: int
    size: int
    interleaved: bool


@dataclass(frozen=True)
class NameTable:
    """The rows of one source, and the config of the model that they fill.

    `config` differs from the source's where the model becomes a mixture of experts, or gets a head
    of its own. Parameters without rows are initialised at random: the routers of such a mixture.
    """

    config: ModelConfig
    rows: tuple[Row, ...]
    embedding: str  # the source's name for it
    head: str  # likewise; a source may store it though it is tied
    ignored: frozenset[str]  # names that a source may have and that no parameter needs

    @cached_property
    def by_parameter(self) -> dict[str, list[Row]]:
        """The rows of each parameter."""
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.parameter, []).append(row)
        return grouped


def name_table(
    config: ModelConfig,
    dialect: str,
    names: Collection[str] = (),
    *,
    upcycle_experts: int = 0,
    own_head: bool = False,
) -> NameTable:
    """Returns the table for one source.

    Args:
        config: the source's.
        dialect: a key of DIALECTS.
        names: the source's tensors, complete or not. Where a dialect has several ways of storing
            experts, they tell which one it is.
        upcycle_experts: put a dense model's feed-forward matrices into each of so many experts
            (arXiv:2212.05055, sparse upcycling). A number that makes no sense is left to `check`.
        own_head: give a model with tied embeddings a copy of them as its head.
    """
    dialect_lines = DIALECTS[dialect]
    table = _rows(config, dialect_lines, names)
    top = {line.ours: line.theirs for line in dialect_lines.top}
    embedding, head = top["embed.weight"], top["head.weight"]
    if config.tied_embeddings and embedding not in names and head in names:
        # safetensors keeps one of two names for a tensor, here the head's.
        table = [replace(row, source=head) if row.source == embedding else row for row in table]
        embedding = head
    if upcycle_experts >= UPCYCLED_EXPERTS_PER_TOKEN and not config.is_moe:
        table = [
            replace(row, index=expert)
            for row in table
            for expert in range(upcycle_experts if ".feed_forward." in row.parameter else 1)
        ]
        config = replace(
            config, num_experts=upcycle_experts, experts_per_token=UPCYCLED_EXPERTS_PER_TOKEN
        )
    if own_head and config.tied_embeddings:
        copies = [row for row in table if row.parameter == "embed.weight"]
        table += [replace(row, parameter="head.weight") for row in copies]
        config = replace(config, tied_embeddings=False)
    layers = range(config.num_layers)
    ignored = {
        dialect_lines.prefix.format(i=i) + name for name in dialect_lines.ignored for i in layers
    }
    return NameTable(config, tuple(table), embedding, head, frozenset(ignored))


def _rows(config: ModelConfig, dialect: Dialect, names: Collection[str]) -> list[Row]:
    table: list[Row] = []
    for line in dialect.top:
        if line.ours != "head.weight" or not config.tied_embeddings:
            table += _expand(line, config, "", "")
    lines = dialect.layer + (_variant(dialect, names) if config.is_moe else dialect.dense)
    for i in range(config.num_layers):
        for line in lines:
            table += _expand(line, config, f"layers.{i}.", dialect.prefix.format(i=i))
    return table


def _variant(table: Dialect, names: Collection[str]) -> tuple[Line, ...]:
    """Returns the way of storing experts of which the first layer has most names."""
    prefix = table.prefix.format(i=0)
    return max(
        table.experts,
        key=lambda lines: sum(prefix + line.theirs.format(e=0) in names for line in lines),
    )


def _expand(line: Line, config: ModelConfig, our_prefix: str, their_prefix: str) -> Iterator[Row]:
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
            parameter=our_prefix + line.ours,
            index=index,
            source=their_prefix + line.theirs.format(e=index),
            shape=shape,
            start=start + index * stride,
            size=size,
            interleaved=line.interleaved,
        )


def _size(dimension: str, config: ModelConfig) -> int:
    """The size of "N*H" is heads times head size; of "2*F", twice the feed-forward size."""
    factors = dimension.split("*")
    return math.prod(int(f) if f.isdigit() else config.axis_sizes[f] for f in factors)
