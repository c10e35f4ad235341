"""Parameters by which tokens are drawn: one record for the library, the engine and other hosts.

`SamplingParams` checks itself where it is made, so nobody who gets one checks it again. The steps
in which the parameters act, and their order, stand in `mixtral_jax/step/sampling.py`.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TypedDict

from mixtral_jax.errors import SamplingError

MAX_TOP_LOGPROBS = 20  # OpenAI's limit, and the number that a step computes
MAX_LOGIT_BIAS = 300  # entries of logit_bias; OpenAI's limit
# Biased token ids of one sequence in a step: those of logit_bias, and before min_tokens also the
# ids that would end the answer.
MAX_BIASES = 320
_MASK = 0x7FFFFFFF
_MAX_BIAS = 100.0

# Smallest and largest value by name: of numbers, then of whole numbers.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
}
_WHOLE_RANGES: dict[str, tuple[int, int]] = {
    "top_k": (0, 2**31 - 1),
    "top_logprobs": (0, MAX_TOP_LOGPROBS),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters by which the tokens of one answer are drawn; the defaults change nothing.

    Names and meanings are those of OpenAI and vLLM. Numbers of numpy are taken as well, and whole
    numbers of jax; they become Python's own.

    Raises:
        SamplingError: A value has the wrong type or is out of range. The message names the
            parameter, its value and what it must be.
    """

    temperature: float = 0.7  # within 0 and 2; 0 takes the likeliest token
    top_p: float = 1.0  # within 0 and 1: the likeliest tokens that together have this probability
    top_k: int = 0  # number of likeliest tokens that are kept; 0 keeps all
    min_p: float = 0.0  # within 0 and 1: least probability, as a part of the likeliest token's
    presence_penalty: float = 0.0  # within -2 and 2: subtracted once for a token that was generated
    frequency_penalty: float = 0.0  # within -2 and 2: subtracted for each time it was generated
    repetition_penalty: float = 1.0  # within 0.01 and 100; of prompt and answer (arXiv:1909.05858)
    # Token id -> number within -100 and 100 that is added to its logit; at most 300 entries.
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    # The same seed gives the same answer; its lower 31 bits count. Choice i of a request draws with
    # seed + i. None: another one for each answer.
    seed: int | None = None
    # None: no logprobs. 0: the drawn token's. Up to 20: also those of as many likeliest tokens.
    # They are of the model's own distribution, before everything above.
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if type(value) is not float:
                value = _number(name, value, low, high)
            # Rounded, because 0.01 as a float32 of the wire is a little less than 0.01. NaN fails.
            if not low <= round(value, 6) <= high:
                raise SamplingError(f"{name} is {value:g}; it must be within {low:g} and {high:g}")
            object.__setattr__(self, name, value)
        for name, (least, largest) in _WHOLE_RANGES.items():
            value = getattr(self, name)
            if value is None and name == "top_logprobs":
                continue
            value = whole_number(name, value)
            if not least <= value <= largest:
                raise SamplingError(f"{name} is {value}; it must be within {least} and {largest}")
            object.__setattr__(self, name, value)
        if self.seed is not None:
            object.__setattr__(self, "seed", whole_number("seed", self.seed) & _MASK)
        if self.logit_bias != {} or type(self.logit_bias) is not dict:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def has_penalties(self) -> bool:
        """True if the next token depends on which tokens came before, not only on the logits."""
        added = self.presence_penalty or self.frequency_penalty
        return bool(added) or self.repetition_penalty != 1

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises SamplingError if `logit_bias` names a token that the model does not have."""
        largest = max(self.logit_bias, default=0)
        if largest >= vocab_size:
            raise SamplingError(f"logit_bias holds {largest}; ids are below {vocab_size}")


class SamplingFields(TypedDict, total=False):
    """Fields of `SamplingParams`, for functions that take them as keywords."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    top_logprobs: int | None


def whole_number(name: str, value: object) -> int:
    """Returns the value as an int; raises SamplingError if it is no whole number, such as True."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise SamplingError(f"{name} is {value!r}; give a whole number") from None


def _number(name: str, value: object, low: float, high: float) -> float:
    """Returns the value as a float; raises SamplingError if it is no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SamplingError(f"{name} is {value!r}; give a number within {low:g} and {high:g}")
    try:
        return float(value)
    except OverflowError:  # a whole number that no float holds
        return math.inf


def _checked_bias(biases: object) -> dict[int, float]:
    """Returns a copy of `logit_bias`, in order of the ids."""
    if not isinstance(biases, Mapping):
        raise SamplingError(f"logit_bias is {biases!r}; give a mapping of token ids to numbers")
    if len(biases) > MAX_LOGIT_BIAS:
        raise SamplingError(f"logit_bias has {len(biases)} entries; give at most {MAX_LOGIT_BIAS}")
    copy = {}
    for key, value in biases.items():
        token = whole_number("a token id of logit_bias", key)
        if token < 0:
            raise SamplingError(f"logit_bias holds {token}; ids are 0 or more")
        name = f"logit_bias of {token}"
        number = _number(name, value, -_MAX_BIAS, _MAX_BIAS)
        if not abs(number) <= _MAX_BIAS:
            raise SamplingError(
                f"{name} is {number:g}; it must be within -{_MAX_BIAS:g} and {_MAX_BIAS:g}"
            )
        copy[token] = number
    return dict(sorted(copy.items()))
