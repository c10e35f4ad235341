"""Tiny checkpoints of others, in every form that is read, and what they must become.

Names and orders are written out here by hand, so that the converter's table is not its own judge.
Files are written by the libraries of those who publish such files.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mixtral_jax.checkpoint import restore
from mixtral_jax.model.transformer import named_parameters

Tensors = dict[str, np.ndarray]

V, D, L, N, K, H, F, E = 67, 32, 3, 8, 2, 8, 96, 3
# Every value differs from the default of the class that reads it. Sizes are multiples of 32 where
# a quantised file needs rows of whole blocks.
DENSE: dict[str, Any] = dict(
    model_type="mistral",
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=L,
    num_attention_heads=N,
    num_key_value_heads=K,
    head_dim=H,
    intermediate_size=F,
    rope_theta=12_345.0,
    rms_norm_eps=3e-4,
    sliding_window=5,
    max_position_embeddings=321,
    tie_word_embeddings=False,
)
MOE: dict[str, Any] = DENSE | dict(model_type="mixtral", num_local_experts=E, num_experts_per_tok=2)

# The same two in Mistral's own words.
PARAMS: dict[str, Any] = dict(
    vocab_size=V,
    dim=D,
    n_layers=L,
    n_heads=N,
    n_kv_heads=K,
    head_dim=H,
    hidden_dim=F,
    rope_theta=12_345.0,
    norm_eps=3e-4,
    sliding_window=5,
    max_position_embeddings=321,
)
MOE_PARAMS = PARAMS | dict(moe=dict(num_experts=E, num_experts_per_tok=2))


def tensors(config: Mapping[str, Any], dtype: Any = np.float32) -> Tensors:
    """Random weights under Hugging Face's names, experts one by one."""
    generator = np.random.default_rng(5)

    def random(*shape: int) -> np.ndarray:
        return (0.2 * generator.standard_normal(shape, np.float32)).astype(dtype)

    found = {"model.embed_tokens.weight": random(V, D), "model.norm.weight": 1 + random(D)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = random(V, D)
    for i in range(L):
        layer = f"model.layers.{i}."
        found[layer + "input_layernorm.weight"] = 1 + random(D)
        found[layer + "post_attention_layernorm.weight"] = 1 + random(D)
        found[layer + "self_attn.q_proj.weight"] = random(N * H, D)
        found[layer + "self_attn.k_proj.weight"] = random(K * H, D)
        found[layer + "self_attn.v_proj.weight"] = random(K * H, D)
        found[layer + "self_attn.o_proj.weight"] = random(D, N * H)
        if config["model_type"] == "mixtral":
            moe = layer + "block_sparse_moe."
            found[moe + "gate.weight"] = random(E, D)
            for e in range(E):
                found[f"{moe}experts.{e}.w1.weight"] = random(F, D)
                found[f"{moe}experts.{e}.w2.weight"] = random(D, F)
                found[f"{moe}experts.{e}.w3.weight"] = random(F, D)
        else:
            found[layer + "mlp.gate_proj.weight"] = random(F, D)
            found[layer + "mlp.up_proj.weight"] = random(F, D)
            found[layer + "mlp.down_proj.weight"] = random(D, F)
    return found


def ours(hf: Tensors) -> Tensors:
    """The same weights under our names and in our shapes."""
    found = {
        "embed.weight": hf["model.embed_tokens.weight"],
        "norm.weight": hf["model.norm.weight"],
    }
    if "lm_head.weight" in hf:
        found["head.weight"] = hf["lm_head.weight"]
    for i in range(L):
        here, there = f"layers.{i}.", f"model.layers.{i}."
        found[here + "attention_norm.weight"] = hf[there + "input_layernorm.weight"]
        found[here + "feed_forward_norm.weight"] = hf[there + "post_attention_layernorm.weight"]
        for part, shape in dict(q=(N, H, D), k=(K, H, D), v=(K, H, D), o=(D, N, H)).items():
            value = hf[f"{there}self_attn.{part}_proj.weight"]
            found[f"{here}attention.{part}.weight"] = value.reshape(shape)
        if there + "mlp.gate_proj.weight" in hf:
            for part in ("gate", "up", "down"):
                found[f"{here}feed_forward.{part}.weight"] = hf[f"{there}mlp.{part}_proj.weight"]
            continue
        moe = there + "block_sparse_moe."
        found[here + "feed_forward.router.weight"] = hf[moe + "gate.weight"]
        for part, w in dict(gate="w1", down="w2", up="w3").items():
            experts = [hf[f"{moe}experts.{e}.{w}.weight"] for e in range(E)]
            found[f"{here}feed_forward.{part}.weight"] = np.stack(experts)
    return found


def fused(hf: Tensors) -> Tensors:
    """Experts as transformers 5 holds them: stacked, gate and up in one tensor, gate first."""
    found = {name: value for name, value in hf.items() if "block_sparse_moe" not in name}
    for i in range(L):
        moe, mlp = f"model.layers.{i}.block_sparse_moe.", f"model.layers.{i}.mlp."
        found[mlp + "gate.weight"] = hf[moe + "gate.weight"]
        w1, w2, w3 = (
            [hf[f"{moe}experts.{e}.{w}.weight"] for e in range(E)] for w in ("w1", "w2", "w3")
        )
        both = [np.concatenate(pair) for pair in zip(w1, w3, strict=True)]
        found[mlp + "experts.gate_up_proj"] = np.stack(both)
        found[mlp + "experts.down_proj"] = np.stack(w2)
    return found


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from half-split to interleaved order: 0 4 1 5 2 6 3 7 for eight rows."""
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    rows = [head * H + row for head in range(heads) for row in order]
    return weight[rows]


def consolidated(hf: Tensors) -> Tensors:
    """Mistral's own names, with queries and keys in interleaved order."""
    names = {
        "model.embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "block_sparse_moe": "feed_forward",
        "model.": "",
    }
    return _renamed(hf, names)


def ggml(hf: Tensors) -> Tensors:
    """llama.cpp's names, with queries and keys in interleaved order and experts stacked."""
    names = {
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "block_sparse_moe.gate": "ffn_gate_inp",
    }
    found = _renamed(hf, names)
    for i in range(L):
        for w, part in dict(w1="gate", w2="down", w3="up").items():
            experts = [
                found.pop(name)
                for e in range(E)
                if (name := f"blk.{i}.block_sparse_moe.experts.{e}.{w}.weight") in found
            ]
            if experts:
                found[f"blk.{i}.ffn_{part}_exps.weight"] = np.stack(experts)
    return found


def _renamed(hf: Tensors, names: Mapping[str, str]) -> Tensors:
    found = {}
    for name, value in hf.items():
        if "q_proj" in name:
            value = interleaved(value, N)
        if "k_proj" in name:
            value = interleaved(value, K)
        for theirs, other in names.items():
            name = name.replace(theirs, other)
        found[name] = value
    return found


def write_hf(
    folder: Path, config: Mapping[str, Any], weights: Tensors, shards: int = 1, index: bool = True
) -> Path:
    """A Hugging Face folder. Tensors are dealt out in turn, so layers are spread over shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    placed: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[shard::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    if index:
        content = {"metadata": {}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def write_consolidated(folder: Path, params: Mapping[str, Any], hf: Tensors) -> Path:
    return write_params(folder, params, consolidated(hf))


def write_params(folder: Path, params: Mapping[str, Any], weights: Tensors) -> Path:
    """Mistral's own files, of tensors that have its names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(dict(params)))
    save_file(weights, folder / "consolidated.safetensors")
    return folder


def write_gguf(
    path: Path,
    hf: Tensors,
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    **changes: Any,
) -> Path:
    """A GGUF file of the architecture "llama"; norms and routers stay in f32, as they do there.

    `changes` are metadata that replace ours or come on top, with "__" for a dot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    fields: dict[str, Any] = {
        "llama.block_count": L,
        "llama.context_length": 321,
        "llama.embedding_length": D,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": N,
        "llama.attention.head_count_kv": K,
        "llama.attention.key_length": H,
        "llama.attention.value_length": H,
        "llama.rope.freq_base": 12_345.0,
        "llama.attention.layer_norm_rms_epsilon": 3e-4,
        "llama.rope.dimension_count": H,
        "llama.vocab_size": V,
    }
    if any("experts" in name for name in hf):
        fields |= {"llama.expert_count": E, "llama.expert_used_count": 2}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    for name, value in fields.items():
        if isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    for name, value in ggml(hf).items():
        if value.ndim > 1 and "gate_inp" not in name:
            quantised = gguf.quants.quantize(value.astype(np.float32), matrices)
            writer.add_tensor(name, quantised, raw_dtype=matrices)
        else:
            writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write(folder: Path, form: str, config: dict[str, Any], dtype: Any) -> tuple[Path, Any]:
    """Writes a source in the given form; returns its path, and the tensors that it was made of."""
    hf = tensors(config, dtype)
    params = MOE_PARAMS if config is MOE else PARAMS
    makers: dict[str, Callable[[], Path]] = {
        "one file": lambda: write_hf(folder, config, hf) / "model.safetensors",
        "folder": lambda: write_hf(folder, config, hf),
        "index": lambda: write_hf(folder, config, hf, shards=4),
        "shards": lambda: write_hf(folder, config, hf, shards=3, index=False),
        "fused": lambda: write_hf(folder, config, fused(hf), shards=2),
        "consolidated": lambda: write_consolidated(folder, params, hf),
        "gguf": lambda: write_gguf(folder / "a.gguf", hf, llama__attention__sliding_window=5),
    }
    return makers[form](), hf


def parameters(folder: Path) -> Tensors:
    """All parameters of a checkpoint folder of ours, loaded as a model loads them."""
    model, _ = restore.load(folder)
    return {name: np.asarray(p.get_value()) for name, p in named_parameters(model).items()}


def assert_same(have: Tensors, want: Tensors) -> None:
    """Equal to the last bit, dtypes too."""
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert have[name].dtype == value.dtype, name
        np.testing.assert_array_equal(have[name], value, err_msg=name)


BF16 = np.dtype(ml_dtypes.bfloat16)
