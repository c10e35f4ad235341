"""Mistral and Mixtral as a JAX library.

    import mixtral_jax
    model, tokenizer = mixtral_jax.load("checkpoints/smollm2-135m-instruct")
    logits = model(tokens)                                        # [B T] -> [B T V]
    for text in mixtral_jax.generate(model, tokenizer, "Once upon a time", max_tokens=20):
        print(text, end="")

`mixtral-jax convert SRC DST` makes a checkpoint folder. Names are imported when they are first
asked for: jax takes seconds, `mixtral-jax --help` should not.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral_jax.checkpoint.pretrained import load as load
    from mixtral_jax.checkpoint.pretrained import load_adapter as load_adapter
    from mixtral_jax.checkpoint.pretrained import save as save
    from mixtral_jax.checkpoint.pretrained import save_adapter as save_adapter
    from mixtral_jax.config import ModelConfig as ModelConfig
    from mixtral_jax.devices import show_devices as show_devices
    from mixtral_jax.errors import AdapterError as AdapterError
    from mixtral_jax.errors import ChatError as ChatError
    from mixtral_jax.errors import ConfigError as ConfigError
    from mixtral_jax.errors import SamplingError as SamplingError
    from mixtral_jax.errors import TokenizerError as TokenizerError
    from mixtral_jax.errors import TopologyError as TopologyError
    from mixtral_jax.errors import UserError as UserError
    from mixtral_jax.generation import Draw as Draw
    from mixtral_jax.generation import generate as generate
    from mixtral_jax.generation import generate_draws as generate_draws
    from mixtral_jax.generation import generate_tokens as generate_tokens
    from mixtral_jax.model.adapter import Adapter as Adapter
    from mixtral_jax.model.inside import Inside as Inside
    from mixtral_jax.model.merged import merge as merge
    from mixtral_jax.model.transformer import Transformer as Transformer
    from mixtral_jax.placement import Placement as Placement
    from mixtral_jax.sampling_params import SamplingParams as SamplingParams
    from mixtral_jax.scoring import Score as Score
    from mixtral_jax.scoring import score as score
    from mixtral_jax.sharding import ShardingRules as ShardingRules
    from mixtral_jax.sharding import make_mesh as make_mesh
    from mixtral_jax.tokenization.messages import Message as Message
    from mixtral_jax.tokenization.tokenizer import Tokenizer as Tokenizer

    __version__: str

# Public name -> the module that it stands in.
_HOMES = {
    "Adapter": "model.adapter",
    "AdapterError": "errors",
    "ChatError": "errors",
    "ConfigError": "errors",
    "Draw": "generation",
    "Inside": "model.inside",
    "Message": "tokenization.messages",
    "ModelConfig": "config",
    "Placement": "placement",
    "SamplingError": "errors",
    "SamplingParams": "sampling_params",
    "Score": "scoring",
    "ShardingRules": "sharding",
    "Tokenizer": "tokenization.tokenizer",
    "TokenizerError": "errors",
    "TopologyError": "errors",
    "Transformer": "model.transformer",
    "UserError": "errors",
    "generate": "generation",
    "generate_draws": "generation",
    "generate_tokens": "generation",
    "load": "checkpoint.pretrained",
    "load_adapter": "checkpoint.pretrained",
    "make_mesh": "sharding",
    "show_devices": "devices",
    "merge": "model.merged",
    "save": "checkpoint.pretrained",
    "save_adapter": "checkpoint.pretrained",
    "score": "scoring",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name == "__version__":
        return importlib.metadata.version("mixtral-jax")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
