"""Adapters with random values in all their matrices, and PEFT's files of them written by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import Adapter, AdapterConfig, LowRank

Tensors = dict[str, np.ndarray]
LAYER = "base_model.model.model.layers.{}."
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
ALL = ("q", "k", "v", "o", "router", "gate", "up", "down")


def random_adapter(
    config: ModelConfig, settings: AdapterConfig, *, seed: int = 0, size: float = 0.1
) -> Adapter:
    """An adapter of numpy arrays, none of which is zero or symmetric."""
    drawn = np.random.default_rng(seed)

    def fill(low: LowRank) -> LowRank:
        arrays = (size * drawn.standard_normal(array.shape) for array in low)
        return LowRank(*(array.astype(np.float32) for array in arrays))

    layers = Adapter.random(config, settings, None).layers
    return Adapter(
        tuple(
            type(block)(*(None if low is None else fill(low) for low in block)) for block in layers
        )
    )


def fused(config: ModelConfig, adapter: Adapter) -> Tensors:
    """PEFT's tensors of experts and router in transformers 5's form.

    Gate and up get the two ranks one after the other: A of the gate first, B block-diagonal.
    """
    tensors = {}
    for i, block in enumerate(adapter.layers):
        mlp = LAYER.format(i) + "mlp."
        gate, up, down = block.gate, block.up, block.down
        zeros = np.zeros_like(gate.b)
        a = np.concatenate([gate.a, up.a], axis=1)
        b = np.concatenate(
            [np.concatenate([gate.b, zeros], axis=2), np.concatenate([zeros, up.b], axis=2)],
            axis=1,
        )
        tensors |= flat(f"{mlp}experts.base_layer", a, b)
        tensors |= flat(f"{mlp}experts", down.a, down.b)
        tensors[f"{mlp}gate.lora_A.weight"] = block.router.a
        tensors[f"{mlp}gate.lora_B.weight"] = block.router.b
    return tensors


def flat(module: str, a: np.ndarray, b: np.ndarray) -> Tensors:
    """PEFT's two tensors of A [E U I] and B [E O U], element by element."""
    experts, rank, inputs = a.shape
    flat_a = np.zeros((experts * rank, inputs), np.float32)
    flat_b = np.zeros((b.shape[1], rank * experts), np.float32)
    for e in range(experts):
        for u in range(rank):
            flat_a[e * rank + u] = a[e, u]
            flat_b[:, u * experts + e] = b[e, :, u]
    return {f"{module}.lora_A.weight": flat_a, f"{module}.lora_B.weight": flat_b}


def write(folder: Path, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Path:
    """Writes the two files of an adapter; `settings` are beside rank, alpha and kind."""
    folder.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / WEIGHTS)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 4,
        "lora_alpha": 6,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / SETTINGS).write_text(json.dumps(content | dict(settings)), encoding="utf-8")
    return folder


def read_tensors(folder: Path) -> Tensors:
    """The tensors of an adapter's folder by their names."""
    return load_file(folder / WEIGHTS)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an adapter's folder."""
    return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
