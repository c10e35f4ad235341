"""`python -m benchmarks.rounding CHECKPOINT TEXT`: the perplexity of a model in int8 and int4.

The weights of a checkpoint that was made from a 4-bit file lie on a grid already, and rounding them
to another of as many steps says little. So the residual stream is turned by a fixed random rotation
first: norms' weights go into the products behind them, and each product turns its inputs or its
outputs. The model computes the same function, and its weights are spread evenly.

CHECKPOINT is a dense one of float32 with its tokenizer. TEXT is a file, of which eight windows of
512 tokens are used. With `--kept`, a checkpoint of the same model whose weights were kept as a file
of four bits has them is measured too, in its own basis.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from convert.pieces import ParameterPiece
from convert.quantize import int4, int8
from convert.quantize.calibration import calibration_text
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.parameters import parameter_shapes
from mixtral_jax.checkpoint.restore import load
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.scoring import score
from mixtral_jax.tokenization import tokenizer

_WINDOW = 512
_MOST_WINDOWS = 8
_Arrays = dict[str, np.ndarray]


def rotated(arrays: _Arrays, num_layers: int) -> _Arrays:
    """The parameters of a dense model, whose embeddings may be tied, in another basis."""
    width = arrays["norm.weight"].size
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))

    def inputs(weight: np.ndarray, norm: np.ndarray | None = None) -> np.ndarray:
        return (weight if norm is None else weight * norm.astype(np.float64)) @ turn

    def outputs(weight: np.ndarray) -> np.ndarray:
        return np.tensordot(turn.T, weight.astype(np.float64), 1)

    ones = np.ones(width)
    head = arrays.get("head.weight", arrays["embed.weight"])
    turned = {"embed.weight": inputs(arrays["embed.weight"])}
    for i in range(num_layers):
        for block, into, back in (
            ("attention", ("q", "k", "v"), "o"),
            ("feed_forward", ("gate", "up"), "down"),
        ):
            prefix = f"layers.{i}.{block}"
            norm = arrays[f"{prefix}_norm.weight"]
            turned[f"{prefix}_norm.weight"] = ones
            for name in into:
                turned[f"{prefix}.{name}.weight"] = inputs(arrays[f"{prefix}.{name}.weight"], norm)
            turned[f"{prefix}.{back}.weight"] = outputs(arrays[f"{prefix}.{back}.weight"])
    turned |= {"norm.weight": ones, "head.weight": inputs(head, arrays["norm.weight"])}
    return {name: array.astype(np.float32) for name, array in turned.items()}


def main() -> None:
    """Prints a row for each way of rounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--kept", type=Path, help="the same model, whose file was kept as it is")
    options = parser.parse_args()
    model, card = load(options.checkpoint)
    words = tokenizer.load(options.checkpoint)
    ids = words.encode(options.text.read_text(encoding="utf-8"))
    windows = [ids[i : i + _WINDOW] for i in range(0, len(ids) - _WINDOW + 1, _WINDOW)]
    windows = windows[:_MOST_WINDOWS]
    arrays = {name: np.asarray(v.get_value()) for name, v in named_parameters(model).items()}
    config = replace(card.model, tied_embeddings=False)
    turned = rotated(arrays, config.num_layers)

    def fill(piece: ParameterPiece, out: np.ndarray) -> None:
        out[...] = turned[piece.parameter].reshape(-1)[piece.start : piece.start + piece.size]

    def perplexity(of: Transformer) -> float:
        scores = score(of, words, windows)
        tokens = sum(len(window.logprobs) for window in scores)
        return math.exp(-sum(window.total for window in scores) / tokens)

    calibration = words.encode(calibration_text())
    ways: dict[str, tuple[str, Callable[..., None]]] = {
        "float32": ("float32", partial(int8.quantize, alpha=None)),
        "int8": ("int8", int8.quantize),
        "int4, each to the nearest": ("int4", partial(int4.quantize, compensates=False)),
        "int4": ("int4", int4.quantize),
        "int4 mixed with int8": ("int4", int4.quantize),
    }
    base = perplexity(model)
    print(f"{len(windows)} windows of {_WINDOW} tokens; float32 as it was: {base:.3f}\n")
    print("| weights, rotated | perplexity |\n|---|---|")
    for name, (dtype, rounding) in ways.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            beside = tuple(sorted(int4.mixed(config).items())) if "mixed" in name else ()
            writer = ParameterWriter(folder, parameter_shapes(config, dtype, beside))
            rounding(config, fill, calibration, writer)
            made = Card(model=config, dtype=dtype, name="rotated", provider=card.provider)
            replace(made, weight_dtypes=beside).write(folder)
            rounded = perplexity(load(folder)[0])
        print(f"| {name} | {rounded:.3f} ({100 * (rounded / base - 1):+.1f} %) |", flush=True)
    if options.kept is not None:
        kept = perplexity(load(options.kept)[0])
        print(f"| as its file has them | {kept:.3f} ({100 * (kept / base - 1):+.1f} %) |")


main()
