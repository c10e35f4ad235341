"""What a compiled program moves, read from its text (XLA's optimised HLO). No jax.

`bytes` are those that travel between a chip's memory and its cores: every instruction that is
executed reads its operands and writes its results, a gather or a slice only what it takes, a
scatter only what it puts. What stays on the chip (TPU: memory spaces `S(n)` of the layouts) is left
out, while XLA's own "bytes accessed" counts it: a weight that is fetched to vector memory and
multiplied from there is counted there three times.

Two things are not in the text and are left to the caller: how much of the pages is read, so reads
of them by gathers, slices and kernels count nothing here; and how many of its experts a kernel
touches (`experts_touched`). A loop whose length is not known counts once.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mixtral_jax.planning.collective import Collective
from mixtral_jax.planning.hlo import Computation, Instruction, behind_bitcasts, parse

_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
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
# Operand that holds what is put, by instruction.
_UPDATES = {"scatter": 2, "dynamic-update-slice": 1}
# Which of the arrays in its type an operation puts its result into, while it goes on.
_RESULTS = {"copy-start": 0, "slice-start": 1, "all-gather-start": 1, "collective-permute-start": 1}
# Custom calls of the compiler's own that compute nothing.
_MARKS = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "PrepareAsyncCallDone",
    "PrepareAsyncCallStart",
}


@dataclass(frozen=True)
class Traffic:
    """What one call of a program moves on one device."""

    nbytes: float
    collectives: tuple[Collective, ...]
    kernels: Mapping[str, int]  # custom calls that compute something


def program_traffic(text: str, experts_touched: float = 1.0, experts: int = 0) -> Traffic:
    """Reads the text of one compiled program of the serving step.

    Parameters that jax calls `arrays[..]` or `rest[..]` are weights, `pages` the pages. A kernel
    that takes weights of so many `experts` reads the part `experts_touched` of them.
    """
    reader = _TrafficCounter(parse(text), experts_touched, experts)
    nbytes = reader.traffic(reader.entry, reader.arguments())
    return Traffic(nbytes, tuple(reader.collectives), dict(reader.kernels))


_Kinds = frozenset[str]  # of the program's arguments that a value is made of: weights, pages, other


class _TrafficCounter:
    """Walks through what is executed, knowing of each value what it is made of."""

    def __init__(
        self, computations: dict[str, Computation], experts_touched: float, experts: int
    ) -> None:
        self.computations = computations
        self.entry = computations["ENTRY"]
        self.touched = experts_touched
        self.experts = experts
        self.collectives: list[Collective] = []
        self.chains: set[str] = set()
        self.kernels: Counter[str] = Counter()

    def arguments(self) -> list[_Kinds]:
        kinds = []
        for one in self.entry.parameters():
            name = one.op_name
            weights = name.startswith(("arrays[", "rest["))
            kind = "weights" if weights else "pages" if name.startswith("pages") else "other"
            kinds.append(frozenset({kind}))
        return kinds

    def traffic(self, computation: Computation, given: Sequence[_Kinds]) -> float:
        made: dict[str, _Kinds] = {}
        parts: dict[str, list[_Kinds]] = {}  # of tuples
        for one, kinds in zip(computation.parameters(), given, strict=False):
            made[one.name] = kinds
        total = 0.0
        for one in computation.instructions.values():
            sources = [made.get(name, frozenset()) for name in one.operands]
            if one.op == "tuple":
                parts[one.name] = sources
            if one.op == "get-tuple-element" and one.operands[0] in parts:
                index = int(re.findall(r"index=(\d+)", one.text)[0])
                made[one.name] = parts[one.operands[0]][index]
            elif one.op != "parameter":
                made[one.name] = self._kinds(one, sources)
            if one.op == "while" and one.operands[0] in parts:
                parts[one.name] = self._after(one, parts[one.operands[0]])
            total += self._executed(one, computation, made, parts)
        return total

    def _kinds(self, one: Instruction, sources: Sequence[_Kinds]) -> _Kinds:
        """What is put into an array in place does not make another of it."""
        if one.op in _UPDATES:
            return sources[0]
        if one.op == "fusion":
            fused = self.computations[one.called[0]]
            root = behind_bitcasts(fused, fused.root)
            if root.op in _UPDATES:
                target = behind_bitcasts(fused, fused.instructions[root.operands[0]])
                if target.op == "parameter":
                    return sources[fused.parameters().index(target)]
        return frozenset().union(*sources)

    def _after(self, loop: Instruction, before: list[_Kinds]) -> list[_Kinds]:
        """A loop's results are made of what went in at their place, and of all that changes."""
        changed = frozenset().union(*before)
        return [kinds if kinds == {"pages"} else kinds | changed for kinds in before]

    def _executed(
        self,
        one: Instruction,
        computation: Computation,
        made: dict[str, _Kinds],
        parts: dict[str, list[_Kinds]],
    ) -> float:
        kind = one.op.removesuffix("-start")
        if one.op in _FREE or one.op.endswith(("-done", "-update")):
            return 0.0
        if one.op == "while":
            found = _TRIPS.search(one.text)
            trips = int(found[1]) if found else 1
            body = self.computations[_BODY.findall(one.text)[0]]
            return trips * self._body(body, parts.get(one.operands[0], []))
        operands = [computation.instructions.get(name) for name in one.operands]
        if kind in _COLLECTIVES:
            self._collective(kind, one, operands, made)
        if one.op == "conditional":
            branches = zip(one.called, one.operands[1:], strict=False)
            costs = [self._body(self.computations[b], parts.get(t, [])) for b, t in branches]
            return max(costs, default=0.0)
        if one.op in ("call", "async-start"):
            given = [made.get(name, frozenset()) for name in one.operands]
            return sum((self.traffic(self.computations[name], given) for name in one.called), 0.0)
        if one.op == "fusion":
            self._overlapped(one, made)
        read = sum((self._read(i, operand, one, made) for i, operand in enumerate(operands)), 0.0)
        if one.op == "custom-call":
            self._kernel(one)
        return read + self._written(one, operands)

    def _body(self, body: Computation, given: list[_Kinds]) -> float:
        """A loop's body takes one tuple."""
        made: dict[str, _Kinds] = {}
        (parameter,) = body.parameters()
        parts = {parameter.name: given}
        total = 0.0
        everything = frozenset().union(*given)
        for one in body.instructions.values():
            sources = [made.get(name, frozenset()) for name in one.operands]
            made[one.name] = self._kinds(one, sources) if sources else everything
            if one.op == "tuple":
                parts[one.name] = sources
            if one.op == "get-tuple-element" and one.operands[0] == parameter.name and given:
                made[one.name] = given[int(re.findall(r"index=(\d+)", one.text)[0])]
            total += self._executed(one, body, made, parts)
        return total

    def _read(
        self, index: int, operand: Instruction | None, one: Instruction, made: dict[str, _Kinds]
    ) -> float:
        if operand is None:
            return 0.0
        size = float(operand.outside)
        kinds = made.get(operand.name, frozenset())
        if one.op == "custom-call":
            if kinds == {"pages"}:
                return 0.0
            dims = operand.arrays[0].dims if operand.arrays else ()
            if kinds == {"weights"} and len(dims) == 3 and dims[0] == self.experts:
                return size * self.touched
            return size
        taken: float | None = None
        if one.op == "fusion":
            taken = self._taken(self.computations[one.called[0]], index)
        elif one.op == "slice-start" and index == 0:
            taken = float(one.arrays[1].nbytes)
        elif one.op in _SLICES and index == 0:
            taken = float(sum(array.nbytes for array in one.arrays))
        elif one.op in _UPDATES and index == 0:
            taken = 0.0
        if taken is None:
            return size
        return 0.0 if kinds == {"pages"} else min(size, taken)

    def _taken(self, fused: Computation, index: int) -> float | None:
        """What a fusion reads of an operand that it only slices; None for all of it."""
        parameter = fused.parameters()[index]
        if behind_bitcasts(fused, fused.root) is parameter:
            return None
        total = 0.0
        for user, place in self._users(fused, parameter.name):
            taken: float | None = None
            if user.op in _SLICES and place == 0:
                taken = float(sum(array.nbytes for array in user.arrays))
            elif user.op in _UPDATES and place == 0:
                taken = 0.0
            elif user.op == "fusion":
                taken = self._taken(self.computations[user.called[0]], place)
            if taken is None:
                return None
            total += taken
        return total

    def _users(self, fused: Computation, name: str) -> Iterator[tuple[Instruction, int]]:
        """Who computes with a value, behind what only changes its shape."""
        for user in fused.instructions.values():
            if name not in user.operands:
                continue
            place = user.operands.index(name)
            inner = self.computations[user.called[0]] if user.op == "fusion" else None
            passes = inner is not None and (
                behind_bitcasts(inner, inner.root) is inner.parameters()[place]
            )
            if user.op == "bitcast" or passes:
                yield from self._users(fused, user.name)
            else:
                yield user, place

    def _written(self, one: Instruction, operands: Sequence[Instruction | None]) -> float:
        if one.op in _UPDATES:
            put = operands[_UPDATES[one.op]]
            return float(sum(a.nbytes for a in put.arrays)) if put and one.outside else 0.0
        if one.op in _RESULTS:
            result = one.arrays[_RESULTS[one.op]]
            return float(result.nbytes) if result.outside else 0.0
        if one.op == "custom-call" and "output_to_operand_aliasing" in one.text:
            return 0.0
        if one.op == "fusion" and one.outside:
            return min(float(one.outside), _put(self.computations[one.called[0]]))
        return float(one.outside)

    def _collective(
        self,
        kind: str,
        one: Instruction,
        operands: Sequence[Instruction | None],
        made: dict[str, _Kinds],
    ) -> None:
        found = _GROUPS.search(one.text)
        devices = 2
        if found:
            devices = int(found[2]) if found[2] else len(found[1].split(","))
        largest = max((array.nbytes for array in one.arrays), default=0)
        given = max(
            (array.nbytes for operand in operands if operand for array in operand.arrays), default=0
        )
        kinds = frozenset().union(*(made.get(name, frozenset()) for name in one.operands))
        self.collectives.append(
            Collective(kind, max(largest, given), devices, moves_weights=kinds == {"weights"})
        )

    def _overlapped(self, fusion: Instruction, made: dict[str, _Kinds]) -> None:
        """A TPU's collective that goes on beside other work: it stands in several fusions, which
        begin, pass on and end it, and have its chain's number in common."""
        fused = self.computations[fusion.called[0]]
        names = [one.name for one in fused.parameters()]
        given = [made.get(name, frozenset()) for name in fusion.operands]
        inside = dict(zip(names, given, strict=False))
        for one in fused.instructions.values():
            if one.op.removesuffix("-start") not in _COLLECTIVES:
                continue
            chain = _CHAIN.search(one.text)
            if chain is None or chain[1] not in self.chains:
                operands = [fused.instructions.get(name) for name in one.operands]
                self._collective(one.op.removesuffix("-start"), one, operands, inside)
            if chain is not None:
                self.chains.add(chain[1])

    def _kernel(self, one: Instruction) -> None:
        found = re.search(r'custom_call_target="([^"]*)"', one.text)
        target = found[1] if found else "?"
        if target not in _MARKS:
            # A kernel of Pallas is told from another by the name of its function.
            if target == "tpu_custom_call":
                target = re.sub(r"(\.\d+)+$", "", one.name)
            elif target == "__gpu$xla.gpu.triton":
                target = one.op_name.removesuffix("/pallas_call").rpartition("/")[2]
            self.kernels[target] += 1


def _put(fused: Computation) -> float:
    """What a fusion writes: of an update in place, the update."""
    root = fused.root
    roots = [fused.instructions[name] for name in root.operands] if root.op == "tuple" else [root]
    total = 0.0
    for one in roots:
        one = behind_bitcasts(fused, one)
        if one.op in _UPDATES:
            one = fused.instructions[one.operands[_UPDATES[one.op]]]
        total += sum(array.nbytes for array in one.arrays)
    return total
