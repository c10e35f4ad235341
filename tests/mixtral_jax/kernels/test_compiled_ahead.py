"""The kernels of an accelerator as the model calls them: what they mean, and that they are built.

Meaning: JAX's own reference of the TPU attention kernel against our XLA form; the kernel itself is
not interpreted, as JAX cannot. Built: compiled ahead of time for hardware that is not there, at the
shapes that one device has of the full-size models, in a process of its own: compilers read the
environment when they are loaded.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixtral_jax.cache import RaggedBatch
from mixtral_jax.config import ModelConfig
from mixtral_jax.generation import steps_for
from mixtral_jax.kernels import kernels_for_device
from mixtral_jax.kernels.xla.attention import paged_attention
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement
from mixtral_jax.planning.topology import environment, installed, target_devices
from mixtral_jax.roofline.chips import topologies
from mixtral_jax.step.whole_step import Kind
from mixtral_jax.weight import GROUP_SIZE, QUANTIZED, Weight

# Query heads, key/value heads, window; of one device.
HEADS = {
    "7B alone": (32, 8, 4096),
    "7B or 8x7B in eighths": (4, 1, None),
    "8x22B in eighths": (6, 1, None),
}
# Experts, inputs, outputs; of one device.
EXPERTS = {
    "8x7B one of eight": (1, 4096, 14336),
    "8x7B in eighths": (8, 1792, 4096),
    "8x22B one of eight": (1, 16384, 6144),
}
# As programs name them, by what runs them.
ATTENTION = {
    "tpu": ["ragged_paged_attention_kernel"],
    "gpu": ["paged_decode", "paged_prefill"],
}
PRODUCT = {
    "tpu": {"bfloat16": ["grouped_floats"], "int8": ["grouped_int8"], "int4": ["int4_product"]},
    "gpu": dict.fromkeys(("bfloat16", "int8", "fp8"), ["grouped_product"])
    | {"int4": ["int4_product"]},
}
# Of small keys and values; on TPU in pages of a form of their own.
SMALL = {"int8": "word_paged_attention", "float8_e4m3fn": "ragged_paged_attention_kernel"}
KERNELS = [
    SMALL["int8"],
    *ATTENTION["tpu"],
    *ATTENTION["gpu"],
    "grouped_floats",
    "grouped_int8",
    "grouped_product",
    "int4_product",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "window", "dtype"),
    [
        ((4, 2), 5, jnp.float32),
        pytest.param((6, 1), None, jnp.float32, marks=pytest.mark.soak),
        ((4, 2), 5, jnp.float8_e4m3fn),
    ],
)
def test_attention_means_what_the_tpu_kernel_means(
    heads: tuple[int, int], window: int | None, dtype: Any
) -> None:
    """Two decodes, a prompt's first chunk and a later one; unused places at the end."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    (num_heads, kv_heads), size, page_size, used = heads, 32, 4, 2 + 7 + 5
    lengths = jnp.asarray([5, 16, 7, 13, 0], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    batch = RaggedBatch(
        tokens=jnp.zeros(16, jnp.int32),
        positions=jnp.asarray([4, 15, *range(7), *range(8, 13), 0, 0], jnp.int32),
        lengths=lengths,
        query_starts=jnp.asarray([0, 1, 2, 9, 14, 14], jnp.int32),
        page_table=jax.random.permutation(keys[0], 20).reshape(5, 4).astype(jnp.int32),
        num_decodes=jnp.asarray(2, jnp.int32),
        num_sequences=jnp.asarray(4, jnp.int32),
    )
    pages = jax.random.normal(keys[1], (20, page_size, 2 * kv_heads, size)).astype(dtype)
    scale = 1.0 if dtype == jnp.float8_e4m3fn else None
    q = jax.random.normal(keys[2], (16, num_heads, size))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = ref_ragged_paged_attention(
            q,
            pages,
            lengths,
            batch.page_table,
            batch.query_starts,
            batch.num_sequences[None],
            sm_scale=size**-0.5,
            sliding_window=window,
            k_scale=scale,
            v_scale=scale,
        )
    got = paged_attention(q, pages, batch, window)
    np.testing.assert_allclose(got[:used], want, rtol=0, atol=2e-6)


@pytest.mark.soak  # test_plan compiles the whole step for one of them
@pytest.mark.parametrize(
    "name",
    [
        *("tpu:v5e:2x4", "tpu:v5p:2x2x1", "tpu:v6e:2x4"),
        *("gpu:a100-80:8", "gpu:l4:8", "gpu:h100:8", "gpu:b200:8"),
    ],
)
def test_kernels_are_built_and_copy_nothing_large(name: str) -> None:
    (topology,) = topologies(name)
    if not installed(topology.platform):
        pytest.skip(f"no compiler for {topology.platform} is installed")
    done = subprocess.run(
        [sys.executable, __file__, name],
        env=environment(topology),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for heads in HEADS:
        for tokens in (32, 256):
            facts = found[f"{heads}, {tokens} tokens"]
            assert facts["kernels"] == ATTENTION[topology.platform]
            # Pages are written in place.
            assert facts["in_place"] >= facts["pages"]
            assert facts["temporaries"] < facts["pages"] / 8
    for dtype, kernel in SMALL.items():
        for heads, (_, kv_heads, _) in HEADS.items():
            facts = found[f"{heads}, pages of {dtype}"]
            if topology.platform == "tpu":
                # JAX's kernel takes no lone head of fp8.
                assert facts["kernels"] == [SMALL["int8"] if kv_heads == 1 else kernel]
            else:
                by_xla = dtype == "float8_e4m3fn" and "a100" in name
                assert facts["kernels"] == ([] if by_xla else ATTENTION["gpu"])
            assert facts["in_place"] >= facts["pages"]
            assert facts["temporaries"] < facts["pages"] / 2
    for experts in EXPERTS:
        for dtype, kernels in PRODUCT[topology.platform].items():
            if dtype == "fp8" and "a100" in name:
                continue  # by XLA, which widens all weights first
            facts = found[f"{experts} in {dtype}"]
            assert facts["kernels"] == kernels
            # The weights are read as they lie; rows that meet int4 are sorted by their inputs.
            sorted_rows = 2 * facts["rows"] if dtype == "int4" else 0
            assert facts["temporaries"] < facts["weights"] / 2 + sorted_rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tpu:v5e:1x1", "gpu:a100-80:1", "gpu:l4:1", "gpu:h100:1"])
@pytest.mark.parametrize(
    "dtype", [*(pytest.param(d, marks=pytest.mark.soak) for d in ("bfloat16", "int8")), "int4"]
)
def test_generate_calls_the_kernels_of_an_absent_device(name: str, dtype: str) -> None:
    """A single accelerator, and no mesh is named: what a notebook does."""
    (topology,) = topologies(name)
    if not installed(topology.platform):
        pytest.skip(f"no compiler for {topology.platform} is installed")
    done = subprocess.run(
        [sys.executable, __file__, name, dtype],
        env=environment(topology),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    calls = json.loads(done.stdout.splitlines()[-1])
    # One token's two experts of three are read by the kernel, as those of a prompt's chunk.
    for step in ("decode", "prompt"):
        assert set(calls[step]) >= {
            *ATTENTION[topology.platform][:1],
            *PRODUCT[topology.platform][dtype],
        }


def compile_generation(name: str, dtype: str) -> dict[str, list[str]]:
    """Compiles what `generate` runs, in the other process: the kernels that it calls."""
    (topology,) = topologies(name)
    config = replace(
        ModelConfig.tiny(vocab_size=256),
        hidden_size=512,
        num_heads=4,
        num_kv_heads=2,
        head_size=128,
        feed_forward_size=512,
        num_layers=1,
        max_context=1024,
    )
    placement = Placement.of(config, dtype, "auto", devices=target_devices(topology))
    model = Transformer(config, replace(placement, step_tokens=256), rngs=None)
    steps = steps_for(model, 1024)

    def calls(tokens: int) -> list[str]:
        assert steps.whole is not None, "a step on accelerators is one program"
        text = steps.whole.step(Kind(), tokens).as_text()
        assert text is not None and text.count("ENTRY ") == 1
        lines = "".join(line for line in text.splitlines() if "custom-call(" in line)
        return [kernel for kernel in KERNELS if kernel in lines]

    return {"decode": calls(1), "prompt": calls(256)}


def compile_all(name: str) -> dict[str, dict[str, Any]]:
    """In the other process: by what was compiled, what the compiler says of it."""
    (topology,) = topologies(name)
    device = target_devices(topology)[0]
    mesh = Mesh(np.array([device]), ("all",))
    whole = NamedSharding(mesh, PartitionSpec())
    bf16, i32 = jnp.bfloat16, jnp.int32
    kernels = kernels_for_device(device)

    def array(*shape: int, dtype: Any = bf16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def facts(function: Callable[..., Any], *given: Any, donate: tuple[int, ...] = ()) -> Any:
        # As in the serving step: kernels see one device's arrays.
        mapped = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        program: Any = jax.jit(mapped, donate_argnums=donate).lower(*given).compile()
        memory = program.memory_analysis()
        calls = "".join(line for line in program.as_text().splitlines() if "custom-call(" in line)
        return {
            "kernels": [kernel for kernel in KERNELS if kernel in calls],
            "in_place": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }

    found = {}
    size, sequences, width = 128, 32, 32

    def attention(heads: str, tokens: int, page_size: int, dtype: Any) -> Any:
        num_heads, kv_heads, window = HEADS[heads]
        page = kernels.page_form(page_size, kv_heads, size, dtype)
        pages = array(sequences * width + 1, *page.shape, dtype=page.dtype)

        def attend(q: Any, k: Any, v: Any, pages: Any, *batch: Any) -> Any:
            return kernels.attend(q, k, v, pages, RaggedBatch(*batch), window)

        return facts(
            attend,
            array(tokens, num_heads, size),
            array(tokens, kv_heads, size),
            array(tokens, kv_heads, size),
            pages,
            array(tokens, dtype=i32),
            array(tokens, dtype=i32),
            array(sequences, dtype=i32),
            array(sequences + 1, dtype=i32),
            array(sequences, width, dtype=i32),
            array(dtype=i32),
            array(dtype=i32),
            donate=(3,),
        ) | {"pages": pages.shape[0] * page.nbytes}

    for heads in HEADS:
        for tokens in (32, 256):
            found[f"{heads}, {tokens} tokens"] = attention(heads, tokens, 64, bf16)
        for dtype in SMALL:
            found[f"{heads}, pages of {dtype}"] = attention(
                heads, 256, 128 if topology.platform == "tpu" else 64, dtype
            )
    for experts, (held, inputs, outputs) in EXPERTS.items():

        def product(x: Any, sizes: Any, *arrays: Any) -> Any:
            return kernels.grouped(x, sizes, Weight(*arrays))

        given = array(512, inputs), array(held, dtype=i32)
        weights = held, outputs, inputs
        for dtype, arrays in {
            "bfloat16": (array(*weights), None),
            **{
                name: (
                    array(*weights, dtype=QUANTIZED[name]),
                    array(held, outputs, dtype=jnp.float32),
                )
                for name in ("int8", "fp8")
            },
            "int4": (
                array(held, outputs, inputs // 2, dtype=QUANTIZED["int4"]),
                array(held, outputs, inputs // GROUP_SIZE, 2, dtype=jnp.float16),
            ),
        }.items():
            if dtype not in PRODUCT[topology.platform]:
                continue
            found[f"{experts} in {dtype}"] = facts(product, *given, *arrays) | {
                "weights": math.prod(arrays[0].shape) * arrays[0].dtype.itemsize,
                "rows": 2 * math.prod(given[0].shape),
            }
    return found


if __name__ == "__main__":
    work = compile_generation if len(sys.argv) > 2 else compile_all
    print(json.dumps(work(*sys.argv[1:])))
