"""The text of a compiled program (XLA's optimised HLO), taken apart. No jax.

Only what traffic.py wants to know: who computes what from what, and which arrays lie where. What
stays on the chip (TPU: memory spaces `S(n)` of the layouts) is told from what lies in its memory.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_SIZES = {"pred": 1, "bf16": 2, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Array:
    nbytes: int
    dims: tuple[int, ...]
    outside: bool  # in the chip's memory, not in its cores'


@dataclass
class Instruction:
    name: str
    op: str
    arrays: list[Array]
    operands: list[str]
    text: str
    is_root: bool

    @property
    def outside(self) -> int:
        return sum(array.nbytes for array in self.arrays if array.outside)

    @property
    def called(self) -> list[str]:
        if found := _BRANCHES.search(self.text):
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        return _CALLED.findall(self.text)

    @property
    def op_name(self) -> str:
        """As jax names it: of parameters such as arrays[3] or batch.lengths."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


@dataclass
class Computation:
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(one for one in self.instructions.values() if one.is_root)

    def parameters(self) -> list[Instruction]:
        found = [one for one in self.instructions.values() if one.op == "parameter"]
        return sorted(found, key=lambda one: int(re.findall(r"parameter\((\d+)\)", one.text)[0]))


def behind_bitcasts(computation: Computation, one: Instruction) -> Instruction:
    while one.op == "bitcast":
        one = computation.instructions[one.operands[0]]
    return one


def parse(text: str) -> dict[str, Computation]:
    """Computations by their names; the entry is "ENTRY"."""
    computations: dict[str, Computation] = {}
    current = Computation()
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault("ENTRY" if found[1] else found[2], Computation())
        elif found := _INSTRUCTION.match(line):
            one = _instruction(found[2], found[3], is_root=bool(found[1]))
            current.instructions[one.name] = one
    return computations


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    """`text` is TYPE OP(OPERANDS), ATTRIBUTES; a tuple's type is in parentheses."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].strip()
    op, _, _ = rest.partition("(")
    start = len(op)
    inside = rest[start + 1 : _closing(rest, start)]
    return Instruction(
        name, op.strip(), list(_arrays(kind)), re.findall(r"%([\w.\-]+)", inside), rest, is_root
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def _arrays(kind: str) -> Iterator[Array]:
    for dtype, dims, layout in _SHAPE.findall(kind):
        digits = re.match(r"[a-z]+(\d+)", dtype)
        if dtype not in _SIZES and not digits:
            continue
        size = _SIZES.get(dtype) or int(digits[1] if digits else 0) / 8
        shape = tuple(int(part) for part in dims.split(",") if part)
        yield Array(int(math.prod(shape) * size), shape, outside="S(" not in layout)
