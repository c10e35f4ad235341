"""The bytes that a compiled program moves, and its collectives, read from its text. No jax.

Bytes are those that travel between a chip's main memory and its cores: every instruction that runs
reads its operands and writes its results; a gather or a slice reads only what it takes, a scatter
writes only what it puts. Arrays in the memories of a TPU's cores are left out. XLA's own "bytes
accessed" counts them, so that a weight that is fetched to vector memory and multiplied from there
is counted three times.

Two amounts are not in the text and are left to the caller. Reads of the pages by gathers, slices
and kernels count nothing here, because the text does not say how many pages are in use. The share
of its experts that a kernel reads is a parameter. A loop whose length is unknown counts once, and
of a conditional's branches the one that moves most.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mixtral_jax.planning.hlo import Computation, HloError, Instruction, Program, parse
from mixtral_jax.roofline.collective import Collective

_LOOP_LENGTH = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_INDEX = r"index=(\d+)"
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# Operations that move nothing.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "iota",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
_SLICES = {"gather", "dynamic-slice", "slice"}
# Operations that put values into an array, and which operand holds the values.
_UPDATES = {"scatter": 2, "dynamic-update-slice": 1}
# Operations that start a copy, and which array of their type is its result.
_STARTS = {"copy-start": 0, "slice-start": 1, "all-gather-start": 1, "collective-permute-start": 1}
# Targets of custom calls by which the compiler marks something; they compute nothing.
_MARKERS = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "PrepareAsyncCallDone",
    "PrepareAsyncCallStart",
}

# The sources of a value: which of the program's arguments (weights, pages, other) it is made of.
_Sources = frozenset[str]


@dataclass(frozen=True)
class Traffic:
    """The traffic of one call of a program on one device.

    Attributes:
        nbytes: bytes to and from main memory.
        collectives: in the order in which they run; those of a loop's body once.
        kernels: numbers of custom calls that compute something, by name.
    """

    nbytes: float
    collectives: tuple[Collective, ...]
    kernels: Mapping[str, int]


def program_traffic(text: str, expert_reads: float = 1.0, experts: int = 0) -> Traffic:
    """Reads the text of one compiled program of the serving step.

    Parameters that jax calls `arrays[..]`, `blocks[..]` or `rest[..]` are weights, `pages` and
    `layers[..]` are the pages, as in step/programs.py and step/whole_step.py. A kernel whose
    weights have `experts` as the first of three dimensions reads `expert_reads` times their bytes.
    Raises HloError where the text is not understood.
    """
    counter = _TrafficCounter(parse(text), expert_reads, experts)
    nbytes = counter.count(counter.program.entry, counter.argument_sources())
    return Traffic(nbytes, tuple(counter.collectives), dict(counter.kernels))


class _TrafficCounter:
    """A walk over the instructions that run, which tracks the sources of every value."""

    def __init__(self, program: Program, expert_reads: float, experts: int) -> None:
        self.program = program
        self.expert_reads = expert_reads
        self.experts = experts
        self.collectives: list[Collective] = []
        self.chains: set[str] = set()
        self.kernels: Counter[str] = Counter()

    def argument_sources(self) -> list[_Sources]:
        """Sources of the entry's parameters."""
        sources = []
        for parameter in self.program.entry.parameters():
            name = parameter.op_name
            is_weight = name.startswith(("arrays[", "blocks[", "rest["))
            is_pages = name.startswith(("pages", "layers["))
            kind = "weights" if is_weight else "pages" if is_pages else "other"
            sources.append(frozenset({kind}))
        return sources

    def count(self, computation: Computation, given: Sequence[_Sources]) -> float:
        """Bytes that a computation moves, whose parameters have the given sources."""
        values = {
            parameter.name: sources
            for parameter, sources in zip(computation.parameters(), given, strict=False)
        }
        return self._run(computation, values, tuples={})

    def _count_body(self, body: Computation, given: list[_Sources]) -> float:
        """Bytes that a computation moves whose parameter is one tuple of the given sources."""
        (parameter,) = body.parameters()
        values = {parameter.name: frozenset().union(*given)}
        return self._run(body, values, tuples={parameter.name: given} if given else {})

    def _run(
        self,
        computation: Computation,
        values: dict[str, _Sources],
        tuples: dict[str, list[_Sources]],
    ) -> float:
        """Bytes of all instructions; fills in the sources of values and of tuples' elements."""
        total = 0.0
        for item in computation.instructions.values():
            sources = [values.get(name, frozenset()) for name in item.operands]
            if item.op == "tuple":
                tuples[item.name] = sources
            if item.op == "get-tuple-element" and item.operands[0] in tuples:
                values[item.name] = tuples[item.operands[0]][item.number(_INDEX)]
            elif item.op != "parameter":
                values[item.name] = self._sources_of_result(item, sources)
            if item.op == "while" and item.operands[0] in tuples:
                tuples[item.name] = _sources_behind_loop(tuples[item.operands[0]])
            total += self._bytes(item, computation, values, tuples)
        return total

    def _sources_of_result(self, item: Instruction, sources: Sequence[_Sources]) -> _Sources:
        """Sources of an instruction's result.

        An array into which values are put in place keeps its own sources.
        """
        if item.op in _UPDATES:
            return sources[0]
        if item.op == "fusion":
            fused = self.program.called_by(item)
            root = fused.behind_bitcasts(fused.root)
            if root.op in _UPDATES:
                target = fused.behind_bitcasts(fused.instructions[root.operands[0]])
                if target.op == "parameter":
                    return sources[fused.parameters().index(target)]
        return frozenset().union(*sources)

    def _bytes(
        self,
        item: Instruction,
        computation: Computation,
        values: dict[str, _Sources],
        tuples: dict[str, list[_Sources]],
    ) -> float:
        """Bytes that one instruction moves; notes collectives and kernels."""
        kind = item.op.removesuffix("-start")
        if item.op in _FREE or item.op.endswith(("-done", "-update")):
            return 0.0
        if item.op == "while":
            length = _LOOP_LENGTH.search(item.text)
            body = self.program.called_by(item)
            rounds = int(length[1]) if length else 1
            return rounds * self._count_body(body, tuples.get(item.operands[0], []))
        if item.op == "conditional":
            branches = zip(item.called, item.operands[1:], strict=False)
            costs = [
                self._count_body(self.program.computation(name, item), tuples.get(operand, []))
                for name, operand in branches
            ]
            return max(costs, default=0.0)
        if item.op in ("call", "async-start", "call-start"):
            given = [values.get(name, frozenset()) for name in item.operands]
            return self.count(self.program.called_by(item), given)
        operands = [computation.instructions[name] for name in item.operands]
        if kind in _COLLECTIVES:
            self._note_collective(kind, item, operands, values)
        if item.op == "fusion":
            self._note_overlapped(item, values)
        if item.op == "custom-call":
            self._note_kernel(item)
        read = (self._read(i, operand, item, values) for i, operand in enumerate(operands))
        return sum(read, 0.0) + self._written(item, operands)

    def _read(
        self, index: int, operand: Instruction, item: Instruction, values: dict[str, _Sources]
    ) -> float:
        """Bytes that an instruction reads of one of its operands."""
        size = float(operand.main_memory_bytes)
        sources = values.get(operand.name, frozenset())
        if item.op == "custom-call":
            if sources == {"pages"}:
                return 0.0
            dims = operand.arrays[0].dims if operand.arrays else ()
            if sources == {"weights"} and len(dims) == 3 and dims[0] == self.experts:
                return size * self.expert_reads
            return size
        if item.op == "fusion":
            taken = self._taken(self.program.called_by(item), index)
        else:
            taken = _taken_directly(item, index)
        if taken is None:
            return size
        return 0.0 if sources == {"pages"} else min(size, taken)

    def _taken(self, fused: Computation, index: int) -> float | None:
        """Bytes that a fusion takes of an operand that it only slices; None if it reads it all."""
        parameter = fused.parameters()[index]
        if fused.behind_bitcasts(fused.root) is parameter:
            return None
        total = 0.0
        for user, place in self._users(fused, parameter.name):
            if user.op == "fusion":
                taken = self._taken(self.program.called_by(user), place)
            else:
                taken = _taken_directly(user, place)
            if taken is None:
                return None
            total += taken
        return total

    def _users(self, fused: Computation, name: str) -> Iterator[tuple[Instruction, int]]:
        """Instructions that compute with a value, and at which operand; not changes of its shape"""
        for user in fused.instructions.values():
            if name not in user.operands:
                continue
            place = user.operands.index(name)
            changes_shape = user.op == "bitcast"
            if user.op == "fusion":
                inner = self.program.called_by(user)
                changes_shape = inner.behind_bitcasts(inner.root) is inner.parameters()[place]
            if changes_shape:
                yield from self._users(fused, user.name)
            else:
                yield user, place

    def _written(self, item: Instruction, operands: Sequence[Instruction]) -> float:
        """Bytes that an instruction writes."""
        nbytes = float(item.main_memory_bytes)
        if item.op in _UPDATES:
            update = operands[_UPDATES[item.op]]
            return float(sum(array.nbytes for array in update.arrays)) if nbytes else 0.0
        if item.op in _STARTS:
            result = item.arrays[_STARTS[item.op]]
            return float(result.nbytes) if result.in_main_memory else 0.0
        if item.op == "custom-call" and "output_to_operand_aliasing" in item.text:
            return 0.0
        if item.op == "fusion" and nbytes:
            return min(nbytes, _written_by_fusion(self.program.called_by(item)))
        return nbytes

    def _note_collective(
        self,
        kind: str,
        item: Instruction,
        operands: Sequence[Instruction],
        values: dict[str, _Sources],
    ) -> None:
        match = _GROUPS.search(item.text)
        if match is None and kind != "collective-permute":
            raise HloError(f"line {item.line}: no replica groups are understood: {item.text[:200]}")
        devices = 2
        if match:
            devices = int(match[2]) if match[2] else len(match[1].split(","))
        arrays = [array for owner in (item, *operands) for array in owner.arrays]
        largest = max((array.nbytes for array in arrays), default=0)
        sources = frozenset().union(*(values.get(name, frozenset()) for name in item.operands))
        self.collectives.append(Collective(kind, largest, devices, sources == {"weights"}))

    def _note_overlapped(self, fusion: Instruction, values: dict[str, _Sources]) -> None:
        """Notes a TPU's collective that runs beside other work.

        It is printed in several fusions, which begin it, pass it on and end it and which have the
        number of its chain in common.
        """
        fused = self.program.called_by(fusion)
        names = [parameter.name for parameter in fused.parameters()]
        given = [values.get(name, frozenset()) for name in fusion.operands]
        inside = dict(zip(names, given, strict=False))
        for item in fused.instructions.values():
            kind = item.op.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            chain = _CHAIN.search(item.text)
            if chain is None or chain[1] not in self.chains:
                operands = [fused.instructions[name] for name in item.operands]
                self._note_collective(kind, item, operands, inside)
            if chain is not None:
                self.chains.add(chain[1])

    def _note_kernel(self, item: Instruction) -> None:
        match = _TARGET.search(item.text)
        name = match[1] if match else "?"
        if name in _MARKERS:
            return
        # Kernels of Pallas have one target, and the name of their function elsewhere.
        if name == "tpu_custom_call":
            name = re.sub(r"(\.\d+)+$", "", item.name)
        elif name == "__gpu$xla.gpu.triton":
            name = item.op_name.removesuffix("/pallas_call").rpartition("/")[2]
        elif name == "mosaic_gpu_v2":
            name = item.op_name.removesuffix("/mpmd_map").rpartition("/")[2]
        self.kernels[name] += 1


def _sources_behind_loop(before: list[_Sources]) -> list[_Sources]:
    """Sources of a loop's results: those of their place in its input, and all that may change."""
    changed = frozenset().union(*before)
    return [sources if sources == {"pages"} else sources | changed for sources in before]


def _taken_directly(item: Instruction, index: int) -> float | None:
    """Bytes that a slice or an update takes of its first operand; None for anything else."""
    if index == 0 and item.op == "slice-start":
        return float(item.arrays[1].nbytes)
    if index == 0 and item.op in _SLICES:
        return float(sum(array.nbytes for array in item.arrays))
    if index == 0 and item.op in _UPDATES:
        return 0.0
    return None


def _written_by_fusion(fused: Computation) -> float:
    """Bytes that a fusion writes; of an update in place those of the update."""
    root = fused.root
    results = [fused.instructions[name] for name in root.operands] if root.op == "tuple" else [root]
    total = 0.0
    for result in results:
        result = fused.behind_bitcasts(result)
        if result.op in _UPDATES:
            result = fused.instructions[result.operands[_UPDATES[result.op]]]
        total += sum(array.nbytes for array in result.arrays)
    return total
