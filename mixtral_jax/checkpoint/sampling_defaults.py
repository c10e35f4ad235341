"""Sampling defaults of a model: what its makers' `generation_config.json` names.

    read_sampling_defaults   a folder -> the fields of SamplingParams that the file gives
    checked_defaults         the same of an object that was read already

The file stands beside the tokenizer, where `convert` has copied it from the source, and where an
operator may change it. Of its keys those are read that vLLM reads too: temperature, top_p, top_k,
min_p and repetition_penalty. `do_sample` is none of them: most files lack it, and transformers then
takes the likeliest token, whatever temperature stands beside it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.errors import ConfigError, SamplingError, TokenizerError
from mixtral_jax.sampling_params import SamplingFields, SamplingParams
from mixtral_jax.tokenization.special_tokens import GENERATION_CONFIG, read_object

SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Keys of generation_config.json that are read, which are fields of SamplingParams."""


def read_sampling_defaults(folder: Path) -> SamplingFields:
    """Returns the sampling defaults that a folder's generation_config.json names.

    They are empty where there is no such file, or it names none. Raises ConfigError for a file that
    is no JSON object, and for values that `SamplingParams` refuses.
    """
    file = folder / GENERATION_CONFIG
    try:
        content = read_object(file)
    except TokenizerError as error:
        raise ConfigError(str(error)) from None
    return checked_defaults(content, str(file))


def checked_defaults(content: Mapping[str, Any], place: str) -> SamplingFields:
    """Returns the sampling defaults among the keys of an object; null stands for an absent one.

    Args:
        content: the object, whose other keys are not looked at.
        place: where it stands, for the error.

    Raises ConfigError for a value that `SamplingParams` refuses.
    """
    named: dict[str, Any] = {}
    for name in SAMPLING_NAMES:
        value = content.get(name)
        if value is None:
            continue
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole and (name == "top_k" or not isinstance(value, float)):
            kind = "whole number" if name == "top_k" else "number"
            raise ConfigError(f"{place}: {name} is {value!r}; give a {kind}")
        named[name] = max(0, value) if name == "top_k" else _as_float(value)  # -1 is vLLM's "all"
    checked: Any = named
    fields: SamplingFields = checked
    try:
        SamplingParams(**fields)
    except SamplingError as error:
        raise ConfigError(f"{place}: {error}; correct it") from None
    return fields


def _as_float(value: int | float) -> float:
    """Returns the number, infinite if it is beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
