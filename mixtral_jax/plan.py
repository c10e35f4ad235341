"""Will a model fit on chips, how fast will it be there, and how is it best split over them.

`candidates` gives every way to split a model, `estimate` reckons each by arithmetic alone, and
`measured` puts what the compiler found (ahead.py) in place of what was reckoned. Nothing runs, so
every speed is an estimate: the step takes as long as its bytes take from memory, or as its sums
take at the chip's published peak, whichever is longer, and then as long as its collectives take on
a ring. Real chips reach 60 to 90 % of that.

Arithmetic knows shapes, shardings and which experts are touched; it does not know what a compiler
pads, copies or keeps for a while. Only there are `temporaries` taken as a share of the weights.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixtral_jax.ahead import Compiled, Job
from mixtral_jax.cache import PAGE_SIZES, token_bytes
from mixtral_jax.config import ConfigError, ModelConfig
from mixtral_jax.hardware import Topology
from mixtral_jax.hlo import Collective
from mixtral_jax.model import Transformer, named_parameters
from mixtral_jax.sharding import MESH_AXES, ShardingRules, copies_of

# What arithmetic takes for temporaries and programs, of the chip's memory.
_SHARE_FOR_THE_REST = 0.05


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


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one step, by what they are spent on."""

    memory: float
    compute: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute) + self.network

    @property
    def bound(self) -> str:
        """What sets it."""
        parts = {"memory": self.memory, "compute": self.compute, "network": self.network}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All that is known of one load on one topology under one split; bytes of one chip."""

    load: Load
    topology: Topology
    split: Split
    method: str  # compiled, or arithmetic
    weights: int
    pages: int
    temporaries: int
    programs: int
    decode_bytes: float  # to and from memory in a decode step
    least_bytes: float  # that any program must move
    decode: Step
    prefill: Step
    layer: tuple[Collective, ...]  # of a decode step
    around: tuple[Collective, ...]
    compiled: Compiled | None = None

    @property
    def total(self) -> int:
        return self.weights + self.pages + self.temporaries + self.programs

    @property
    def fits(self) -> bool:
        return self.total <= self.topology.chip.memory

    @property
    def tokens_per_second(self) -> float:
        return self.load.batch / self.decode.seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.load.prefill / self.prefill.seconds

    @cached_property
    def parts(self) -> "_Parts":
        return _Parts(self.load, self.split, self.topology)

    @property
    def _room(self) -> int:
        """Pages of all layers that one part has room for."""
        free = self.topology.chip.memory - self.total + self.pages
        return max(0, free * self.load.pages * self.parts.sequences // max(1, self.pages))

    @property
    def longest_context(self) -> int:
        """Tokens of each sequence at this batch; 0 where not even the weights fit."""
        pages = self._room // self.parts.sequences
        whole = replace(self.load, context=self.load.model.max_context)
        if pages >= whole.pages:
            return self.load.model.max_context
        return pages * self.load.page_size

    @property
    def largest_batch(self) -> int:
        """Sequences at this context."""
        return self._room // self.load.pages * self.parts.count

    def cost(self, price: float) -> float:
        """Of a million decoded tokens, for a price an hour of all chips together."""
        return price / 3600 / self.tokens_per_second * 1e6

    def to_json(self, price: float | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "estimate": True,
            "method": self.method,
            "topology": str(self.topology),
            "chip": self.topology.chip.name,
            "chips": self.topology.chips,
            "mesh": str(self.split),
            "dp_attention": self.split.dp_attention,
            "fits": self.fits,
            "bytes_per_chip": {
                "weights": self.weights,
                "pages": self.pages,
                "temporaries": self.temporaries,
                "programs": self.programs,
                "total": self.total,
                "capacity": self.topology.chip.memory,
            },
            "longest_context": self.longest_context,
            "largest_batch": self.largest_batch,
            "ms_per_decode_step": self.decode.seconds * 1e3,
            "tokens_per_second": self.tokens_per_second,
            "bound": self.decode.bound,
            "decode_ms": _milliseconds(self.decode),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "prefill_bound": self.prefill.bound,
            "prefill_ms": _milliseconds(self.prefill),
            "decode_bytes": self.decode_bytes,
            "least_bytes": self.least_bytes,
            "bytes_over_least": self.decode_bytes / self.least_bytes,
            "collectives_per_layer": [vars(one) for one in self.layer],
            "collectives_around": [vars(one) for one in self.around],
            "collectives_move_weights": any(
                one.moves_weights for one in (*self.layer, *self.around)
            ),
        }
        if self.compiled is not None:
            cost = self.compiled.decode
            found["kernels"] = {
                "decode": cost.kernels,
                "prefill": self.compiled.prefill.kernels,
            }
            found["compiler"] = {
                "bytes_of_all_memories": cost.xla_bytes,
                "flops": cost.flops,
                "optimal_seconds": cost.xla_seconds,
            }
        if price is not None:
            found["cost_per_million_tokens"] = self.cost(price)
        return found


def _milliseconds(step: Step) -> dict[str, float]:
    return {name: value * 1e3 for name, value in vars(step).items()}


class _Parts:
    """How the load is spread: tokens, sequences, experts and bytes of one chip."""

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


def estimate(load: Load, topology: Topology, one: Split) -> Answer:
    """By arithmetic, without a compiler."""
    parts = _Parts(load, one, topology)
    chip = topology.chip
    held = parts.held
    chunk = -(-load.prefill // parts.count)
    layer, around = parts.collectives(parts.sequences)
    least = parts.least(parts.sequences, parts.sequences)
    # A prompt as long as the step sees half of itself.
    prompt = parts.least(chunk, 1)
    return Answer(
        load=load,
        topology=topology,
        split=one,
        method="arithmetic",
        weights=sum(held.values()),
        pages=parts.sequences * load.pages * parts.page_bytes,
        temporaries=int(_SHARE_FOR_THE_REST * chip.memory),
        programs=0,
        decode_bytes=least,
        least_bytes=least,
        decode=Step(
            memory=least / chip.bandwidth,
            compute=parts.operations(parts.sequences, load.seen) / chip.peak(load.dtype),
            network=_network(load, topology, layer, around),
        ),
        prefill=Step(
            memory=prompt / chip.bandwidth,
            compute=parts.operations(chunk, chunk // 2) / chip.peak(load.dtype),
            network=_network(load, topology, *parts.collectives(chunk)),
        ),
        layer=layer,
        around=around,
    )


def job_of(answer: Answer) -> Job:
    """What the compiler is to be asked about it."""
    load, parts = answer.load, answer.parts
    return Job(
        model=load.model,
        dtype=load.dtype,
        kv_dtype=load.kv_dtype,
        topology=str(answer.topology),
        mesh=answer.split.axes,
        dp_attention=answer.split.dp_attention,
        sequences=parts.sequences,
        context=load.context,
        num_pages=parts.sequences * load.pages,
        page_size=load.page_size,
        prefill=-(-load.prefill // parts.count),
        experts_touched=parts.touched(parts.sequences),
    )


def measured(answer: Answer, found: Compiled) -> Answer:
    """The same with what the compiler found.

    Its count of operations is not taken: it counts rows that a grouped product skips. Reads of
    pages are not in its text (hlo.py): all that a step sees is read once.
    """
    load, topology, parts = answer.load, answer.topology, answer.parts
    chip = topology.chip
    seen = -(-load.seen // load.page_size) * parts.page_bytes
    decode_bytes = found.decode.nbytes + parts.sequences * seen
    return replace(
        answer,
        method="compiled",
        weights=found.weights,
        pages=found.pages,
        temporaries=found.temporaries,
        programs=found.programs,
        decode_bytes=decode_bytes,
        decode=replace(
            answer.decode,
            memory=decode_bytes / chip.bandwidth,
            network=_network(load, topology, found.decode.layer, found.decode.around),
        ),
        prefill=replace(
            answer.prefill,
            memory=(found.prefill.nbytes + seen) / chip.bandwidth,
            network=_network(load, topology, found.prefill.layer, found.prefill.around),
        ),
        layer=found.decode.layer,
        around=found.decode.around,
        compiled=found,
    )


def _network(
    load: Load,
    topology: Topology,
    layer: Sequence[Collective],
    around: Sequence[Collective],
) -> float:
    chip = topology.chip

    def seconds(collectives: Sequence[Collective]) -> float:
        return sum((one.seconds(chip.network, chip.latency) for one in collectives), 0.0)

    return load.model.num_layers * seconds(layer) + seconds(around)


def ranked(answers: Sequence[Answer]) -> list[Answer]:
    """The best first: what fits before what does not, then the fastest."""
    return sorted(
        answers,
        key=lambda one: (not one.fits, -one.tokens_per_second if one.fits else one.total),
    )
