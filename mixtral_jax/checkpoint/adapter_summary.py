"""An adapter's folder in figures, for whom no base is needed."""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint.adapter import WEIGHTS_FILE
from mixtral_jax.checkpoint.peft_config import CONFIG_FILE, PeftConfig
from mixtral_jax.checkpoint.peft_names import B
from mixtral_jax.checkpoint.tensor_file import TensorFile


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """The figures of an adapter.

    Args:
        base: the name of the model that it was trained on.
        targets: the modules and parameters that its settings name.
        rank: that of its settings; single modules may have others, as `ranks` says.
        alpha: likewise.
        rank_stabilized: the scaling is alpha / sqrt(rank), not alpha / rank.
        own_ranks: the patterns of modules that have a rank of their own, with it.
        dtype: that in which most of its values are stored, in safetensors' words.
        parameters: the number of its values.
        bytes: of the file of its weights.
        layers: the number of layers for which it has matrices.
        layers_changed: the number of them in which some B is not zero.
    """

    base: str
    targets: tuple[str, ...]
    rank: int
    alpha: float
    rank_stabilized: bool
    own_ranks: dict[str, int]
    dtype: str
    parameters: int
    bytes: int
    layers: int
    layers_changed: int

    def facts(self) -> dict[str, Any]:
        """The figures by name, as JSON can hold them."""
        return asdict(self) | {"targets": ", ".join(self.targets)}


def is_adapter(folder: Path) -> bool:
    """Says whether a folder has the settings of an adapter."""
    return (folder / CONFIG_FILE).is_file()


def summarize(folder: Path) -> AdapterSummary:
    """Reads the figures of an adapter's folder.

    Raises AdapterError for settings that are not supported, and for a damaged file. Names and
    shapes are not checked: that takes the base, see `read_adapter`.
    """
    settings = PeftConfig.read(folder)
    path = folder / WEIGHTS_FILE
    sizes: dict[str, int] = {}
    layers, changed = set(), set()
    with TensorFile(path) as file:
        for name, shape in file.shapes.items():
            dtype = file.dtypes[name]
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
            if layer := re.search(r"\.layers\.(\d+)\.", name):
                layers.add(layer[1])
                if name.endswith(B) and layer[1] not in changed and file.read(name).any():
                    changed.add(layer[1])
    modules = settings.target_modules
    return AdapterSummary(
        base=settings.base,
        targets=(
            *((modules,) if isinstance(modules, str) else modules),
            *settings.target_parameters,
        ),
        rank=settings.rank,
        alpha=settings.alpha,
        rank_stabilized=settings.rank_stabilized,
        own_ranks=dict(settings.rank_pattern),
        dtype=max(sizes, key=lambda dtype: sizes[dtype], default="none"),
        parameters=sum(sizes.values()),
        bytes=path.stat().st_size,
        layers=len(layers),
        layers_changed=len(changed),
    )
