"""Kernels for TPU, from JAX's own collection, in the forms that the serving step needs.

Each has an equal XLA form beside it (attention.py, moe.py), which is taken where a kernel's limits
are not met. Sizes of blocks are always given: left out, the kernels would ask the default device,
which is another one where programs are compiled for hardware that is elsewhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax import cache
from mixtral_jax.axes import FlatKeys, FlatQueries, Pages, RowKeys, RowQueries
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.model.layers import Scaled, quantize_rows

_KEYS_PER_BLOCK = 512
_QUERIES_PER_BLOCK = 64
_VMEM = 64 << 20  # of 128 MiB, which v5e, v5p and v6e have
_LANES = 128


def fits_attention(pages: Pages) -> bool:
    """Whether the kernel takes such pages: heads fill whole tiles."""
    packed = pages.shape[2] * pages.dtype.itemsize // 4
    is_tiled = packed in (1, 2, 4) or (packed > 0 and packed % 8 == 0)
    floats = pages.dtype in (jnp.bfloat16, jnp.float32)
    return floats and is_tiled and pages.shape[3] % _LANES == 0


def write_and_attend(
    q: FlatQueries,
    k: FlatKeys,
    v: FlatKeys,
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
) -> tuple[FlatQueries, Pages]:
    """`cache.write`, then ragged paged attention.

    Its window counts the query itself, as Mistral's does.
    """
    # Imported where it is used: it takes a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    pages = cache.write(pages, k, v, batch)
    page_size, table_width = pages.shape[1], batch.page_table.shape[1]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mixed: jax.Array = ragged_paged_attention(
            q,
            pages,
            batch.lengths,
            batch.page_table,
            batch.query_starts,
            batch.num_sequences[None],
            sm_scale=q.shape[-1] ** -0.5,
            sliding_window=window,
            num_kv_pages_per_block=min(table_width, max(1, _KEYS_PER_BLOCK // page_size)),
            num_queries_per_block=min(q.shape[0], _QUERIES_PER_BLOCK),
            vmem_limit_bytes=_VMEM,
        )
    return mixed, pages


def fits_full(q: RowQueries) -> bool:
    """Whether the kernel takes such sequences [B T N H]: whole tiles."""
    return q.shape[1] % _LANES == 0 == q.shape[3] % _LANES


def full_attention(
    q: RowQueries, k: RowKeys, v: RowKeys, window: int | None, *, interpret: bool = False
) -> RowQueries:
    """Causal attention within each row by splash attention, which has gradients too: XLA's form
    keeps all scores, T x T of every head."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        LocalMask,
        MultiHeadMask,
        make_splash_mha,
    )

    length = q.shape[1]
    square = (length, length)
    # Its window counts the keys before the query, Mistral's includes the query itself.
    mask = CausalMask(square) if window is None else LocalMask(square, (window - 1, 0), 0)
    size = _tile(length, 512)
    sizes = BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    attend = make_splash_mha(
        MultiHeadMask([mask] * q.shape[2]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mixed: jax.Array = jax.vmap(attend)(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
    return jnp.swapaxes(mixed, 1, 2)


def fits_grouped(x: jax.Array, weight: Scaled) -> bool:
    """Whether a kernel takes such rows and weights: whole tiles."""
    outputs, inputs = weight.values.shape[1:]
    return outputs % _LANES == 0 == inputs % _LANES


def grouped(
    x: jax.Array, sizes: jax.Array, weight: Scaled, *, interpret: bool = False
) -> jax.Array:
    """`moe.grouped_xla`, which would transpose the weights [E O I] in every step.

    Floats by megablox, int8 by a kernel of the same walk over tiles.
    """
    padded = jnp.pad(x, ((0, -x.shape[0] % _LANES), (0, 0)))
    _, outputs, inputs = weight.values.shape
    tiles = _Tiles(_tile(padded.shape[0], 512), _tile(inputs, 1024), _tile(outputs, 1024))
    sizes = sizes.astype(jnp.int32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        product = _grouped_floats if weight.scale is None else _grouped_int8
        total = product(padded, sizes, weight, tiles, interpret)
    return total[: x.shape[0]].astype(x.dtype)


class _Tiles(NamedTuple):
    rows: int
    inputs: int
    outputs: int


def _tile(size: int, most: int) -> int:
    """The largest that divides evenly."""
    return next(tile for tile in range(most, 0, -_LANES) if size % tile == 0)


def _grouped_floats(
    x: jax.Array, sizes: jax.Array, weight: Scaled, tiles: _Tiles, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    total: jax.Array = gmm(
        x,
        weight.values,
        sizes,
        preferred_element_type=x.dtype,  # each tile is summed up in float32
        tiling=tiles,
        transpose_rhs=True,
        interpret=interpret,
    )
    return total


def _grouped_int8(
    x: jax.Array, sizes: jax.Array, weight: Scaled, tiles: _Tiles, interpret: bool
) -> jax.Array:
    """Megablox's order of tiles: a tile of rows that several experts share is visited by each of
    them in turn and stays in near memory meanwhile."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

    assert weight.scale is not None
    rows, x_scale = quantize_rows(x)
    experts, outputs, inputs = weight.values.shape
    steps = inputs // tiles.inputs
    # Row where each group starts; expert and tile of rows of each visit.
    walk, num_visits = make_group_metadata(
        group_sizes=sizes,
        m=rows.shape[0],
        tm=tiles.rows,
        start_group=jnp.zeros((), jnp.int32),
        num_nonzero_groups=experts,
        visit_empty_groups=False,
    )

    def kernel(walk, x, x_scale, weight, scale, out, total):  # type: ignore[no-untyped-def]
        starts, expert_of, tile_of = walk
        visit, step = pl.program_id(1), pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        total[...] += jax.lax.dot_general(
            x[...], weight[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )

        @pl.when(step == steps - 1)
        def _() -> None:
            expert = expert_of[visit]
            place = jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
            place += tile_of[visit] * tiles.rows
            is_mine = (place >= starts[expert]) & (place < starts[expert + 1])
            scaled = total[...].astype(jnp.float32) * (x_scale[...] * scale[...])
            out[...] = jnp.where(is_mine, scaled, out[...].astype(jnp.float32)).astype(out.dtype)

    mapped = {
        "x": lambda column, visit, step, walk: (walk[2][visit], step),
        "x_scale": lambda column, visit, step, walk: (walk[2][visit], 0),
        "weight": lambda column, visit, step, walk: (walk[1][visit], column, step),
        "scale": lambda column, visit, step, walk: (walk[1][visit], 0, column),
        "out": lambda column, visit, step, walk: (walk[2][visit], column),
    }
    total: jax.Array = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], outputs), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.inputs), mapped["x"]),
                pl.BlockSpec((tiles.rows, 1), mapped["x_scale"]),
                pl.BlockSpec((None, tiles.outputs, tiles.inputs), mapped["weight"]),
                pl.BlockSpec((None, 1, tiles.outputs), mapped["scale"]),
            ],
            out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), mapped["out"]),
            grid=(outputs // tiles.outputs, num_visits, steps),
            scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.outputs), jnp.int32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="grouped_int8",
    )(walk, rows, x_scale[:, None], weight.values, weight.scale[:, None])
    return total
