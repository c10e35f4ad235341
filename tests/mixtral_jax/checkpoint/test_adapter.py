"""PEFT's files: written as others read them, read in both forms, refused where they are broken."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from mixtral_jax.checkpoint.adapter import read_adapter, write_adapter
from mixtral_jax.checkpoint.adapter_summary import is_adapter, summarize
from mixtral_jax.errors import AdapterError
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.adapter import Adapter, AdapterConfig
from tests.support import sources
from tests.support.adapters import (
    ALL,
    LAYER,
    WEIGHTS,
    Tensors,
    flat,
    fused,
    random_adapter,
    read_settings,
    read_tensors,
    write,
)

MOE, DENSE = from_hf(sources.MOE), from_hf(sources.DENSE)  # E = 3, D = 32, F = 96
SETTINGS = AdapterConfig(targets=ALL, rank=4, alpha=6.0)
EXPERTS = AdapterConfig(targets=("router", "gate", "up", "down"), rank=4, alpha=6.0)
DENSE_SETTINGS = AdapterConfig(rank=5, alpha=7.5, rank_stabilized=True)
FUSED = {
    "target_modules": [],
    "target_parameters": ["gate.weight", "gate_up_proj", "down_proj"],
    "rank_pattern": {r".*\.gate_up_proj": 8},
    "alpha_pattern": {r".*\.gate_up_proj": 12},
}


def assert_equal(got: Adapter, want: Adapter) -> None:
    """Fails unless two adapters have the same matrices, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_what_is_written_is_read_again(kind: str, tmp_path: Path) -> None:
    config, settings = (MOE, SETTINGS) if kind == "moe" else (DENSE, DENSE_SETTINGS)
    adapter = random_adapter(config, settings)
    write_adapter(tmp_path / "adapter", adapter, settings, "mistralai/some-base")
    stored = read_adapter(tmp_path / "adapter", config, max_rank=settings.rank)
    assert_equal(stored.adapter, adapter)
    assert stored.settings == settings
    assert (stored.base, stored.rank) == ("mistralai/some-base", settings.rank)
    assert stored.num_layers_changed == config.num_layers
    assert stored.num_parameters == sum(array.size for array in jax.tree.leaves(adapter))
    # An adapter is found in a cache by its digest: another scaling is another adapter.
    other = AdapterConfig(
        targets=settings.targets, rank=settings.rank, alpha=1.0, rank_stabilized=False
    )
    write_adapter(tmp_path / "other", adapter, other, "another name")
    assert read_adapter(tmp_path / "other", config).digest != stored.digest
    write_adapter(tmp_path / "same", adapter, settings, "another name")
    assert read_adapter(tmp_path / "same", config).digest == stored.digest


def test_names_and_shapes_are_those_of_vllm_and_sglang(tmp_path: Path) -> None:
    adapter = random_adapter(MOE, SETTINGS)
    write_adapter(tmp_path / "adapter", adapter, SETTINGS, "base")
    tensors = read_tensors(tmp_path / "adapter")
    moe = LAYER.format(1) + "block_sparse_moe."
    block = adapter.layers[1]
    for name, low in (("w1", block.gate), ("w3", block.up), ("w2", block.down)):
        np.testing.assert_array_equal(tensors[f"{moe}experts.2.{name}.lora_A.weight"], low.a[2])
        np.testing.assert_array_equal(tensors[f"{moe}experts.2.{name}.lora_B.weight"], low.b[2])
    np.testing.assert_array_equal(tensors[f"{moe}gate.lora_B.weight"], block.router.b)
    attention = LAYER.format(1) + "self_attn."
    # Rows of heads follow one another: q has 8 of 8 rows, k and v have 2.
    np.testing.assert_array_equal(
        tensors[f"{attention}q_proj.lora_B.weight"], block.q.b.reshape(64, 4)
    )
    np.testing.assert_array_equal(
        tensors[f"{attention}k_proj.lora_B.weight"], block.k.b.reshape(16, 4)
    )
    np.testing.assert_array_equal(
        tensors[f"{attention}o_proj.lora_A.weight"], block.o.a.reshape(4, 64)
    )
    # 3 layers of 4 matrices of attention, a router, and 3 experts of 3 matrices: 14 pairs each.
    assert len(tensors) == 3 * 14 * 2
    settings = read_settings(tmp_path / "adapter")
    assert settings["target_modules"] == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate", "w1", "w3", "w2"),
    ]
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (4, 6, False)


def test_the_fused_form_is_the_same_adapter(tmp_path: Path) -> None:
    adapter = random_adapter(MOE, EXPERTS)
    write_adapter(tmp_path / "apart", adapter, EXPERTS, "base")
    write(tmp_path / "fused", fused(MOE, adapter), FUSED)
    stored = read_adapter(tmp_path / "fused", MOE, max_rank=4)
    assert_equal(stored.adapter, adapter)
    assert stored.digest == read_adapter(tmp_path / "apart", MOE).digest


def test_gate_and_up_may_share_one_a(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    a = drawn.standard_normal((3, 4, 32)).astype(np.float32)
    b = drawn.standard_normal((3, 192, 4)).astype(np.float32)
    # Where only one parameter of the experts is adapted, PEFT has one wrapper around them.
    tensors: Tensors = {}
    for i in range(3):
        tensors |= flat(LAYER.format(i) + "mlp.experts", a, b)
    write(tmp_path / "adapter", tensors, {"target_parameters": ["mlp.experts.gate_up_proj"]})
    block = read_adapter(tmp_path / "adapter", MOE).adapter.layers[2]
    assert block.down is None and block.router is None and block.q is None
    np.testing.assert_array_equal(block.gate.a, a)
    np.testing.assert_array_equal(block.up.a, a)
    np.testing.assert_array_equal(block.gate.b, b[:, :96])
    np.testing.assert_array_equal(block.up.b, b[:, 96:])


def test_modules_may_have_ranks_and_scalings_of_their_own(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    tensors = {}
    ranks = [4, 8, 4]
    for i, rank in enumerate(ranks):
        module = LAYER.format(i) + "self_attn.v_proj"
        tensors[f"{module}.lora_A.weight"] = drawn.standard_normal((rank, 32)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = drawn.standard_normal((16, rank)).astype(np.float32)
    settings = {
        "target_modules": ["v_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.v_proj": 8},
        "alpha_pattern": {"2.self_attn.v_proj": 3},
    }
    stored = read_adapter(write(tmp_path / "adapter", tensors, settings), MOE)
    for i, (rank, scaling) in enumerate(zip(ranks, (6 / 4, 6 / 8, 3 / 4), strict=True)):
        module = LAYER.format(i) + "self_attn.v_proj"
        low = stored.adapter.layers[i].v
        assert low.a.shape == (rank, 32)
        got = stored.settings.scaling * low.b.reshape(16, rank) @ low.a
        want = scaling * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert stored.rank == 8
    # Readers that know no patterns get one rank for all: the rest is zero.
    write_adapter(tmp_path / "again", stored.adapter, stored.settings, "base")
    assert read_settings(tmp_path / "again")["lora_alpha"] == 12
    again = read_adapter(tmp_path / "again", MOE)
    layers = zip(again.adapter.layers, stored.adapter.layers, ranks, strict=True)
    for ours, theirs, rank in layers:
        padded, own = ours.v.b.reshape(16, 8), theirs.v.b.reshape(16, rank)
        np.testing.assert_array_equal(ours.v.a[:rank], theirs.v.a)
        np.testing.assert_array_equal(padded[:, :rank], own)
        assert not ours.v.a[rank:].any() and not padded[:, rank:].any()


def test_some_layers_alone_may_be_changed(tmp_path: Path) -> None:
    module = LAYER.format(1) + "self_attn.v_proj"
    tensors = {
        f"{module}.lora_A.weight": np.ones((4, 32), np.float32),
        f"{module}.lora_B.weight": np.ones((16, 4), np.float32),
    }
    settings = {"target_modules": ["v_proj"], "layers_to_transform": [1]}
    stored = read_adapter(write(tmp_path / "adapter", tensors, settings), MOE)
    assert [block.v is None for block in stored.adapter.layers] == [True, False, True]
    assert stored.num_layers_changed == 1
    write_adapter(tmp_path / "again", stored.adapter, stored.settings, "base")
    assert read_adapter(tmp_path / "again", MOE).num_layers_changed == 1


def test_a_gate_alone_is_written_with_zeros_for_the_others(tmp_path: Path) -> None:
    settings = AdapterConfig(targets=("gate",), rank=4, alpha=6.0)
    write_adapter(tmp_path / "adapter", random_adapter(MOE, settings), settings, "base")
    # PEFT refuses w1 without w3, and without w2 it keeps the base's experts, with a warning.
    assert read_settings(tmp_path / "adapter")["target_modules"] == ["w1", "w3", "w2"]
    block = read_adapter(tmp_path / "adapter", MOE).adapter.layers[0]
    assert block.gate.b.any() and not block.up.b.any() and not block.down.b.any()


def test_rank_stabilized_experts_are_written_with_a_plain_alpha(tmp_path: Path) -> None:
    # 6 / sqrt(4) = 12 / 4. PEFT would make 2 * 6 / sqrt(2 * 4) of the first for gate and up.
    settings = AdapterConfig(targets=ALL, rank=4, alpha=6.0, rank_stabilized=True)
    write_adapter(tmp_path / "adapter", random_adapter(MOE, settings), settings, "base")
    content = read_settings(tmp_path / "adapter")
    assert (content["lora_alpha"], content["r"], content["use_rslora"]) == (12, 4, False)


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    adapter = random_adapter(MOE, EXPERTS)
    short = {k: v.astype(ml_dtypes.bfloat16) for k, v in fused(MOE, adapter).items()}
    stored = read_adapter(write(tmp_path / "adapter", short, FUSED), MOE)
    want = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), adapter)
    assert_equal(stored.adapter, want)


FIRST = LAYER.format(0) + "self_attn.q_proj.lora_A.weight"
Change = Callable[[Tensors, dict[str, Any]], object]
# What is done to a good adapter of all targets, and what the error must say.
BROKEN: dict[str, tuple[Change, str]] = {
    "the base is wider": (
        lambda tensors, _: tensors.update({FIRST: np.zeros((4, 48), np.float32)}),
        r"q_proj.lora_A.weight has the shape \[4, 48\].* ask for \[4, 32\].*'some/base'",
    ),
    "a tensor that is unknown": (
        lambda tensors, _: tensors.update(
            {"base_model.model.lm_head.lora_A.weight": np.ones(3, np.float32)}
        ),
        r"lm_head.lora_A.weight has no place.*head take no adapter.*\(1 of 85",
    ),
    "a layer that the base lacks": (
        lambda tensors, _: tensors.update({FIRST.replace(".0.", ".3."): np.ones(3, np.float32)}),
        r"layers.3.self_attn.q_proj.lora_A.weight has no place.*the base has 3 layers",
    ),
    "an expert that the base lacks": (
        lambda tensors, _: tensors.update(
            {
                LAYER.format(0) + "block_sparse_moe.experts.3.w1.lora_A.weight": np.ones(
                    3, np.float32
                )
            }
        ),
        r"experts.3.w1.lora_A.weight has no place.*the base has 3 experts",
    ),
    "a tensor is missing": (
        lambda tensors, _: tensors.pop(FIRST),
        r"lacks .*layers.0.self_attn.q_proj.lora_A.weight.*\(1 of 84 tensors",
    ),
    "a target without settings": (
        lambda _, settings: settings["target_modules"].remove("q_proj"),
        r"q_proj.lora_A.weight has no place in the model: adapter_config.json asks for k_proj",
    ),
    "NaN": (
        lambda tensors, _: tensors[FIRST].__setitem__((0, 0), np.nan),
        r"q_proj.lora_A.weight has values that are not finite",
    ),
    "infinity after its scaling": (
        lambda tensors, settings: (
            settings.update(alpha_pattern={"q_proj": 1e8}),
            tensors.update({FIRST.replace("_A", "_B"): np.full((64, 4), 1e35, np.float32)}),
        ),
        r"q_proj.lora_B.weight has values that are not finite",
    ),
    "infinity after the scaling of all": (
        lambda tensors, settings: (
            settings.update(lora_alpha=1e8),
            tensors.update({FIRST.replace("_A", "_B"): np.full((64, 4), 1e35, np.float32)}),
        ),
        r"q_proj.lora_B.weight has values that are not finite",
    ),
    "a flag that is text": (
        lambda _, settings: settings.update(use_rslora="false"),
        "use_rslora is 'false'; it must be true or false",
    ),
    "a rank that is not its own": (
        lambda _, settings: settings.update(r=8),
        r"has the shape \[4, 32\], but rank 8",
    ),
    "a rank that is too large": (
        lambda tensors, settings: (
            settings.update(r=65),
            tensors.update({FIRST: np.ones((65, 32), np.float32)}),
        ),
        r"has the rank 65; at most 64 is allowed",
    ),
    "DoRA": (lambda _, settings: settings.update(use_dora=True), "use_dora .*merge_and_unload"),
    "lora_bias": (lambda _, settings: settings.update(lora_bias=True), "lora_bias=False"),
    "bias": (lambda _, settings: settings.update(bias="all"), "bias is 'all'"),
    "modules_to_save": (
        lambda _, settings: settings.update(modules_to_save=["lm_head"]),
        r"modules_to_save is set to \['lm_head'\]",
    ),
    "PiSSA": (
        lambda _, settings: settings.update(init_lora_weights="pissa_niter_4"),
        "'pissa_niter_4', which changes the base's weights too",
    ),
    "another kind": (
        lambda _, settings: settings.update(peft_type="IA3"),
        "peft_type is 'IA3'; only LORA",
    ),
    "another task": (lambda _, settings: settings.update(task_type="SEQ_CLS"), "'SEQ_CLS'"),
    "a field of the future": (
        lambda _, settings: settings.update(use_mora=True),
        "use_mora is set to True, which is not supported",
    ),
    "no rank": (lambda _, settings: settings.pop("r"), "r is None; it must be a whole number"),
    "a pattern without an end": (
        lambda _, settings: settings.update(rank_pattern={r"([\w.]|[\w.])*[0-9]{9}": 4}),
        "is no pattern that can be matched",
    ),
    "integers": (
        lambda tensors, _: tensors.update({FIRST: np.ones((4, 32), np.int32)}),
        "is stored as I32",
    ),
    "DoRA's tensor": (
        lambda tensors, _: tensors.update(
            {FIRST.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(64, np.float32)}
        ),
        "lora_magnitude_vector has no place in the model: it is of DoRA",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_adapter_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, message = BROKEN[fault]
    write_adapter(tmp_path / "good", random_adapter(MOE, SETTINGS), SETTINGS, "some/base")
    tensors, settings = read_tensors(tmp_path / "good"), read_settings(tmp_path / "good")
    change(tensors, settings)
    write(tmp_path / "bad", tensors, settings)
    if "r" not in settings:  # the writer's default is in its place
        text = (tmp_path / "bad/adapter_config.json").read_text().replace('"r": 4, ', "")
        (tmp_path / "bad/adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "bad", MOE, max_rank=64)


def test_an_adapter_of_a_mixture_does_not_fit_a_dense_model(tmp_path: Path) -> None:
    write_adapter(tmp_path / "moe", random_adapter(MOE, SETTINGS), SETTINGS, "base")
    with pytest.raises(AdapterError, match="the base has no experts"):
        read_adapter(tmp_path / "moe", DENSE)
    write_adapter(tmp_path / "dense", random_adapter(DENSE, DENSE_SETTINGS), DENSE_SETTINGS, "base")
    with pytest.raises(AdapterError, match="down_proj.lora_A.weight has no place.*3 experts"):
        read_adapter(tmp_path / "dense", MOE)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(AdapterError, match="it has no adapter_config.json; give the folder"):
        read_adapter(folder, MOE)
    with pytest.raises(AdapterError, match="give .*/run/adapter"):
        write_adapter(tmp_path / "run/adapter", random_adapter(MOE, EXPERTS), EXPERTS, "base")
        read_adapter(tmp_path / "run", MOE)
    write_adapter(folder, random_adapter(MOE, SETTINGS), SETTINGS, "base")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(AdapterError, match="is damaged"):
        read_adapter(folder, MOE)
    (folder / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])
    with pytest.raises(AdapterError, match="is damaged"):
        read_adapter(folder, MOE)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="can run code .* as safetensors"):
        read_adapter(folder, MOE)
    for text in ("[]", "{", "[" * 100_000, " " * (2 << 20)):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=re.escape(str(folder / "adapter_config.json"))):
            read_adapter(folder, MOE)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    adapter = random_adapter(MOE, SETTINGS)
    adapter.layers[2].down.b[1, 2, 3] = np.inf
    with pytest.raises(AdapterError, match="layer 2, down: .*not finite"):
        write_adapter(tmp_path / "adapter", adapter, SETTINGS, "base")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(AdapterError, match="no matrices"):
        write_adapter(tmp_path / "adapter", Adapter(()), SETTINGS, "base")


def test_a_summary_needs_no_base(tmp_path: Path) -> None:
    adapter = random_adapter(MOE, SETTINGS)
    for low in (low for low in adapter.layers[1] if low is not None):
        low.b[:] = 0
    write_adapter(tmp_path / "adapter", adapter, SETTINGS, "mistralai/some-base")
    assert is_adapter(tmp_path / "adapter") and not is_adapter(tmp_path)
    summary = summarize(tmp_path / "adapter")
    assert (summary.base, summary.rank, summary.alpha) == ("mistralai/some-base", 4, 6.0)
    assert summary.targets[-2:] == ("w3", "w2")
    assert summary.parameters == read_adapter(tmp_path / "adapter", MOE).num_parameters
    assert (summary.layers, summary.layers_changed, summary.dtype) == (3, 2, "F32")
    assert read_adapter(tmp_path / "adapter", MOE).num_layers_changed == 2
