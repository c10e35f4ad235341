"""Products of rows in groups on GPU, in Pallas by way of Triton."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import Weight, round_rows

_ROWS, _OUTPUTS, _INPUTS = 64, 128, 64  # of a tile


def _fits(weight: Weight) -> bool:
    """Says whether the kernel takes such weights: whole tiles."""
    outputs, inputs = weight.values.shape[1:]
    return outputs % _OUTPUTS == 0 == inputs % _INPUTS


def grouped(
    x: Float[jax.Array, "M I"],
    sizes: Int[jax.Array, " E"],
    weight: Weight,
    *,
    interpret: bool = False,
) -> Float[jax.Array, "M O"]:
    """`xla.grouped`, which computes every expert for every row on NVIDIA: x [M I] -> [M O]."""
    if not _fits(weight):
        return xla.grouped(x, sizes, weight)
    rows, experts = x.shape[0], sizes.shape[0]
    outputs = weight.values.shape[1]
    dtype = x.dtype
    scales: tuple[jax.Array, ...] = ()  # of rows, and of outputs by expert
    if weight.scale is not None:
        x, x_scale = round_rows(x)
        scales = (x_scale, weight.scale)
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    # Each group takes whole tiles of rows; the last one of it reaches into the next group, whose
    # rows it does not write.
    tiles = -(-sizes.astype(jnp.int32) // _ROWS)
    last_tile = jnp.cumsum(tiles)
    tile = jnp.arange(-(-rows // _ROWS) + experts, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(last_tile, tile, side="right"), experts - 1)
    expert = expert.astype(jnp.int32)
    first = (ends - sizes)[expert] + (tile - (last_tile - tiles)[expert]) * _ROWS
    out: jax.Array = pl.pallas_call(
        _grouped_tile,
        out_shape=jax.ShapeDtypeStruct((rows, outputs), dtype),
        grid=(len(tile), outputs // _OUTPUTS),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_product",
    )(x, weight.values, expert, first.astype(jnp.int32), ends[expert], *scales)
    return out


def _grouped_tile(x, weight, expert, first, end, *scales_and_out):  # type: ignore[no-untyped-def]
    *scales, out = scales_and_out
    tile, column = pl.program_id(0), pl.program_id(1)
    places = pl.ds(first[tile], _ROWS)
    is_mine = first[tile] + jnp.arange(_ROWS, dtype=jnp.int32) < end[tile]
    columns = pl.ds(column * _OUTPUTS, _OUTPUTS)
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def step(i, total):  # type: ignore[no-untyped-def]
        inputs = pl.ds(i * _INPUTS, _INPUTS)
        rows = plgpu.load(x.at[places, inputs], mask=is_mine[:, None], other=0)
        block = weight[expert[tile], columns, inputs]
        return total + jax.lax.dot_general(
            rows, block, (((1,), (1,)), ((), ())), preferred_element_type=kind
        )

    @pl.when(first[tile] < end[tile])
    def _() -> None:
        total = jnp.zeros((_ROWS, _OUTPUTS), kind)
        total = jax.lax.fori_loop(0, x.shape[1] // _INPUTS, step, total)
        if scales:
            x_scale, scale = scales
            of_row = plgpu.load(x_scale.at[places], mask=is_mine, other=0)
            of_column = scale[expert[tile], columns]
            total = total.astype(jnp.float32) * (of_row[:, None] * of_column[None, :])
        plgpu.store(out.at[places, columns], total.astype(out.dtype), mask=is_mine[:, None])


def router_input(x: jax.Array) -> jax.Array:
    """The rows that the router multiplies, kept apart from those that the experts multiply.

    Otherwise XLA makes one product of the router's and the first expert's, and copies the expert's
    weights in every step.
    """
    return jax.lax.optimization_barrier(x)
