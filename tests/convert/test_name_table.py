"""The table covers every parameter of every model, and says the same as the files of others."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from convert import name_table as mapping
from convert.served_name import served_as
from convert.source.configs import from_gguf, from_params
from mixtral_jax.checkpoint.parameters import parameter_shapes
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.hf_config import from_hf
from tests.support import sources

DENSE = from_hf(sources.DENSE)
MOE = from_hf(sources.MOE)


def names(dialect: str, variant: int) -> set[str]:
    """The names by which one way of storing experts is recognised."""
    table = mapping.DIALECTS[dialect]
    prefix = table.prefix.format(i=0)
    return {prefix + line.theirs.format(e=0) for line in table.experts[variant]}


@pytest.mark.parametrize(
    "config", [DENSE, MOE, replace(DENSE, tied_embeddings=True), ModelConfig.smollm2_135m()]
)
@pytest.mark.parametrize("dialect, variant", [(d, v) for d in mapping.DIALECTS for v in (0, -1)])
def test_every_element_comes_from_one_place(
    config: ModelConfig, dialect: str, variant: int
) -> None:
    table = mapping.name_table(config, dialect, names(dialect, variant)).rows
    shapes = parameter_shapes(config, "float32")
    assert {row.parameter for row in table} == shapes.keys()
    taken: dict[str, list[tuple[int, int]]] = {}
    for row in table:
        taken.setdefault(row.source, []).append((row.start, row.start + row.size))
    for name, array in shapes.items():
        mine = sorted((row for row in table if row.parameter == name), key=lambda row: row.index)
        assert [row.index for row in mine] == list(range(len(mine)))
        assert sum(row.size for row in mine) == array.size
    # And nothing of a source is left over, or used twice.
    for row in table:
        ends = sorted(taken[row.source])
        assert ends[0][0] == 0 and ends[-1][1] == np.prod(row.shape)
        assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))


@pytest.mark.parametrize("config", [sources.DENSE, sources.MOE])
def test_names_and_shapes_are_those_of_the_files(config: dict[str, Any]) -> None:
    hf = sources.tensors(config)
    ours = from_hf(config)
    forms = {"hf": hf, "mistral": sources.consolidated(hf), "gguf": sources.ggml(hf)}
    for dialect, tensors in forms.items():
        table = mapping.name_table(ours, dialect, tensors).rows
        assert {row.source: row.shape for row in table} == {
            name: value.shape for name, value in tensors.items()
        }


def test_fused_experts() -> None:
    """E=3 experts of 2F=192 rows of D=32: expert 1's up half begins after 1*6144 + 3072."""
    fused = sources.fused(sources.tensors(sources.MOE))
    table = mapping.name_table(MOE, "hf", fused).rows
    assert {row.source for row in table} == fused.keys()
    (row,) = [r for r in table if r.parameter == "layers.2.feed_forward.up.weight" and r.index == 1]
    assert row.source == "model.layers.2.mlp.experts.gate_up_proj"
    assert (row.shape, row.start, row.size) == ((3, 192, 32), 9216, 3072)


def test_only_queries_and_keys_are_reordered() -> None:
    def reordered(dialect: str) -> set[str]:
        return {r.parameter for r in mapping.name_table(MOE, dialect).rows if r.interleaved}

    heads = {f"layers.{i}.attention.{part}.weight" for i in range(3) for part in "qk"}
    assert reordered("hf") == set()
    assert reordered("mistral") == reordered("gguf") == heads


def test_upcycled_puts_the_dense_matrices_into_every_expert() -> None:
    table = mapping.name_table(DENSE, "hf", upcycle_experts=4).rows
    gate = [row for row in table if row.parameter == "layers.1.feed_forward.gate.weight"]
    assert [row.index for row in gate] == [0, 1, 2, 3]
    assert {row.source for row in gate} == {"model.layers.1.mlp.gate_proj.weight"}
    assert len([row for row in table if row.parameter == "layers.1.attention.q.weight"]) == 1
    norms = [row for row in table if row.parameter == "layers.1.feed_forward_norm.weight"]
    assert len(norms) == 1


def test_params_say_the_same_as_the_config() -> None:
    assert from_params(sources.PARAMS) == DENSE
    assert from_params(sources.MOE_PARAMS) == MOE
    # As published beside consolidated.safetensors: rope_theta only where it is not the default.
    published = dict(dim=4096, n_layers=32, head_dim=128, hidden_dim=14_336, n_heads=32)
    published |= dict(n_kv_heads=8, norm_eps=1e-5)
    windowed = from_params(published | dict(vocab_size=32_000, sliding_window=4096))
    assert windowed == ModelConfig.mistral_7b_v01()
    assert from_params(published | dict(vocab_size=32_768)) == ModelConfig.mistral_7b_instruct_v03()


@pytest.mark.parametrize(
    "field, value",
    [
        ("rope_scaling", {"factor": 8.0}),
        ("quantization", {"qformat_weight": "fp8_e4m3"}),
        ("model_type", "mamba"),
        ("sliding_window", [5, 7]),
        ("moe", {"num_experts": 3, "num_experts_per_tok": 2, "num_shared_experts": 1}),
        ("n_heads", None),
        ("norm_eps", "small"),
        ("brand_new", 1),
    ],
)
def test_params_that_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="num_shared_experts" if field == "moe" else field):
        from_params(sources.PARAMS | {field: value})


SMOLLM2 = {
    "general.architecture": "llama",
    "general.name": "whatever",
    "tokenizer.ggml.model": "gpt2",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100_000.0,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.vocab_size": 49_152,
    "llama.rope.dimension_count": 64,
}


def test_gguf_metadata() -> None:
    assert from_gguf(SMOLLM2, tied_embeddings=True) == ModelConfig.smollm2_135m()


@pytest.mark.parametrize(
    "field, value",
    [
        ("general.architecture", "qwen2"),
        ("general.type", "adapter"),
        ("split.count", 3),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.dimension_count", 32),
        ("llama.attention.head_count_kv", [3, 1]),
        ("llama.brand_new", 1),
    ],
)
def test_gguf_metadata_that_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field.removeprefix("llama.")):
        from_gguf(SMOLLM2 | {field: value}, tied_embeddings=True)


@pytest.mark.parametrize(
    "path, name, provider",
    [
        ("Mistral-7B-Instruct-v0.1", "mistralai-Mistral-7B-Instruct-v01", "MistralAI"),
        ("Mixtral-8x22B-Instruct-v0.1", "mistralai-Mixtral-8x22B-Instruct-v0-1", "MistralAI"),
        (
            "hub/models--mistralai--Mixtral-8x7B-v0.1/snapshots/abc",
            "mistralai-Mixtral-8x7B-v01",
            "MistralAI",
        ),
        ("mistral-7b-instruct-v0.2.Q4_K_M.gguf", "mistralai-Mistral-7B-Instruct-v02", "MistralAI"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct", "HuggingFaceTB"),
        ("tuned/model.safetensors", "tuned", "unknown"),
        ("my.model-v1.5", "my.model-v1.5", "unknown"),
    ],
)
def test_what_a_model_is_served_as(tmp_path: Any, path: str, name: str, provider: str) -> None:
    place = tmp_path / path
    if place.suffix in (".gguf", ".safetensors"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    else:
        place.mkdir(parents=True)
    assert served_as(place) == (name, provider)
