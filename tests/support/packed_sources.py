"""Tiny folders of integers in words as GPTQ, AWQ and compressed-tensors publish them.

Codes, zeros and scales are random; each layout is packed here by shifts, word by word, as its
format says, and every weight is computed by the format's own formula, (code - zero) * scale.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.support import sources
from tests.support.sources import Tensors

BF16 = np.dtype(ml_dtypes.bfloat16)
V, D, L, N, K, H, F, E = 67, 64, 2, 2, 1, 32, 96, 3
DENSE: dict[str, Any] = sources.DENSE | dict(
    hidden_size=D,
    num_hidden_layers=L,
    num_attention_heads=N,
    num_key_value_heads=K,
    head_dim=H,
    intermediate_size=F,
)
MOE: dict[str, Any] = DENSE | dict(model_type="mixtral", num_local_experts=E, num_experts_per_tok=2)
CONFIGS = {"dense": DENSE, "moe": MOE}


def gptq(**changes: Any) -> dict[str, Any]:
    """`quantization_config` as AutoGPTQ writes it."""
    return dict(
        quant_method="gptq",
        bits=4,
        group_size=64,
        desc_act=False,
        sym=True,
        damp_percent=0.1,
        true_sequential=True,
        model_name_or_path=None,
        model_file_base_name="model",
    ) | dict(changes)


def awq(**changes: Any) -> dict[str, Any]:
    """`quantization_config` as AutoAWQ writes it."""
    return dict(
        quant_method="awq",
        bits=4,
        group_size=32,
        version="gemm",
        zero_point=True,
        modules_to_not_convert=["gate"],
    ) | dict(changes)


def compressed_tensors(
    form: str = "pack-quantized", *, activations: bool = False, **changes: Any
) -> dict[str, Any]:
    """`quantization_config` as llm-compressor writes it; `changes` are to the weights."""
    weights = dict(
        num_bits=4,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=64,
        block_structure=None,
        dynamic=False,
        actorder=None,
        observer="minmax",
    ) | dict(changes)
    rows = dict(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    group = dict(
        targets=["Linear"],
        weights=weights,
        input_activations=rows if activations else None,
        output_activations=None,
    )
    return dict(
        quant_method="compressed-tensors",
        format=form,
        config_groups=dict(group_0=group),
        ignore=["lm_head", "re:.*block_sparse_moe.gate"],
        kv_cache_scheme=None,
        quantization_status="compressed",
        sparsity_config=dict(format="dense", global_sparsity=0.1),
    )


# What is published, by a name of ours, and the dtype of ours that keeps it.
LAYOUTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "gptq": (gptq(), "int4"),
    "gptq of whole rows": (gptq(sym=False, group_size=-1, desc_act=True), "int4"),
    "gptq_v2": (gptq(sym=False, group_size=32, checkpoint_format="gptq_v2"), "int4"),
    "gptq in the order of sizes": (gptq(group_size=32, desc_act=True, shuffled=True), None),
    "gptq of 8 bits": (gptq(bits=8), None),
    "awq": (awq(), "int4"),
    "awq in groups of 64": (awq(group_size=64), "int4"),
    "packed": (compressed_tensors(), "int4"),
    "packed by outputs": (compressed_tensors(strategy="channel", group_size=None), "int4"),
    "packed, not symmetric": (compressed_tensors(symmetric=False, group_size=32), "int4"),
    "packed in groups of 16": (compressed_tensors(group_size=16), None),
    "packed in the order of sizes": (compressed_tensors(actorder="group", group_size=32), None),
    "packed, 8 bits by outputs": (
        compressed_tensors(num_bits=8, strategy="channel", group_size=None),
        "int8",
    ),
    "packed, 8 bits in groups": (compressed_tensors(num_bits=8), None),
    "int8": (
        compressed_tensors(
            "int-quantized", activations=True, num_bits=8, strategy="channel", group_size=None
        ),
        "int8",
    ),
}
# What stays as it is: embedding, head and routers.
_FLOATS = ("embed_tokens.weight", "lm_head.weight", ".block_sparse_moe.gate.weight")


class Folder:
    """A folder of one layout.

    `path` is it; `stored` are its tensors; `wide` what they stand for in float32; `codes` and
    `zeros` [O I] are the integers of each weight.
    """

    def __init__(self, path: Path, layout: str, config: Mapping[str, Any]) -> None:
        fields = dict(LAYOUTS[layout][0])
        shuffled = fields.pop("shuffled", False) or layout == "packed in the order of sizes"
        self.config = dict(config) | dict(quantization_config=fields)
        self.stored: Tensors = {}
        self.wide: Tensors = {}
        self.codes: Tensors = {}
        self.zeros: Tensors = {}
        generator = np.random.default_rng(11)
        dtype = np.dtype(np.float16) if fields["quant_method"] in ("gptq", "awq") else BF16
        for name, shape in shapes(config).items():
            if len(shape) == 1 or name.endswith(_FLOATS):
                value = generator.standard_normal(shape) * 0.2 + (len(shape) == 1)
                self.stored[name] = value.astype(dtype)
                self.wide[name] = self.stored[name].astype(np.float32)
                continue
            stem = name.removesuffix("weight")
            if fields["quant_method"] == "gptq":
                weight = _gptq(shape, fields, generator, shuffled)
            elif fields["quant_method"] == "awq":
                weight = _awq(shape, fields, generator)
            else:
                weight = _compressed_tensors(shape, fields, generator, shuffled)
            self.stored |= {stem + ending: array for ending, array in weight.stored.items()}
            self.codes[name], self.zeros[name] = weight.codes, weight.zeros
            self.wide[name] = (weight.codes - weight.zeros).astype(np.float32) * weight.scales
        self.path = sources.write_hf(path, self.config, self.stored)

    def write(self, path: Path, **changes: Any) -> Path:
        """Writes a folder with other tensors: `changes` by name, with "__" for a dot."""
        stored = dict(self.stored)
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del stored[name]
            else:
                stored[name] = value
        return sources.write_hf(path, self.config, stored)


class _Weight:
    """Integers of a matrix [O I], as they are meant and as they are stored."""

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        group: int,
        dtype: np.dtype,
        generator: np.random.Generator,
        shuffled: bool = False,
    ) -> None:
        outputs, inputs = shape
        groups = -(-inputs // group)
        self.order = np.arange(inputs, dtype=np.int32) // group
        if shuffled:
            self.order = generator.permutation(self.order)
        self.codes = generator.integers(0, 2**bits, shape)
        self.group_scales = generator.uniform(0.3, 1, (outputs, groups)) * 0.8 / 2**bits
        self.group_scales = self.group_scales.astype(dtype)
        self.group_zeros = np.full((outputs, groups), 2 ** (bits - 1))
        self.stored: Tensors = {}

    def draw_zeros(self, generator: np.random.Generator) -> None:
        """Draws zeros from 0 to 15: near the middle, and both ends."""
        drawn = np.rint(8 + 2 * generator.standard_normal(self.group_zeros.shape))
        self.group_zeros = np.clip(drawn.astype(int), 0, 15)
        self.group_zeros[:2, 0] = 0, 15

    @property
    def scales(self) -> np.ndarray:
        """f32 [O I]."""
        return self.group_scales.astype(np.float32)[:, self.order]

    @property
    def zeros(self) -> np.ndarray:
        """Integers [O I]."""
        return self.group_zeros[:, self.order]


def _words(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Packs neighbours in rows: field f of a word is number order[f] of its eight."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    rows, columns = numbers.shape
    padded = np.zeros((rows, -(-columns // per_word) * per_word), np.uint32)
    padded[:, :columns] = numbers
    words = np.zeros((rows, padded.shape[1] // per_word), np.uint32)
    for word in range(words.shape[1]):
        for field in range(per_word):
            words[:, word] |= padded[:, word * per_word + order[field]] << np.uint32(bits * field)
    return words.view(np.int32)


def _gptq(
    shape: tuple[int, int],
    fields: Mapping[str, Any],
    generator: np.random.Generator,
    shuffled: bool,
) -> _Weight:
    """qweight [I/8 O], qzeros [G O/8] one less in each field but in gptq_v2, scales [G O]."""
    bits = fields["bits"]
    group = shape[1] if fields["group_size"] == -1 else fields["group_size"]
    weight = _Weight(shape, bits, group, np.dtype(np.float16), generator, shuffled)
    if not fields["sym"]:
        weight.draw_zeros(generator)
    zeros = _words(weight.group_zeros.T, bits)
    if fields.get("checkpoint_format") != "gptq_v2":
        zeros -= {4: 0x11111111, 8: 0x01010101}[bits]
    weight.stored = dict(
        qweight=np.ascontiguousarray(_words(weight.codes, bits).T),
        qzeros=zeros,
        scales=np.ascontiguousarray(weight.group_scales.T),
        g_idx=weight.order,
        bias=np.zeros(shape[0], np.float16),
    )
    return weight


def _awq(
    shape: tuple[int, int], fields: Mapping[str, Any], generator: np.random.Generator
) -> _Weight:
    """qweight [I O/8], qzeros [G O/8], scales [G O]; a word has outputs 0 2 4 6 1 3 5 7."""
    weight = _Weight(shape, 4, fields["group_size"], np.dtype(np.float16), generator)
    weight.draw_zeros(generator)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    weight.stored = dict(
        qweight=_words(weight.codes.T, 4, order),
        qzeros=_words(weight.group_zeros.T, 4, order),
        scales=np.ascontiguousarray(weight.group_scales.T),
    )
    return weight


def _compressed_tensors(
    shape: tuple[int, int],
    fields: Mapping[str, Any],
    generator: np.random.Generator,
    shuffled: bool,
) -> _Weight:
    """weight_packed [O I/8], weight_scale [O G], weight_zero_point [O/8 G]; or int8 as it is."""
    numbers = fields["config_groups"]["group_0"]["weights"]
    bits = numbers["num_bits"]
    group = numbers["group_size"] if numbers["strategy"] == "group" else shape[1]
    weight = _Weight(shape, bits, group, BF16, generator, shuffled)
    if fields["format"] == "int-quantized":
        weight.stored = dict(
            weight=(weight.codes - 128).astype(np.int8), weight_scale=weight.group_scales
        )
        return weight
    weight.stored = dict(
        weight_packed=_words(weight.codes, bits),
        weight_scale=weight.group_scales,
        weight_shape=np.asarray(shape, np.int64),
    )
    if not numbers["symmetric"]:
        weight.draw_zeros(generator)
        zeros = _words(weight.group_zeros.T, bits).T
        weight.stored["weight_zero_point"] = np.ascontiguousarray(zeros)
    if shuffled:
        weight.stored["weight_g_idx"] = weight.order
    return weight


def shapes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of a model's tensors under Hugging Face's names."""
    found: dict[str, Any] = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i in range(L):
        layer = f"model.layers.{i}."
        found[layer + "input_layernorm.weight"] = (D,)
        found[layer + "post_attention_layernorm.weight"] = (D,)
        found[layer + "self_attn.q_proj.weight"] = (N * H, D)
        found[layer + "self_attn.k_proj.weight"] = (K * H, D)
        found[layer + "self_attn.v_proj.weight"] = (K * H, D)
        found[layer + "self_attn.o_proj.weight"] = (D, N * H)
        if config["model_type"] == "mixtral":
            moe = layer + "block_sparse_moe."
            found[moe + "gate.weight"] = (E, D)
            for e in range(E):
                found[f"{moe}experts.{e}.w1.weight"] = (F, D)
                found[f"{moe}experts.{e}.w2.weight"] = (D, F)
                found[f"{moe}experts.{e}.w3.weight"] = (F, D)
        else:
            found[layer + "mlp.gate_proj.weight"] = (F, D)
            found[layer + "mlp.up_proj.weight"] = (F, D)
            found[layer + "mlp.down_proj.weight"] = (D, F)
    return found


def ours(hf: Tensors) -> Tensors:
    """The same arrays under our names; experts are stacked, and shapes are those of matrices."""
    found = {
        "embed.weight": hf["model.embed_tokens.weight"],
        "norm.weight": hf["model.norm.weight"],
    }
    found["head.weight"] = hf["lm_head.weight"]
    for i in range(L):
        here, there = f"layers.{i}.", f"model.layers.{i}."
        found[here + "attention_norm.weight"] = hf[there + "input_layernorm.weight"]
        found[here + "feed_forward_norm.weight"] = hf[there + "post_attention_layernorm.weight"]
        for part in "qkvo":
            found[f"{here}attention.{part}.weight"] = hf[f"{there}self_attn.{part}_proj.weight"]
        for part, w in dict(gate="w1", down="w2", up="w3").items():
            moe = there + "block_sparse_moe."
            if there + "mlp.gate_proj.weight" in hf:
                stacked = hf[f"{there}mlp.{part}_proj.weight"]
            else:
                stacked = np.stack([hf[f"{moe}experts.{e}.{w}.weight"] for e in range(E)])
                found[here + "feed_forward.router.weight"] = hf[moe + "gate.weight"]
            found[f"{here}feed_forward.{part}.weight"] = stacked
    return found
