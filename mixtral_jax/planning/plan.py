"""Plans: whether a model fits on chips, how fast a step is there, and which split is the best.

`plan_by_arithmetic` makes a plan from an `Estimate`; `with_compiler` puts what the compiler reports
in place of the arithmetic. Nothing runs, so every speed is an estimate: a step takes as long as its
bytes take from memory or as its operations take at the chip's published peak, whichever is longer,
and then as long as its collectives take on a ring; and no less than its launch takes the host. Real
chips reach 60 to 90 % of that.

Arithmetic knows shapes, shardings and the experts that are chosen; it does not know what a compiler
pads, copies or keeps for a while, so it takes temporaries as a share of the chip's memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mixtral_jax.planning.compiler import CompileJob, CompilerReport
from mixtral_jax.roofline.chips import Topology
from mixtral_jax.roofline.collective import Collective
from mixtral_jax.roofline.estimate import Estimate
from mixtral_jax.roofline.page_memory import temporary_memory
from mixtral_jax.roofline.split import Split
from mixtral_jax.roofline.step_seconds import EstimatedSeconds
from mixtral_jax.roofline.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One workload on one topology under one split: memory and speed.

    Attributes:
        estimate: the arithmetic of the workload, the topology and the split.
        method: compiled or arithmetic; where the figures come from.
        weight_bytes: parameters of one chip.
        cache_bytes: pages of keys and values of one chip.
        temporary_bytes: largest amount that one chip needs for a while.
        program_bytes: compiled programs of one chip.
        decode_bytes: bytes that the busiest chip moves to and from memory in a decode step.
        least_bytes: bytes that any program must move there.
        decode: seconds of a decode step.
        prefill: seconds of a step of `prefill_tokens` tokens.
        layer_collectives: collectives of one layer of a decode step.
        outer_collectives: collectives before and behind the layers.
        report: the compiler's report, None by arithmetic.
    """

    estimate: Estimate
    method: str
    weight_bytes: int
    cache_bytes: int
    temporary_bytes: int
    program_bytes: int
    decode_bytes: float
    least_bytes: float
    decode: EstimatedSeconds
    prefill: EstimatedSeconds
    layer_collectives: tuple[Collective, ...]
    outer_collectives: tuple[Collective, ...]
    report: CompilerReport | None = None

    @property
    def workload(self) -> Workload:
        """The workload that is planned for."""
        return self.estimate.workload

    @property
    def topology(self) -> Topology:
        """The chips that are planned for."""
        return self.estimate.topology

    @property
    def split(self) -> Split:
        """The way in which the chips share the model."""
        return self.estimate.split

    @property
    def total_bytes(self) -> int:
        """Bytes of everything in the memory of one chip."""
        return self.weight_bytes + self.cache_bytes + self.temporary_bytes + self.program_bytes

    @property
    def fits(self) -> bool:
        """The memory of a chip is large enough."""
        return self.total_bytes <= self.topology.chip.memory

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second that all sequences decode together."""
        return self.workload.batch / self.decode.total

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens a second of prompts."""
        return self.workload.prefill_tokens / self.prefill.total

    @property
    def _pages_that_fit(self) -> int:
        """Number of pages, all layers, that the memory beside everything else holds."""
        free = self.topology.chip.memory - self.total_bytes + self.cache_bytes
        pages = self.workload.pages_per_sequence * self.estimate.sequences
        return max(0, free * pages // max(1, self.cache_bytes))

    @property
    def longest_context(self) -> int:
        """Tokens of each sequence that fit at this batch; 0 where not even the weights fit."""
        pages = self._pages_that_fit // self.estimate.sequences
        longest = replace(self.workload, context=self.workload.model.max_context)
        if pages >= longest.pages_per_sequence:
            return longest.context
        return pages * self.workload.page_size

    @property
    def largest_batch(self) -> int:
        """Number of sequences that fit at this context."""
        return self._pages_that_fit // self.workload.pages_per_sequence * self.estimate.num_groups

    def cost(self, price: float) -> float:
        """Cost of a million decoded tokens, where all chips together cost `price` an hour."""
        return price / 3600 / self.tokens_per_second * 1e6

    def to_json(self, price: float | None = None) -> dict[str, Any]:
        """The plan as `mixtral-jax plan --json` prints it; times in milliseconds."""
        collectives = (*self.layer_collectives, *self.outer_collectives)
        fields: dict[str, Any] = {
            "estimate": True,
            "method": self.method,
            "topology": str(self.topology),
            "chip": self.topology.chip.name,
            "chips": self.topology.chips,
            "mesh": str(self.split),
            "dp_attention": self.split.dp_attention,
            "fits": self.fits,
            "bytes_per_chip": {
                "weights": self.weight_bytes,
                "pages": self.cache_bytes,
                "temporaries": self.temporary_bytes,
                "programs": self.program_bytes,
                "total": self.total_bytes,
                "capacity": self.topology.chip.memory,
            },
            "longest_context": self.longest_context,
            "largest_batch": self.largest_batch,
            "ms_per_decode_step": self.decode.total * 1e3,
            "tokens_per_second": self.tokens_per_second,
            "bound": self.decode.bound,
            "decode_ms": _milliseconds(self.decode),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "prefill_bound": self.prefill.bound,
            "prefill_ms": _milliseconds(self.prefill),
            "decode_bytes": self.decode_bytes,
            "least_bytes": self.least_bytes,
            "bytes_over_least": self.decode_bytes / self.least_bytes,
            "collectives_per_layer": [vars(collective) for collective in self.layer_collectives],
            "collectives_around": [vars(collective) for collective in self.outer_collectives],
            "collectives_move_weights": any(collective.moves_weights for collective in collectives),
        }
        if self.report is not None:
            cost = self.report.decode
            fields["kernels"] = {"decode": cost.kernels, "prefill": self.report.prefill.kernels}
            fields["compiler"] = {
                "bytes_of_all_memories": cost.xla_bytes,
                "flops": cost.flops,
                "optimal_seconds": cost.xla_seconds,
            }
        if price is not None:
            fields["cost_per_million_tokens"] = self.cost(price)
        return fields


def _milliseconds(seconds: EstimatedSeconds) -> dict[str, float]:
    return {name: value * 1e3 for name, value in vars(seconds).items()}


def plan_by_arithmetic(workload: Workload, topology: Topology, split: Split) -> Plan:
    """The plan of a workload on a topology under one split, without a compiler."""
    estimate = Estimate(workload=workload, topology=topology, split=split)
    chip = topology.chip
    sequences = estimate.sequences
    chunk = -(-workload.prefill_tokens // estimate.num_groups)
    layer, outer = estimate.collectives(sequences)
    return Plan(
        estimate=estimate,
        method="arithmetic",
        weight_bytes=estimate.weights.total,
        cache_bytes=sequences * workload.pages_per_sequence * estimate.page_bytes,
        temporary_bytes=temporary_memory(chip.memory),
        program_bytes=0,
        decode_bytes=estimate.moved_bytes(sequences, sequences),
        least_bytes=estimate.least_bytes(sequences, sequences),
        decode=estimate.seconds(sequences, sequences, workload.attended_tokens),
        # A token of a prompt as long as the step attends to half of it on average.
        prefill=estimate.seconds(chunk, 1, chunk // 2),
        layer_collectives=layer,
        outer_collectives=outer,
    )


def compile_job(plan: Plan) -> CompileJob:
    """The job that asks the compiler about a plan."""
    workload, estimate = plan.workload, plan.estimate
    prefill_tokens = -(-workload.prefill_tokens // estimate.num_groups)
    return CompileJob(
        model=workload.model,
        dtype=workload.dtype,
        kv_dtype=workload.kv_dtype,
        topology=str(plan.topology),
        mesh=str(plan.split),
        dp_attention=plan.split.dp_attention,
        sequences=estimate.sequences,
        context=workload.context,
        num_pages=estimate.sequences * workload.pages_per_sequence,
        page_size=workload.page_size,
        prefill_tokens=prefill_tokens,
        weight_dtypes=workload.weight_dtypes,
        decode_reads=estimate.read_share(estimate.sequences),
        prefill_reads=estimate.read_share(max(prefill_tokens, estimate.sequences)),
    )


def with_compiler(plan: Plan, report: CompilerReport) -> Plan:
    """The same plan with the compiler's figures in place of those of the arithmetic.

    The compiler's count of operations is not used, because it includes rows that a grouped product
    skips. Reads of pages are not in the program's text (traffic.py): each page that a sequence
    attends to is taken to be read once.
    """
    estimate, chip = plan.estimate, plan.topology.chip
    pages = estimate.attended_page_bytes
    decode_bytes = report.decode.moved_bytes + estimate.sequences * pages
    prefill_bytes = report.prefill.moved_bytes + pages
    return replace(
        plan,
        method="compiled",
        weight_bytes=report.weight_bytes,
        cache_bytes=report.cache_bytes,
        temporary_bytes=report.temporary_bytes,
        program_bytes=report.program_bytes,
        decode_bytes=decode_bytes,
        decode=replace(
            plan.decode,
            memory=decode_bytes / chip.bandwidth,
            network=estimate.network_seconds(
                report.decode.layer_collectives, report.decode.outer_collectives
            ),
        ),
        prefill=replace(
            plan.prefill,
            memory=prefill_bytes / chip.bandwidth,
            network=estimate.network_seconds(
                report.prefill.layer_collectives, report.prefill.outer_collectives
            ),
        ),
        layer_collectives=report.decode.layer_collectives,
        outer_collectives=report.decode.outer_collectives,
        report=report,
    )


def best_first(plans: Sequence[Plan]) -> list[Plan]:
    """Plans in the order of preference.

    Plans that fit come before those that do not. Among those that fit the fastest is first, and of
    equally fast ones the one that needs to move fewer bytes; among the others the smallest.
    """
    return sorted(
        plans,
        key=lambda plan: (
            not plan.fits,
            -plan.tokens_per_second if plan.fits else plan.total_bytes,
            plan.least_bytes,
        ),
    )
