"""Adapters on disk, in PEFT's form: adapter_config.json and adapter_model.safetensors.

Experts are read one by one or fused, and written one by one, which PEFT, vLLM and SGLang all read
(`peft_names`). Nothing of an adapter is ignored: a tensor without a place, and a place without a
tensor, is an error that names it. PEFT itself is not needed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mixtral_jax.checkpoint.folder import finished_at
from mixtral_jax.checkpoint.peft_arrays import (
    Pair,
    is_of_experts,
    joined,
    matrices,
    split,
    swapped_zeros,
    zeros,
)
from mixtral_jax.checkpoint.peft_config import CONFIG_FILE, PeftConfig
from mixtral_jax.checkpoint.peft_names import PREFIX, A, B, Place, module_name, places
from mixtral_jax.checkpoint.peft_names import reason_against as reason
from mixtral_jax.checkpoint.store import local_copy
from mixtral_jax.checkpoint.tensor_file import TensorFile
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import AdapterError
from mixtral_jax.model.adapter import (
    TARGETS,
    Adapter,
    AdapterConfig,
    BlockAdapter,
)

WEIGHTS_FILE = "adapter_model.safetensors"
# The names of these modules in PEFT's settings.
_MODULES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "router": "gate"}
_DENSE_MODULES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_EXPERT_MODULES = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it was read, in the memory of the host.

    Args:
        settings: targets, and the rank and alpha of its settings. Where a matrix has a scaling of
            its own, the ratio is multiplied into its B, so that `settings.scaling` is right for
            all; ranks are those of the arrays.
        adapter: numpy arrays in float32; a target that a layer lacks is None there.
        digest: SHA-256 of all that changes an answer, in hexadecimal: equal adapters have the same
            one wherever they come from.
        base: the name of the base that it was trained on, as whoever made it wrote it.
    """

    settings: AdapterConfig
    adapter: Adapter
    digest: str
    base: str

    @cached_property
    def rank(self) -> int:
        """The largest rank of its matrices."""
        return max(low.b.shape[-1] for _, _, low in self.adapter.pairs())

    @cached_property
    def num_parameters(self) -> int:
        """The number of values in its matrices."""
        return sum(low.a.size + low.b.size for _, _, low in self.adapter.pairs())

    @cached_property
    def num_layers_changed(self) -> int:
        """The number of layers in which some B is not zero."""
        return len({layer for layer, _, low in self.adapter.pairs() if np.any(np.asarray(low.b))})


def read_adapter(
    folder: Path | str, config: ModelConfig, *, max_rank: int | None = None
) -> StoredAdapter:
    """Reads a folder that PEFT's save_pretrained or `write_adapter` made.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors; of this machine, or the
            URL of one in an object store.
        config: the base that it shall run on.
        max_rank: no matrix may have a larger rank.

    Raises AdapterError for what is damaged, not supported (DoRA, biases, whole modules beside the
    adapter), not finite, or does not fit the base. Shapes are checked before anything is read.
    """
    with local_copy(folder, (CONFIG_FILE, WEIGHTS_FILE).__contains__, AdapterError) as local:
        return _read_folder(local, config, max_rank)


def _read_folder(folder: Path, config: ModelConfig, max_rank: int | None) -> StoredAdapter:
    settings = PeftConfig.read(folder)
    path = folder / WEIGHTS_FILE
    base = f"the base {settings.base!r}" if settings.base else "the base"
    with TensorFile(path) as file:
        shapes = file.shapes
        wanted = places(config, settings, shapes.keys())
        _check_names(path, config, settings, wanted, shapes)
        for place in wanted:
            _check_shapes(path, settings, place, shapes, base, max_rank)
        targets = tuple({target for place in wanted for target in place.targets})
        ours = settings.settings(targets)
        layers: list[BlockAdapter] = []
        for layer in range(config.num_layers):
            read: dict[str, list[Pair]] = {}
            for place in (place for place in wanted if place.layer == layer):
                ratio = settings.scaling_of(place.asked) / ours.scaling
                pair = _read(file, place, ratio, ours.scaling)
                for target, half in zip(place.targets, split(pair, place), strict=True):
                    _check_rank(path, place, half[1].shape[-1], max_rank)
                    read.setdefault(target, []).append(half)
            made = {t: joined(config, t, pairs) for t, pairs in read.items()}
            layers.append(BlockAdapter(**made))
    adapter = Adapter(tuple(layers))
    return StoredAdapter(ours, adapter, _digest(ours, adapter), settings.base)


def write_adapter(folder: Path | str, adapter: Adapter, settings: AdapterConfig, base: str) -> None:
    """Writes an adapter for PEFT, vLLM and SGLang: float32, and experts one by one.

    All matrices are written with one rank, all layers with the same targets, and gate and up of
    experts only with down, for the readers ask for it; what is added for that is zero. rsLoRA
    of experts is written as plain LoRA with the alpha that gives the same scaling.

    Args:
        folder: one that does not exist or is empty.
        adapter: its arrays, not folded: B without the scaling.
        settings: the scaling's.
        base: the name under which others find the base, such as mistralai/Mixtral-8x7B-v0.1.

    Raises AdapterError for values that are not finite and for an adapter without matrices, and
    what `finished_at` raises for the folder.
    """
    stored = list(adapter.pairs())
    if not stored:
        raise AdapterError("the adapter has no matrices; choose targets for it")
    for layer, target, low in stored:
        if not all(np.isfinite(np.asarray(array)).all() for array in low):
            raise AdapterError(
                f"layer {layer}, {target}: the adapter has values that are not finite; go back to "
                "an earlier step of its training"
            )
    rank = max(low.b.shape[-1] for _, _, low in stored)
    is_moe = any(is_of_experts(target, low) for _, target, low in stored)
    samples = {target: low for _, target, low in stored}
    is_moe |= "router" in samples
    if is_moe and ("gate" in samples or "up" in samples):
        # PEFT fuses the two, refuses one alone, and looks for both where down has an adapter too.
        some = samples["gate" if "gate" in samples else "up"]
        absent = {"gate": zeros(some), "up": zeros(some), "down": swapped_zeros(some)}
        samples = absent | samples
    samples = {target: samples[target] for target in TARGETS if target in samples}
    tensors: dict[str, np.ndarray] = {}
    for layer, block in enumerate(adapter.layers):
        for target, sample in samples.items():
            low = getattr(block, target) or zeros(sample)
            for expert, (a, b) in enumerate(matrices(target, low, rank)):
                module = f"{PREFIX}{module_name(layer, target, is_moe, expert)}"
                tensors[module + A], tensors[module + B] = a, b
    content = _settings(settings, rank, list(samples), is_moe, base)
    with finished_at(folder) as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(content, indent=2) + "\n"
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")


def _settings(
    settings: AdapterConfig, rank: int, targets: list[str], is_moe: bool, base: str
) -> dict[str, Any]:
    """The content of PEFT's adapter_config.json for an adapter of one rank."""
    modules = _MODULES | (_EXPERT_MODULES if is_moe else _DENSE_MODULES)
    # PEFT 0.21 reads gate and up of experts with twice the rank and twice the alpha, which is the
    # same scaling only where alpha is divided by the rank itself.
    is_stabilized = settings.rank_stabilized and not (is_moe and "gate" in targets)
    alpha = settings.scaling * (rank**0.5 if is_stabilized else rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha,
        "use_rslora": is_stabilized,
        "target_modules": [modules[target] for target in targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "lora_bias": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _check_names(
    path: Path,
    config: ModelConfig,
    settings: PeftConfig,
    wanted: list[Place],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises AdapterError for tensors without a place, and places without tensors."""
    expected = {name for place in wanted for name in (place.a, place.b)}
    unused = [name for name in shapes if name not in expected]
    if unused:
        raise AdapterError(
            f"{path}: {unused[0]} has no place in the model: {reason(unused[0], config, settings)} "
            f"({len(unused)} of {len(shapes)} tensors would not be used)"
        )
    missing = [name for name in sorted(expected) if name not in shapes]
    if missing or not expected:
        asked = missing[0] if missing else "every tensor"
        raise AdapterError(
            f"{path} lacks {asked}, which {CONFIG_FILE} asks for ({len(missing)} of "
            f"{len(expected)} tensors are missing); save the adapter again"
        )


def _check_shapes(
    path: Path,
    settings: PeftConfig,
    place: Place,
    shapes: Mapping[str, tuple[int, ...]],
    base: str,
    max_rank: int | None,
) -> None:
    rank = settings.rank_of(place.asked)
    # Gate and up may be two adapters put together, of twice the rank.
    _check_rank(path, place, rank, None if max_rank is None else max_rank * len(place.targets))
    for name, want in zip((place.a, place.b), place.shapes(rank), strict=True):
        if shapes[name] != want:
            raise AdapterError(
                f"{path}: {name} has the shape {list(shapes[name])}, but rank {rank} and this "
                f"model ask for {list(want)}; it was made for {base}"
            )


def _check_rank(path: Path, place: Place, rank: int, max_rank: int | None) -> None:
    if max_rank is not None and rank > max_rank:
        raise AdapterError(
            f"{path}: {place.a} has the rank {rank}; at most {max_rank} is allowed here"
        )


def _read(file: TensorFile, place: Place, ratio: float, scaling: float) -> Pair:
    """Reads a place's two tensors in float32, B times a ratio.

    Raises AdapterError where A, B or B times the scaling is not finite.
    """
    a, b = (file.read(name) for name in (place.a, place.b))
    with np.errstate(over="ignore", invalid="ignore"):  # found below
        if ratio != 1.0:
            b = b * np.float32(ratio)
        scaled = b * np.float32(scaling)
    for name, array in ((place.a, a), (place.b, b), (place.b, scaled)):
        if not np.isfinite(array).all():
            raise AdapterError(
                f"{file.path}: {name} has values that are not finite (NaN or infinity); save the "
                "adapter of an earlier step of its training"
            )
    return a, b


def _digest(settings: AdapterConfig, adapter: Adapter) -> str:
    total = hashlib.sha256()
    for layer, target, low in adapter.pairs():
        a, b = (np.asarray(array) for array in low)
        head = (layer, target, a.shape, b.shape, settings.scaling)
        total.update(repr(head).encode())
        total.update(np.ascontiguousarray(a).data)
        total.update(np.ascontiguousarray(b).data)
    return total.hexdigest()
