"""The sampling parameters that hold where a request leaves them out, as the operator chose them.

    --generation-config auto     what generation_config.json of the checkpoint names
    --generation-config vllm     nothing: the server's own defaults
    --generation-config FOLDER   what generation_config.json of that folder names

`--override-generation-config` replaces single values of them. Names and meanings are vLLM's.
"""

import json
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint.pretrained import Pretrained
from mixtral_jax.checkpoint.sampling_defaults import (
    SAMPLING_NAMES,
    checked_defaults,
    read_sampling_defaults,
)
from mixtral_jax.errors import ConfigError
from mixtral_jax.sampling_params import SamplingFields
from mixtral_jax.tokenization.special_tokens import GENERATION_CONFIG

AUTO, NONE = "auto", "vllm"
_OVERRIDE = "--override-generation-config"


def chosen_defaults(pretrained: Pretrained, choice: str, override: str | None) -> SamplingFields:
    """Returns the sampling defaults of a served model.

    Args:
        pretrained: The model.
        choice: "auto", "vllm", or a folder with a generation_config.json.
        override: A JSON object whose values replace single ones, null for a value that the server
            chooses itself; None: none.

    Raises ConfigError, which names the flag, for a folder without that file, an override that is no
    JSON object or has another key, and values out of range.
    """
    defaults: SamplingFields = {}
    if choice == AUTO:
        defaults = pretrained.sampling_defaults
    elif choice != NONE:
        if not (Path(choice) / GENERATION_CONFIG).is_file():
            raise ConfigError(
                f"--generation-config: {choice} has no {GENERATION_CONFIG}; give a folder that "
                f"has one, or {AUTO} or {NONE}"
            )
        defaults = read_sampling_defaults(Path(choice))
    if override is None:
        return defaults
    content = _overriding(override)
    kept: Any = {name: value for name, value in defaults.items() if name not in content}
    return {**kept, **checked_defaults(content, _OVERRIDE)}


def _overriding(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{_OVERRIDE} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f'{_OVERRIDE} is no object; give one such as {{"temperature": 0.2}}')
    for name in content:
        if name not in SAMPLING_NAMES:
            raise ConfigError(
                f"{_OVERRIDE} has {name[:40]!r}; it takes {', '.join(SAMPLING_NAMES)}"
            )
    return content
