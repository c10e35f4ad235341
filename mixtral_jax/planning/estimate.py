"""How a load is spread over chips that share a model: bytes, sums and collectives of one of them.

`candidates` gives every way to split a model; `Spread` reckons one by arithmetic alone, from
shapes, shardings and the experts that so many tokens touch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixtral_jax.cache import PAGE_SIZES, token_bytes
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.planning.chips import Topology
from mixtral_jax.planning.traffic import Collective
from mixtral_jax.sharding import MESH_AXES, ShardingRules, copies_of


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is to be served."""

    model: ModelConfig
    dtype: str
    kv_dtype: str | None  # int8, or None for what activations have
    batch: int  # sequences decoded together
    context: int  # tokens of each
    prefill: int = 2048  # tokens of a step that takes in prompts
    page_size: int = PAGE_SIZES["cpu"]

    def __post_init__(self) -> None:
        if self.context > self.model.max_context:
            raise ConfigError(
                f"--context {self.context} is longer than the model's {self.model.max_context} "
                "tokens; ask for less"
            )
        if self.batch < 1 or self.context < 1 or self.prefill < 1:
            raise ConfigError("batch, context and prefill must be at least 1")

    @property
    def pages(self) -> int:
        """Of one sequence; those that a window has left are free."""
        pages = -(-self.context // self.page_size)
        if self.model.sliding_window is None:
            return pages
        return min(pages, -(-(self.model.sliding_window - 1) // self.page_size) + 1)

    @property
    def seen(self) -> int:
        """Tokens that one sequence attends to."""
        return min(self.context, self.model.sliding_window or self.context)


@dataclass(frozen=True, kw_only=True)
class Split:
    """One way to split a model over chips."""

    data: int
    expert: int
    tensor: int
    copies: int  # of `tensor`
    dp_attention: bool

    @property
    def chips(self) -> int:
        return self.data * self.expert * self.tensor

    @property
    def axes(self) -> tuple[int, int, int, int]:
        return self.data, self.expert, self.tensor // self.copies, self.copies

    @property
    def mesh(self) -> Mesh:
        """Of numbers in place of devices: rules look at sizes only."""
        return Mesh(np.arange(self.chips).reshape(self.axes), MESH_AXES)

    def __str__(self) -> str:
        return f"data={self.data},expert={self.expert},tensor={self.tensor}"


def split(
    model: ModelConfig, data: int, expert: int, tensor: int, dp_attention: bool = False
) -> Split:
    """Raises ConfigError if the model cannot be split so."""
    copies = copies_of(model, expert, tensor, dp_attention)
    found = Split(data=data, expert=expert, tensor=tensor, copies=copies, dp_attention=dp_attention)
    ShardingRules.of(model, found.mesh, dp_attention).check(model, found.mesh)
    return found


def candidates(load: Load, chips: int) -> list[Split]:
    """All ways to split a model over so many chips that leave none without a sequence."""
    found: dict[Any, Split] = {}
    for expert in _divisors(chips):
        for tensor in _divisors(chips // expert):
            for dp_attention in (False, True):
                try:
                    one = split(load.model, chips // expert // tensor, expert, tensor, dp_attention)
                except ConfigError:
                    continue
                rules = ShardingRules.of(load.model, one.mesh, dp_attention)
                if rules.ways("B", one.mesh) > load.batch:
                    continue
                # What is the same in another's words is tried once.
                ways = {
                    letter: tuple(
                        (axis, one.mesh.shape[axis])
                        for axis in getattr(rules, letter)
                        if one.mesh.shape[axis] > 1
                    )
                    for letter in "BEFKNPV"
                }
                found.setdefault(str((one.axes, ways)), one)
    return list(found.values())


def _divisors(number: int) -> Iterator[int]:
    return (size for size in range(1, number + 1) if number % size == 0)


class Spread:
    """Tokens, sequences, experts and bytes of one chip."""

    def __init__(self, load: Load, one: Split, topology: Topology) -> None:
        self.load = load
        self.mesh = one.mesh
        self.rules = ShardingRules.of(load.model, self.mesh, one.dp_attention)
        self.count = self.rules.ways("B", self.mesh)  # parts of the sequences
        self.sequences = -(-load.batch // self.count)
        # Between weights of int8, CPU computes in float32 and accelerators in bfloat16.
        wide = load.dtype == "float32" or (load.dtype == "int8" and topology.platform == "cpu")
        self.between = 4 if wide else 2  # bytes of an activation

    def ways(self, letters: str, *, shared: bool | None = None) -> int:
        """Devices over which any of the letters is split; only the axes that also split tokens,
        or only those that do not."""
        rows = self.rules.B
        names = {axis for letter in letters for axis in getattr(self.rules, letter)}
        if shared is not None:
            names = {axis for axis in names if (axis in rows) == shared}
        return math.prod(self.mesh.shape[axis] for axis in names)

    @cached_property
    def held(self) -> dict[str, int]:
        """Bytes of parameters, all layers: `experts`, `others` of the layers, `embed`, `head`."""
        model = self.load.model
        one_layer = ModelConfig.from_json({**model.to_json(), "num_layers": 1})
        found = dict.fromkeys(("experts", "others", "embed", "head"), 0)
        between = jnp.float32 if self.between == 4 else jnp.bfloat16
        abstract = Transformer(one_layer, dtype=self.load.dtype, activations=between, rngs=None)
        for name, variable in named_parameters(abstract).items():
            array, letters = variable.get_value(), variable.get_metadata("axes")
            ways = math.prod(self.rules.ways(letter, self.mesh) for letter in letters)
            nbytes = array.size * array.dtype.itemsize // ways
            if name.startswith("layers."):
                place = "experts" if "E" in letters else "others"
                found[place] += nbytes * model.num_layers
            else:
                found["embed" if name.startswith("embed.") else "head"] += nbytes
        return found

    @property
    def page_bytes(self) -> int:
        """Of one page, all layers."""
        kind = self.load.kv_dtype or ("float32" if self.between == 4 else "bfloat16")
        whole = token_bytes(self.load.model, kind) * self.load.page_size
        return whole // self.rules.ways("K", self.mesh)

    def touched(self, tokens: int) -> float:
        """Expected share of a chip's experts that so many tokens (of one part) choose."""
        model = self.load.model
        if not model.is_moe:
            return 1.0
        met = tokens * self.ways("EF", shared=True)
        return 1 - (1 - model.experts_per_token / model.num_experts) ** met

    def least(self, tokens: int, sequences: int) -> float:
        """Bytes that a step must move: weights used, pages seen, activations once between two
        layers, and rows of the head."""
        model, held = self.load.model, self.held
        used = held["others"] + held["experts"] * self.touched(tokens)
        used += held["embed"] if model.tied_embeddings else held["head"]
        seen = sequences * -(-self.load.seen // self.load.page_size) * self.page_bytes
        return used + seen + 2 * model.num_layers * tokens * model.hidden_size * self.between

    def operations(self, tokens: int, seen: int) -> float:
        """Floating-point operations of a step on one chip; tokens of one part."""
        model = self.load.model
        heads = model.num_heads / self.ways("N")
        kv_heads = model.num_kv_heads / self.ways("K")
        projections = model.hidden_size * model.head_size * (2 * heads + 2 * kv_heads)
        mixing = 2 * seen * heads * model.head_size
        together = tokens * self.ways("EF", shared=True)
        experts = model.experts_per_token / self.ways("E") if model.is_moe else 1.0
        inner = 3 * model.hidden_size * model.feed_forward_size / self.ways("F")
        layers = tokens * (projections + mixing) + together * experts * inner
        head = self.sequences * self.count * model.hidden_size * model.vocab_size / self.ways("V")
        return 2 * (model.num_layers * layers + head)

    def collectives(self, tokens: int) -> tuple[tuple[Collective, ...], tuple[Collective, ...]]:
        """Of a layer, and of what is around the layers; as `sharding.Layout` writes them."""
        model = self.load.model
        row = model.hidden_size * self.between
        letters = "EF" if model.is_moe else "F"
        layer = [*self._total(tokens * row, "N")]
        gathered = self.ways(letters, shared=True)
        if gathered > 1:
            layer.append(Collective("all-gather", tokens * gathered * row, gathered, False))
        layer += self._total(tokens * gathered * row, letters)
        everyone = self.sequences * self.count
        around = [*self._total(tokens * self.ways("V", shared=True) * row, "V")]
        if self.count > 1:
            around.append(Collective("all-gather", everyone * row, self.count, False))
        if self.ways("V") > 1:
            logits = everyone * model.vocab_size * 4
            around.append(Collective("all-gather", logits, self.ways("V"), False))
        return tuple(layer), tuple(around)

    def _total(self, nbytes: int, letters: str) -> Iterator[Collective]:
        shared = self.ways(letters, shared=True)
        if shared > 1:
            yield Collective("reduce-scatter", nbytes, shared, False)
        rest = self.ways(letters, shared=False)
        if rest > 1:
            yield Collective("all-reduce", nbytes // shared, rest, False)
