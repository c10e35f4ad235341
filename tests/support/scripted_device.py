"""A device in plain Python that computes as a model does, and fails where a script says so."""

import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from serving.engine.device import Masks
from serving.scheduling.request import Drawn, Request, RowDraws
from serving.scheduling.step_plan import Chunk, Limits, StepPlan

VOCAB = 97
Place = Literal["before", "after", "drawn", "answer"]
"""Where a step fails: before its launch has touched a page, after that, when it is read, or when it
is read and the pages are whole."""
Script = Callable[[int, Sequence[StepPlan]], Place | None]
"""Says where a step fails, by its number from 0 and its plans."""


class DeviceFault(RuntimeError):
    """A fault that the script has asked for."""


def next_token(tokens: Sequence[int], seed: int, allowed: frozenset[int] | None = None) -> int:
    """The token that follows, from all tokens before it and the seed of its choice."""
    number = zlib.crc32(repr((list(tokens), seed)).encode())
    choices = range(VOCAB) if allowed is None else sorted(allowed)
    return choices[number % len(choices)]


def bits_of(ids: Iterable[int]) -> np.ndarray:
    """A row of a mask that allows these ids."""
    bits = np.zeros(-(-VOCAB // 32) * 32, np.uint8)
    bits[[*ids]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def ids_of(row: np.ndarray) -> frozenset[int]:
    """The ids that a row of a mask allows."""
    bits = np.unpackbits(np.ascontiguousarray(row).view(np.uint8), bitorder="little")
    return frozenset(np.flatnonzero(bits[:VOCAB]).tolist())


def undisturbed(request: Request, choice: int = 0) -> list[int]:
    """The tokens of an answer that nothing disturbs."""
    assert request.sampling.seed is not None
    tokens = list(request.prompt_ids)
    while len(tokens) < len(request.prompt_ids) + request.max_tokens:
        tokens.append(next_token(tokens, request.sampling.seed + choice))
        if tokens[-1] in request.eos_ids:
            break
    return tokens[len(request.prompt_ids) :]


class ScriptedDevice:
    """Computes steps of one partition on pages that hold, at each place, a position and its token.

    What a row draws follows from the tokens that it reads through its pages, so that a lost or a
    wrong page shows in the answer, or at once.

    Args:
        limits: those of the engine.
        script: says where steps fail; None for nowhere.
    """

    num_partitions = 1

    def __init__(self, limits: Limits, script: Script | None = None) -> None:
        self.limits = limits
        self.script = script or (lambda number, plans: None)
        self.num_steps = 0
        self.num_resets = 0
        self.num_guesses = 0  # that it was given to check
        self.num_right = 0  # of these
        self.plans: list[StepPlan] = []  # of all launched steps
        self.masks: list[Masks | None] = []  # of the same
        self.can_answer = threading.Event()  # cleared, `drawn` waits
        self.can_answer.set()
        self._pages: list[list[tuple[int, int] | None]] = []
        self._is_intact = True
        self._drawn: list[int | None] = []  # by the last step
        self._new_pages()

    def launch(self, plans: Sequence[StepPlan]) -> "ScriptedStep":
        return self._draw(self.walk(plans), None)

    def walk(self, plans: Sequence[StepPlan]) -> "ScriptedWalk":
        (plan,) = plans
        number, self.num_steps = self.num_steps, self.num_steps + 1
        place = self.script(number, plans)
        if place == "before":
            raise DeviceFault(f"step {number}, before its launch")
        assert plan.num_tokens <= self.limits.max_step_tokens
        for source, destination in plan.copies:
            self._pages[destination] = list(self._pages[source])
        for chunk in plan.chunks:
            self._write(chunk)
        if place == "after":
            self._lose_pages()
            raise DeviceFault(f"step {number}, after its launch")
        read = [self._read(chunk) if chunk.samples else None for chunk in plan.chunks]
        self.num_guesses += sum(chunk.guesses for chunk in plan.chunks)
        return ScriptedWalk(plan, read, number, fails=place)

    def draw(self, walked: "ScriptedWalk", masks: Masks) -> "ScriptedStep":
        return self._draw(walked, masks)

    def is_intact(self) -> bool:
        return self._is_intact

    def reset(self) -> None:
        self.num_resets += 1
        self._new_pages()

    def _draw(self, walked: "ScriptedWalk", masks: Masks | None) -> "ScriptedStep":
        drawn: list[RowDraws] = []
        for i, (chunk, tokens) in enumerate(zip(walked.plan.chunks, walked.read, strict=True)):
            rows = None if masks is None else masks.allowed[0]
            allowed = None if rows is None else ids_of(rows[i])
            if tokens is None:
                drawn.append(None)
            elif chunk.guesses:
                drawn.append(self._check(tokens, chunk))
            else:
                drawn.append(Drawn(token_id=next_token(tokens, chunk.seed, allowed)))
        # A row with guesses has no successor in the next step.
        self._drawn = [row.token_id if isinstance(row, Drawn) else None for row in drawn]
        self.plans.append(walked.plan)
        self.masks.append(masks)
        if walked.fails == "drawn":
            self._lose_pages()
        return ScriptedStep(self, drawn, walked)

    def _check(self, tokens: list[int], chunk: Chunk) -> list[Drawn]:
        """Draws after each of the guesses, up to and with the first that differs."""
        drawn: list[Drawn] = []
        for end in range(len(tokens) - chunk.guesses, len(tokens) + 1):
            drawn.append(Drawn(token_id=next_token(tokens[:end], chunk.seed)))
            if end == len(tokens) or drawn[-1].token_id != tokens[end]:
                break
            self.num_right += 1
        return drawn

    def _new_pages(self) -> None:
        size = self.limits.page_size
        self._pages = [[None] * size for _ in range(self.limits.num_pages)]
        self._is_intact = True

    def _lose_pages(self) -> None:
        self._new_pages()
        self._is_intact = False

    def _write(self, chunk: Chunk) -> None:
        tokens = chunk.token_ids
        if chunk.follows is not None:
            followed = self._drawn[chunk.follows]
            assert followed is not None
            tokens = (followed,)
        for position, token in enumerate(tokens, start=chunk.start):
            page, place = divmod(position, self.limits.page_size)
            self._pages[chunk.pages[page]][place] = (position, token)

    def _read(self, chunk: Chunk) -> list[int]:
        tokens = []
        for position in range(chunk.end):
            page, place = divmod(position, self.limits.page_size)
            entry = self._pages[chunk.pages[page]][place]
            # After a fault that is not read yet, everything is lost.
            if entry is None and not self._is_intact:
                entry = (position, 0)
            assert entry is not None and entry[0] == position, (chunk, position, entry)
            tokens.append(entry[1])
        return tokens


@dataclass
class ScriptedWalk:
    """A step that has written its pages, and draws nothing yet."""

    plan: StepPlan
    read: list[list[int] | None]
    number: int
    fails: Place | None


@dataclass
class ScriptedStep:
    """A launched step."""

    device: ScriptedDevice
    rows: list[RowDraws]
    walked: ScriptedWalk

    def drawn(self) -> list[list[RowDraws]]:
        assert self.device.can_answer.wait(10)
        if self.walked.fails:
            raise DeviceFault(f"step {self.walked.number}, when it was read")
        return [self.rows]
