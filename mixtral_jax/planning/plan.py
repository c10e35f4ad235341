"""Will a model fit on chips, how fast will it be there, and how is it best split over them.

`estimate` reckons a way to split the model (spread.py) by arithmetic alone, and `measured` puts
what the compiler found (ahead.py) in place of what was reckoned. Nothing runs, so every speed is an
estimate: the step takes as long as its bytes take from memory, or as its sums take at the chip's
published peak, whichever is longer, and then as long as its collectives take on a ring. Real chips
reach 60 to 90 % of that.

Arithmetic knows shapes, shardings and which experts are touched; it does not know what a compiler
pads, copies or keeps for a while. Only there are `temporaries` taken as a share of its memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mixtral_jax.planning.chips import Topology
from mixtral_jax.planning.compiler import Compiled, Job
from mixtral_jax.planning.estimate import Load, Split, Spread
from mixtral_jax.planning.traffic import Collective

# What arithmetic takes for temporaries and programs, of the chip's memory.
_SHARE_FOR_THE_REST = 0.05


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
    def spread(self) -> Spread:
        return Spread(self.load, self.split, self.topology)

    @property
    def _room(self) -> int:
        """Pages of all layers that one part has room for."""
        free = self.topology.chip.memory - self.total + self.pages
        return max(0, free * self.load.pages * self.spread.sequences // max(1, self.pages))

    @property
    def longest_context(self) -> int:
        """Tokens of each sequence at this batch; 0 where not even the weights fit."""
        pages = self._room // self.spread.sequences
        whole = replace(self.load, context=self.load.model.max_context)
        if pages >= whole.pages:
            return self.load.model.max_context
        return pages * self.load.page_size

    @property
    def largest_batch(self) -> int:
        """Sequences at this context."""
        return self._room // self.load.pages * self.spread.count

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


def estimate(load: Load, topology: Topology, one: Split) -> Answer:
    """By arithmetic, without a compiler."""
    spread = Spread(load, one, topology)
    chip = topology.chip
    held = spread.held
    chunk = -(-load.prefill // spread.count)
    layer, around = spread.collectives(spread.sequences)
    least = spread.least(spread.sequences, spread.sequences)
    # A prompt as long as the step sees half of itself.
    prompt = spread.least(chunk, 1)
    return Answer(
        load=load,
        topology=topology,
        split=one,
        method="arithmetic",
        weights=sum(held.values()),
        pages=spread.sequences * load.pages * spread.page_bytes,
        temporaries=int(_SHARE_FOR_THE_REST * chip.memory),
        programs=0,
        decode_bytes=least,
        least_bytes=least,
        decode=Step(
            memory=least / chip.bandwidth,
            compute=spread.operations(spread.sequences, load.seen) / chip.peak(load.dtype),
            network=_network(load, topology, layer, around),
        ),
        prefill=Step(
            memory=prompt / chip.bandwidth,
            compute=spread.operations(chunk, chunk // 2) / chip.peak(load.dtype),
            network=_network(load, topology, *spread.collectives(chunk)),
        ),
        layer=layer,
        around=around,
    )


def job_of(answer: Answer) -> Job:
    """What the compiler is to be asked about it."""
    load, spread = answer.load, answer.spread
    return Job(
        model=load.model,
        dtype=load.dtype,
        kv_dtype=load.kv_dtype,
        topology=str(answer.topology),
        mesh=answer.split.axes,
        dp_attention=answer.split.dp_attention,
        sequences=spread.sequences,
        context=load.context,
        num_pages=spread.sequences * load.pages,
        page_size=load.page_size,
        prefill=-(-load.prefill // spread.count),
        experts_touched=spread.touched(spread.sequences),
    )


def measured(answer: Answer, found: Compiled) -> Answer:
    """The same with what the compiler found.

    Its count of operations is not taken: it counts rows that a grouped product skips. Reads of
    pages are not in its text (traffic.py): all that a step sees is read once.
    """
    load, topology, spread = answer.load, answer.topology, answer.spread
    chip = topology.chip
    seen = -(-load.seen // load.page_size) * spread.page_bytes
    decode_bytes = found.decode.nbytes + spread.sequences * seen
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
