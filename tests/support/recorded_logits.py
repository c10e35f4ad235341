"""Logits of transformers' models, recorded so that Pythons without torch are held to them too.

    python -m tests.support.recorded_logits      # records them anew; needs torch

The weights come from NumPy's generator, whose stream does not change between versions; the file has
their names and shapes, and the logits of each model of `parity.MODELS` for the same tokens.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import parity

FILE = Path(__file__).parent.parent / "golden" / "transformers_logits.npz"
TOKENS = np.random.default_rng(7).integers(0, parity.SHAPE["vocab_size"], (2, 24), np.int32)


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Draws float32 weights by name: norms around 1, matrices wide enough for logits beyond 1."""
    generator = np.random.default_rng(11)
    return {
        name: (
            generator.uniform(0.5, 1.5, shapes[name])
            if "norm" in name
            else generator.normal(0, 0.2, shapes[name])
        ).astype(np.float32)
        for name in sorted(shapes)
    }


def recorded(kind: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Reads the weights of a model, and its logits [B T V] for TOKENS."""
    with np.load(FILE) as file:
        return weights(json.loads(str(file[f"{kind}.shapes"]))), file[f"{kind}.logits"]


def computed(kind: str) -> tuple[dict[str, list[int]], np.ndarray]:
    """Asks transformers for the shapes of a model's weights, and for its logits with `weights`."""
    import torch

    model: Any = parity.huggingface(kind)
    tied = model.config.tie_word_embeddings
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    shapes = {name: list(value.shape) for name, value in state.items()}
    drawn = {name: torch.from_numpy(value) for name, value in weights(shapes).items()}
    missing, unexpected = model.load_state_dict(drawn, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    with torch.no_grad():
        return shapes, model(torch.from_numpy(TOKENS).long()).logits.numpy()


def record() -> None:
    """Writes FILE."""
    arrays: dict[str, Any] = {}
    for kind in parity.MODELS:
        shapes, arrays[f"{kind}.logits"] = computed(kind)
        arrays[f"{kind}.shapes"] = np.array(json.dumps(shapes))
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    record()
