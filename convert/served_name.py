"""The name under which a model is served, where its files do not say it.

Clients of Azure's catalogue know the models by names of their own; these are the ones that
`/info` and `model` in answers carry there.
"""

import re
from pathlib import Path

_MISTRAL = "MistralAI"

# Hugging Face's name, in lower case, and Azure's name for the model.
_SERVED = {
    "mistral-7b-v0.1": "mistralai-Mistral-7B-v01",
    "mistral-7b-instruct-v0.1": "mistralai-Mistral-7B-Instruct-v01",
    "mistral-7b-instruct-v0.2": "mistralai-Mistral-7B-Instruct-v02",
    "mixtral-8x7b-v0.1": "mistralai-Mixtral-8x7B-v01",
    "mixtral-8x7b-instruct-v0.1": "mistralai-Mixtral-8x7B-Instruct-v01",
    "mixtral-8x22b-instruct-v0.1": "mistralai-Mixtral-8x22B-Instruct-v0-1",
}
# How names of models from other makers begin.
_PROVIDERS = {"smollm2": "HuggingFaceTB"}

# Endings that the makers of GGUF files append: model.Q4_K_M.gguf, model-f16.gguf.
_QUANTISATION = re.compile(r"[.-](i?q\d\w*|f16|bf16|f32)$", re.IGNORECASE)


def served_as(source: Path) -> tuple[str, str]:
    """Returns name and provider for a source; the provider is "unknown" where nothing tells it.

    The name is the folder's or the file's, without endings that tell a file's format. In Hugging
    Face's cache, .../models--ORG--NAME/snapshots/HASH, it is NAME.
    """
    source = source.absolute()
    own = source.name if source.is_dir() else source.stem
    for component in source.parts:
        if component.startswith("models--"):
            own = component.rsplit("--", 1)[1]
    if source.is_file() and own.lower() in ("model", "consolidated"):
        own = source.parent.name
    own = _QUANTISATION.sub("", own)
    known = _SERVED.get(own.lower())
    if known is not None:
        return known, _MISTRAL
    for start, provider in _PROVIDERS.items():
        if own.lower().startswith(start):
            return own, provider
    return own, "unknown"
