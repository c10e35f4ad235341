"""The time that a form of the kernels takes for a piece of work."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax

_SECONDS = 0.25  # that one measurement repeats for, at least
_LEAST_REPEATS = 3


@dataclass(frozen=True)
class Measurement:
    """The time of a piece of work, and what bounds it."""

    work: str  # a line of the table, such as "int8 [1536, 576]"
    size: str  # a column of it, such as "8"
    seconds: float
    bytes_read: float
    multiply_adds: float
    kind: str  # of the multiplications: int8, float32 or bfloat16

    def line(self) -> str:
        """The measurement as one line of JSON."""
        return json.dumps(asdict(self))


def shortest_seconds(run: Callable[[], Any]) -> float:
    """The shortest of several times that a jitted call takes, after one that is not counted."""
    jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < _LEAST_REPEATS or sum(times) < _SECONDS:
        begun = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begun)
    return min(times)
