"""Greedy tokens of a checkpoint on this device, to be set beside those of the CPU.

    python -m benchmarks.device.tokens FOLDER [EXPERTS]     prints them as JSON

With experts the model is upcycled in memory (arXiv:2212.05055): each layer's feed-forward stands
there as so many equal experts. The weights of a token's experts add up to 1, so the tokens stay
those of the dense model.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.generation import generate_tokens
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.placement import Placement
from mixtral_jax.weight import QUANTIZED

_PROMPTS = (
    "The capital of France is",
    "Write one sentence about the sea.\n",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a",
)
_NEW_TOKENS = 32


def greedy_tokens(folder: str, experts: int = 0) -> list[list[int]]:
    """The tokens behind four prompts: in float32 at full precision, or as weights are stored."""
    with jax.default_matmul_precision("highest"):
        pretrained = open_pretrained(folder)
        dtype = None if pretrained.card.dtype in QUANTIZED else "float32"
        model = pretrained.load(pretrained.placement(dtype, mesh=None))
        if experts:
            model = upcycled(model, experts)
        prompts = [pretrained.tokenizer.encode(text) for text in _PROMPTS]
        return [
            [*generate_tokens(model, ids, temperature=0.0, max_tokens=_NEW_TOKENS)]
            for ids in prompts
        ]


def upcycled(model: Transformer, experts: int) -> Transformer:
    """The mixture that computes what a dense model computes."""
    config = replace(model.config, num_experts=experts, experts_per_token=2)
    mixture = Transformer(
        config, Placement.of(config, model.placement.dtype, None), rngs=nnx.Rngs(0)
    )
    dense = named_parameters(model)
    for name, variable in named_parameters(mixture).items():
        if ".router." in name:
            continue
        value: Any = dense[name].get_value()
        many = ".feed_forward." in name
        variable.set_value(jnp.broadcast_to(value, (experts, *value.shape)) if many else value)
    return mixture


def tokens_on_cpu(folder: Path, experts: int) -> list[list[int]]:
    """The same tokens, by a process that has the CPU alone."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.device.tokens", str(folder), str(experts)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    tokens: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return tokens


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """The prompts whose tokens are all equal, and the first difference of the others."""
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    first = [
        next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        for a, b in zip(ours, theirs, strict=True)
        if a != b and len(a) == len(b)
    ]
    rest = f", first differences at token {first}" if first else ""
    return f"{equal} of {len(ours)} prompts equal{rest}"


if __name__ == "__main__":
    print(json.dumps(greedy_tokens(sys.argv[1], int(sys.argv[2]))))
