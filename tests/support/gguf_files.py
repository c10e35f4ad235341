"""Tiny GGUF files of blocks of any type: random ones, which the package gguf decodes to floats."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

from tests.support.sources import Tensors

# Rows of whole blocks of 256 weights, and heads of whole groups of 32.
V, D, L, N, K, H, F, E = 67, 256, 2, 8, 2, 32, 512, 2
# Places of a block's float16 numbers, and the largest that they are here.
_SCALES: dict[str, dict[int, float]] = {
    "Q4_0": {0: 0.01},
    "Q4_1": {0: 0.01, 2: 0.05},
    "Q4_K": {0: 3e-4, 2: 1e-3},
    "Q5_K": {0: 2e-4, 2: 1e-3},
    "Q6_K": {208: 1e-4},
    "Q8_0": {0: 1e-3},
}


def random_blocks(generator: np.random.Generator, kind: Q, outputs: int, inputs: int) -> np.ndarray:
    """A matrix's bytes u8 [O _], whose scales are finite and of both signs."""
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    count = outputs * inputs // weights
    if kind in (Q.F16, Q.F32):
        dtype = {Q.F16: np.float16, Q.F32: np.float32}[kind]
        values = 0.05 * generator.standard_normal((outputs, inputs))
        return values.astype(dtype).view(np.uint8)
    blocks = generator.integers(0, 256, (count, nbytes), np.uint8)
    if kind == Q.Q6_K:
        blocks[:, 192:208] = generator.integers(-30, 30, (count, 16), np.int8).view(np.uint8)
    for place, largest in _SCALES[kind.name].items():
        scale = generator.uniform(-largest, largest, (count, 1)).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8)
    return blocks.reshape(outputs, -1)


def floats(blocks: np.ndarray, kind: Q) -> np.ndarray:
    """The same as the package gguf decodes it: f32 [O I]."""
    return np.asarray(gguf.quants.dequantize(blocks, kind), np.float32)


class File:
    """A GGUF file of the architecture "llama", whose parameters are known as floats.

    Args:
        path: of the file, which is written.
        kinds: the type of each tensor by the end of its name, such as "attn_v" or "1.ffn_down";
            "" for all others.
        experts: whether it is a mixture.
    """

    def __init__(self, path: Path, kinds: Mapping[str, Q], *, experts: bool = False) -> None:
        self.path, self.kinds = path, kinds
        self.wide: Tensors = {}  # by our names, in our shapes
        self._generator = np.random.default_rng(7)
        self._writer = gguf.GGUFWriter(path, "llama")
        self._metadata(experts)
        self._matrix("token_embd", "embed", V, D)
        self._matrix("output", "head", V, D)
        self._vector("output_norm", "norm")
        for i in range(L):
            self._layer(f"blk.{i}.", f"layers.{i}.", experts)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()

    def kind(self, name: str) -> Q:
        """The type of a tensor."""
        ends = [end for end in self.kinds if end and f".{name}".endswith(f".{end}")]
        return self.kinds[max(ends, key=len, default="")]

    def _layer(self, theirs: str, ours: str, experts: bool) -> None:
        self._vector(theirs + "attn_norm", ours + "attention_norm")
        self._vector(theirs + "ffn_norm", ours + "feed_forward_norm")
        for name, heads in (("q", N), ("k", K), ("v", K)):
            own = ours + f"attention.{name}"
            self._matrix(theirs + f"attn_{name}", own, heads * H, D)
            wide = self.wide[own + ".weight"]
            if name != "v":  # rows 0 1 2 3 are 0 16 1 17 of ours
                wide = wide.reshape(heads, H // 2, 2, D).swapaxes(1, 2)
            self.wide[own + ".weight"] = wide.reshape(heads, H, D)
        self._matrix(theirs + "attn_output", ours + "attention.o", D, N * H)
        own = ours + "attention.o.weight"
        self.wide[own] = self.wide[own].reshape(D, N, H)
        if experts:
            router = (0.1 * self._generator.standard_normal((E, D))).astype(np.float32)
            self._writer.add_tensor(theirs + "ffn_gate_inp.weight", router)
            self.wide[ours + "feed_forward.router.weight"] = router
        end, count = ("_exps", E) if experts else ("", None)
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            own = ours + f"feed_forward.{name}"
            self._matrix(theirs + f"ffn_{name}{end}", own, *shape, count)

    def _matrix(
        self, theirs: str, ours: str, outputs: int, inputs: int, count: int | None = None
    ) -> None:
        kind, stacked = self.kind(theirs.removesuffix("_exps")), () if count is None else (count,)
        blocks = random_blocks(self._generator, kind, (count or 1) * outputs, inputs)
        self.wide[ours + ".weight"] = floats(blocks, kind).reshape(*stacked, outputs, inputs)
        blocks = blocks.reshape(*stacked, outputs, -1)
        self._writer.add_tensor(theirs + ".weight", blocks, raw_dtype=kind)

    def _vector(self, theirs: str, ours: str) -> None:
        values = (1 + 0.1 * self._generator.standard_normal(D)).astype(np.float32)
        self._writer.add_tensor(theirs + ".weight", values)
        self.wide[ours + ".weight"] = values

    def _metadata(self, experts: bool) -> None:
        sizes: dict[str, Any] = {
            "block_count": L,
            "context_length": 321,
            "embedding_length": D,
            "feed_forward_length": F,
            "attention.head_count": N,
            "attention.head_count_kv": K,
            "attention.key_length": H,
            "attention.value_length": H,
            "rope.dimension_count": H,
            "vocab_size": V,
        }
        if experts:
            sizes |= {"expert_count": E, "expert_used_count": E}
        for name, value in sizes.items():
            self._writer.add_uint32(f"llama.{name}", value)
        self._writer.add_float32("llama.rope.freq_base", 10_000.0)
        self._writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
