"""A reader for the text of a compiled program: XLA's optimised HLO. No jax.

It reads what traffic.py needs: instructions, their operands and the arrays that they make. A TPU
keeps some arrays in memories of its cores, which a layout marks by `S(n)`; all others lie in the
chip's main memory. Text that is not understood raises HloError with the line, because a line that
was skipped would make a program look cheaper than it is. Names may be printed with or without `%`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BITS = {"pred": 8, "c64": 64, "c128": 128}
_NO_ARRAY = {"token", "opaque"}
_SHAPE = re.compile(r"([a-z]+)(\d*)((?:e\d+m\d+\w*)?)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_OPERATION = re.compile(r"\s*([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_END = re.compile(r"\}(?:, execution_thread=\"[^\"]*\")?\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TWO_BRANCHES = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_NAME = re.compile(r"[\w.\-]+")
# Lines outside computations: the module's header, and tables of source files and stack frames.
_OUTSIDE = re.compile(
    r"\s*$|HloModule |FileNames$|FunctionNames$|FileLocations$|StackFrames$|\d+ [\"{]"
)
# Operations whose parentheses hold a number or a literal, not operands.
_WITHOUT_OPERANDS = {"parameter", "constant"}


class HloError(ValueError):
    """Text of a compiled program that is not understood."""


@dataclass(frozen=True)
class Array:
    """One array that an instruction makes.

    Attributes:
        nbytes: its size.
        dims: its dimensions.
        in_main_memory: it lies in the chip's main memory, not in a memory of its cores.
    """

    nbytes: int
    dims: tuple[int, ...]
    in_main_memory: bool


@dataclass
class Instruction:
    """One instruction of a computation.

    Attributes:
        name: its name, without `%`.
        op: the operation, such as dot or fusion.
        arrays: its result; several arrays for a tuple.
        operands: names of other instructions of its computation.
        text: operation, operands and attributes as they are printed.
        is_root: its result is that of the computation.
        line: number of its line in the text, from 1.
    """

    name: str
    op: str
    arrays: list[Array]
    operands: list[str]
    text: str
    is_root: bool
    line: int

    @property
    def main_memory_bytes(self) -> int:
        """Bytes of its result in the chip's main memory."""
        return sum(array.nbytes for array in self.arrays if array.in_main_memory)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        if match := _BRANCHES.search(self.text):
            return [name.strip().lstrip("%") for name in match[1].split(",")]
        return _TWO_BRANCHES.findall(self.text) or _CALLED.findall(self.text)

    @property
    def op_name(self) -> str:
        """The name that jax gave it; of parameters such as arrays[3] or batch.lengths."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ""

    def number(self, pattern: str) -> int:
        """The number that a pattern's group finds in the text; raises HloError if there is none."""
        match = re.search(pattern, self.text)
        if match is None:
            raise HloError(f"line {self.line} has no {pattern}: {self.text[:200]}")
        return int(match[1])


@dataclass
class Computation:
    """Instructions by their names, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's; raises HloError if there is none."""
        for instruction in self.instructions.values():
            if instruction.is_root:
                return instruction
        raise HloError(f"computation {self.name} has no ROOT")

    def parameters(self) -> list[Instruction]:
        """The computation's parameters, in their order."""
        parameters = [item for item in self.instructions.values() if item.op == "parameter"]
        return sorted(parameters, key=lambda item: item.number(r"parameter\((\d+)\)"))

    def behind_bitcasts(self, instruction: Instruction) -> Instruction:
        """The instruction whose result the given one shows in another shape, or itself."""
        while instruction.op == "bitcast":
            instruction = self.instructions[instruction.operands[0]]
        return instruction


@dataclass
class Program:
    """The computations of a program; `entry` is the one that is run."""

    computations: dict[str, Computation]
    entry: Computation

    def called_by(self, instruction: Instruction) -> Computation:
        """The first computation that an instruction calls; raises HloError if it is unknown."""
        names = instruction.called
        return self.computation(names[0] if names else "?", instruction)

    def computation(self, name: str, caller: Instruction) -> Computation:
        """The computation of this name; raises HloError if there is none."""
        if name not in self.computations:
            raise HloError(f"line {caller.line} calls an unknown computation: {caller.text[:200]}")
        return self.computations[name]


def parse(text: str) -> Program:
    """Reads the text of one program.

    Raises HloError for a line that is not understood, an operand that is not defined in its
    computation, and a program without an entry or with an empty one.
    """
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    current: Computation | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if current is None:
            if match := _COMPUTATION.match(line):
                current = computations.setdefault(match[2], Computation(match[2]))
                entry = current if match[1] else entry
            elif not _OUTSIDE.match(line):
                raise _not_understood(number, line)
        elif _END.match(line):
            _check_operands(current)
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match[2], match[3], bool(match[1]), number)
            if instruction.name in current.instructions:
                raise _not_understood(number, line)
            current.instructions[instruction.name] = instruction
        elif line.strip():
            raise _not_understood(number, line)
    if current is not None:
        raise HloError(f"computation {current.name} does not end")
    if entry is None or not entry.instructions:
        raise HloError("the compiled program has no entry, or its entry has no instructions")
    return Program(computations, entry)


def _not_understood(number: int, line: str) -> HloError:
    return HloError(
        f"line {number} of the compiled program is not understood: {line.strip()[:200]!r}"
    )


def _check_operands(computation: Computation) -> None:
    for instruction in computation.instructions.values():
        for operand in instruction.operands:
            if operand not in computation.instructions:
                raise HloError(
                    f"line {instruction.line} of the compiled program has the operand {operand!r}, "
                    f"which {computation.name} does not define: {instruction.text[:200]!r}"
                )


def _instruction(name: str, text: str, is_root: bool, line: int) -> Instruction:
    """Reads TYPE OP(OPERANDS), ATTRIBUTES; the type of a tuple is in parentheses."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    match = _OPERATION.match(text, end)
    if end <= 0 or match is None:
        raise _not_understood(line, text)
    start = match.end() - 1
    close = _closing(text, start)
    if close == len(text):
        raise _not_understood(line, text)
    op = match[1]
    operands: list[str] = []
    if op not in _WITHOUT_OPERANDS:
        operands = [_operand(item, line) for item in _items(text[start + 1 : close])]
    arrays = list(_arrays(text[:end], line))
    return Instruction(name, op, arrays, operands, text[end:].strip(), is_root, line)


def _closing(text: str, start: int) -> int:
    """Place of the parenthesis that closes the one at `start`; the text's length if none does."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def _items(text: str) -> Iterator[str]:
    """Items of a list that is separated by commas outside all parentheses and braces."""
    text = _COMMENT.sub("", text)
    depth = begin = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            yield text[begin:place]
            begin = place + 1
    if text[begin:].strip():
        yield text[begin:]


def _operand(item: str, line: int) -> str:
    """Name of an operand, which may be printed behind its type."""
    kind, _, name = item.strip().rpartition(" ")
    name = name.removeprefix("%")
    if not _NAME.fullmatch(name) or not _is_type(kind):
        raise _not_understood(line, item)
    return name


def _is_type(text: str) -> bool:
    """The text is empty, the type of an array, or that of a tuple."""
    return not re.sub(r"[(), ]", "", _SHAPE.sub("", text))


def _arrays(kind: str, line: int) -> Iterator[Array]:
    """The arrays of a type, which may be a tuple."""
    kind = _COMMENT.sub("", kind)
    if not _is_type(kind):
        raise _not_understood(line, kind)
    for letters, digits, _, dims, layout in _SHAPE.findall(kind):
        if letters + digits in _NO_ARRAY:
            continue
        bits = _BITS.get(letters + digits) or (int(digits) if digits else 0)
        if not bits:
            raise _not_understood(line, kind)
        shape = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        yield Array(-(-math.prod(shape) * bits // 8), shape, in_main_memory="S(" not in layout)
