"""A placement holds what follows from config, dtype and devices."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError, TopologyError
from mixtral_jax.kernels import kernels_for
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.placement import Placement, precision_text
from mixtral_jax.sharding import MESH_AXES, make_mesh

CONFIG = ModelConfig.tiny(vocab_size=32)


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        ("int8", "cpu", "float32"),
        ("int8", "tpu", "bfloat16"),
        ("int8", "gpu", "bfloat16"),
        ("fp8", "cpu", "float32"),
        ("fp8", "gpu", "bfloat16"),
        ("float32", "tpu", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_activations_between_weights(dtype: str, platform: str, expected: str) -> None:
    assert kernels_for(platform).activation_dtype(dtype) == expected


@pytest.mark.parametrize("dtype", ["fp8", "float8_e4m3fn", jnp.float8_e4m3fn])
def test_fp8_leaves_embedding_head_norms_and_routers_as_floats(dtype: Any) -> None:
    placement = Placement.of(CONFIG, dtype, mesh=None)
    assert (placement.dtype, placement.table_dtype) == ("fp8", "float32")
    arrays = named_parameters(Transformer(CONFIG, placement, rngs=None))
    rounded = {name for name, v in arrays.items() if v.get_value().dtype == jnp.float8_e4m3fn}
    assert {name.removesuffix("weight") + "scale" for name in rounded} == {
        name for name in arrays if name.endswith(".scale")
    }
    floats = {
        name.rpartition("layers.0.")[2] for name in set(arrays) - rounded if "scale" not in name
    }
    assert floats >= {"embed.weight", "head.weight", "feed_forward.router.weight"}
    assert not any("attention.q" in name or "down" in name for name in floats)


def test_single_weights_have_a_dtype_of_their_own() -> None:
    config = replace(CONFIG, head_size=32)
    given = {"layers.1.feed_forward.down": "int8", "layers.0.attention.v": "int8"}
    placement = Placement.of(config, "int4", mesh=None, weight_dtypes=given)
    arrays = named_parameters(Transformer(config, placement, rngs=None))
    int4 = {name for name, v in arrays.items() if v.get_value().dtype == jnp.uint8}
    names = ("attention.q", "attention.v", "feed_forward.gate", "feed_forward.down")
    for name in [f"layers.{i}.{name}" for i in range(2) for name in names]:
        assert (f"{name}.weight" in int4) == (name not in given)
    assert placement.of_layer(1).weight_dtypes == (("feed_forward.down", "int8"),)
    assert placement.of_layer(2).dtype_of("feed_forward.down") == "int4"
    assert precision_text(placement.dtype, placement.weight_dtypes) == "int4, 2 weights in int8"


@pytest.mark.parametrize(
    ("dtype", "name", "own", "message"),
    [
        (
            "int4",
            "layers.9.attention.v",
            "int8",
            "'layers.9.attention.v', which is no weight",
        ),
        ("int4", "layers.0.attention_norm", "int8", "which is no weight of this model's layers"),
        ("int4", "layers.0.attention.v", "fp8", "'fp8' for layers.0.attention.v, .* use int8"),
        ("float32", "layers.0.attention.v", "int8", "a model of float32; leave it out"),
    ],
)
def test_dtypes_that_single_weights_cannot_have(
    dtype: str, name: str, own: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Placement.of(replace(CONFIG, head_size=32), dtype, mesh=None, weight_dtypes={name: own})


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu", "xla"])
def test_records_made_apart_are_equal(platform: str) -> None:
    """Otherwise models made apart would have unequal graphs, and compile twice."""
    assert kernels_for(platform) == kernels_for(platform)
    assert hash(kernels_for(platform)) == hash(kernels_for(platform))


def test_models_of_equal_placements_share_their_graph() -> None:
    graphs = [
        nnx.split(Transformer(CONFIG, Placement.of(CONFIG, mesh=make_mesh(tensor=2)), rngs=None))[0]
        for _ in range(2)
    ]
    assert graphs[0] == graphs[1]


def test_an_unknown_platform_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernels for 'npu'; choose cpu, gpu, tpu or xla"):
        kernels_for("npu")


def test_auto_takes_all_devices_with_the_copies_that_they_need() -> None:
    """Two key/value heads over eight devices: each head is held by four."""
    dense = replace(CONFIG, num_experts=0, experts_per_token=0, num_heads=8, num_kv_heads=2)
    mesh = Placement.of(dense).layout.mesh
    assert mesh.size == len(jax.devices()) == 8
    assert mesh.shape["copy"] == 4
    assert Placement.of(dense, mesh="tensor=4").layout.mesh.shape["copy"] == 2


def test_one_device_has_no_mesh() -> None:
    assert Placement.of(CONFIG, mesh=None).layout is None
    assert Placement.of(CONFIG, devices=jax.devices()[:1]).layout is None


def test_no_device_is_refused() -> None:
    for mesh in (None, "auto", "tensor=1"):
        with pytest.raises(TopologyError, match="there are no devices"):
            Placement.of(CONFIG, mesh=mesh, devices=[])


def test_sequences_are_split_over_two_devices_or_more() -> None:
    for mesh in (None, "auto"):
        with pytest.raises(ConfigError, match="--dp-attention .* one device has no mesh; leave it"):
            Placement.of(CONFIG, mesh=mesh, dp_attention=True, devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"one device here \(data=1,expert=1,tensor=2\); leave"):
        Placement.of(CONFIG, mesh="tensor=2", dp_attention=True)
    layout = Placement.of(CONFIG, mesh="expert=2", dp_attention=True).layout
    assert layout is not None and layout.rules.B == ("data", "expert")


def devices_as(*shape: int, names: tuple[str, ...], kind: AxisType = AxisType.Auto) -> Mesh:
    devices = np.asarray(jax.devices()[:2]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (5, "the mesh is a int; make it with mixtral_jax.make_mesh"),
        (devices_as(2, names=("x",)), r"the mesh has the axes \('x',\), not \('data', 'expert'"),
        (devices_as(1, 1, 2, names=MESH_AXES[:3]), "'tensor'\\), not .*; make it with"),
        (devices_as(1, 1, 2, 1, names=MESH_AXES, kind=AxisType.Explicit), "not Auto; make it"),
    ],
)
def test_a_mesh_of_other_axes_is_refused(
    mesh: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=message):
        Placement.of(CONFIG, mesh=mesh)


def test_the_page_follows_the_platform() -> None:
    pages = {platform: kernels_for(platform).page_size for platform in ("cpu", "gpu", "tpu")}
    assert pages == {"cpu": 16, "gpu": 64, "tpu": 128}


def test_dtypes_that_models_do_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="dtype 'float16' is not supported; use float32"):
        Placement.of(CONFIG, "float16", mesh=None)


def test_a_dtype_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match="a dtype must be given; use float32 or bfloat16 or int8"):
        Placement.of(CONFIG, None, mesh=None)


def test_dtypes_of_keys_and_values() -> None:
    placement = Placement.of(CONFIG, mesh=None)
    assert placement.checked_kv_dtype(None, CONFIG) == "float32"
    for given in ("fp8", jnp.float8_e4m3fn):
        assert placement.checked_kv_dtype(given, CONFIG) == "float8_e4m3fn"
    for given in ("int8", jnp.int8):
        assert placement.checked_kv_dtype(given, CONFIG) == "int8"
    with pytest.raises(
        ConfigError, match="'' are not supported .* on cpu; use float32 or fp8 or int8"
    ):
        placement.checked_kv_dtype("", CONFIG)


def test_a_tpu_takes_small_numbers_of_heads_of_128() -> None:
    """Mistral 7B: 8 heads of 128; a page of 128 tokens is 128 x 16 x 128 bytes and, for int8, an
    tile of eight rows more in each of its four words."""
    placement = replace(Placement.of(CONFIG, mesh=None), kernels=kernels_for("tpu"))
    model = ModelConfig.mistral_7b_v01()
    sizes = {
        dtype: placement.page_form(model, 128, dtype).nbytes for dtype in ("int8", "float8_e4m3fn")
    }
    assert sizes == {"int8": 136 * 16 * 128, "float8_e4m3fn": 128 * 16 * 128}
    assert placement.checked_kv_dtype("int8", model) == "int8"
    heads = rf"of 128 values and .* these are {CONFIG.num_kv_heads} of {CONFIG.head_size}"
    for dtype in ("int8", "fp8"):
        with pytest.raises(ConfigError, match=heads):
            placement.checked_kv_dtype(dtype, CONFIG)
