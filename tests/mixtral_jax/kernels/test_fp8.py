"""Products with fp8 weights: rows as they are, or rounded where a device multiplies fp8."""

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import kernels_for
from mixtral_jax.kernels.xla import products
from mixtral_jax.placement import Placement
from mixtral_jax.planning.topology import absent_devices, environment, installed
from mixtral_jax.roofline.chips import topologies
from mixtral_jax.weight import QUANTIZED, Weight, round_rows_fp8

WEIGHT = Weight(
    jnp.asarray([[1, -0.5, 2], [448, 0.25, 0]], QUANTIZED["fp8"]), jnp.asarray([2.0, 0.5])
)


def test_rows_are_rounded_to_three_bits_of_fraction() -> None:
    """The largest of a row becomes 448; 17 is halfway between 16 and 18 and goes to the even."""
    values, scale = round_rows_fp8(jnp.asarray([[448.0, 17, -19, 300, 2**-11], [0, 0, 0, 0, 0]]))
    np.testing.assert_array_equal(
        values.astype(jnp.float32), [[448, 16, -20, 288, 0], [0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(scale, [1, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_by_hand(dtype: str) -> None:
    """Widened weights meet the rows as they are: 17 stays 17."""
    x = jnp.asarray([[448, 17, 1]], dtype)
    wide = 2 * (448 - 8.5 + 2), 0.5 * (448 * 448 + 17 / 4)
    narrow = 2 * (448 - 8 + 2), 0.5 * (448 * 448 + 16 / 4)
    (have,) = products.linear(x, [WEIGHT])
    np.testing.assert_allclose(have.astype(jnp.float32)[0], wide, rtol=2**-8)
    np.testing.assert_array_equal(have[0], jnp.asarray(wide, dtype))
    (have,) = products.linear_in_fp8(x, [WEIGHT])
    np.testing.assert_array_equal(have[0], jnp.asarray(narrow, dtype))


def test_experts_are_their_own_products() -> None:
    x = jax.random.normal(jax.random.key(0), (9, 32))
    experts = Weight.quantized(jax.random.normal(jax.random.key(1), (3, 8, 32)), "fp8")
    assert experts.scale is not None
    have = products.grouped(x, jnp.asarray([4, 0, 3], jnp.int32), experts)
    for rows, expert in ((slice(0, 4), 0), (slice(4, 7), 2)):
        alone = Weight(experts.values[expert], experts.scale[expert])
        np.testing.assert_allclose(
            have[rows], products.product(x[rows], alone), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("linear", [products.linear, products.linear_in_fp8])
def test_the_gradient_passes_through_the_rounding(linear: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (4, 3))
    slope = jax.grad(lambda x: jnp.sum(linear(x, [WEIGHT])[0]))(x)
    wide = WEIGHT.values.astype(jnp.float32) * jnp.asarray([[2.0], [0.5]])
    np.testing.assert_allclose(slope, jnp.broadcast_to(wide.sum(axis=0), (4, 3)), rtol=1e-6)


def test_devices_that_multiply_fp8_round_the_rows() -> None:
    """Which is what `test_the_kit_for_devices_rounds_the_oracles_rows` sees of the numbers."""
    for platform in ("gpu", "tpu", "xla"):
        assert kernels_for(platform, multiplies_fp8=True).linear.__name__ == "linear_in_fp8"
        assert kernels_for(platform).linear.__name__ == "linear"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "multiplies", "copies"),
    [
        ("gpu:h100:1", True, False),
        ("gpu:a100-80:1", False, True),  # Triton has no fp8 below compute capability 8.9
        ("tpu:v5e:1x1", False, False),
        ("tpu:v6e:1x1", False, False),
    ],
)
def test_weights_are_read_as_they_lie(name: str, multiplies: bool, copies: bool) -> None:
    """Compiled for absent chips: no wide copy of the weights, and on H100 fp8 times fp8."""
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
    for tokens, facts in json.loads(done.stdout.splitlines()[-1]).items():
        assert facts["multiplies_fp8"] is multiplies, tokens
        assert (facts["temporaries"] >= facts["weights"]) is copies, tokens


def compile_products(name: str) -> dict[int, dict[str, Any]]:
    """In the other process: facts of 7B's product of gate, by the number of tokens."""
    (topology,) = topologies(name)
    device = absent_devices(topology)[0]
    config = ModelConfig.mistral_7b_instruct_v03()
    kernels = Placement.of(config, "fp8", None, devices=[device]).kernels
    sharding = SingleDeviceSharding(device)

    def array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    outputs, inputs = config.feed_forward_size, config.hidden_size
    weight = (
        array(outputs, inputs, dtype=QUANTIZED["fp8"]),
        array(outputs, dtype=jnp.float32),
    )
    found = {}
    for tokens in (32, 512):
        program: Any = (
            jax.jit(lambda x, *arrays: kernels.linear(x, [Weight(*arrays)]))
            .lower(array(tokens, inputs, dtype=jnp.bfloat16), *weight)
            .compile()
        )
        products = [part for part in program.as_text().split("\n\n") if " dot(" in part]
        found[tokens] = {
            "multiplies_fp8": any("bf16" not in part and "f8e4m3fn" in part for part in products),
            "temporaries": program.memory_analysis().temp_size_in_bytes,
            "weights": outputs * inputs,
        }
    return found


if __name__ == "__main__":
    print(json.dumps(compile_products(sys.argv[1])))
