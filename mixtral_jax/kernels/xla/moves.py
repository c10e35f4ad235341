"""Moves of rows between the devices of a mesh axis, inside a `shard_map`."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# Larger slices of such chips lack links that ragged_all_to_all wants: the compiler refuses it.
_LIMITED_KIND, _LIMITED_SIZE = "TPU v5 lite", 16


def move_rows(
    rows: jax.Array,
    room: jax.Array,
    starts: jax.Array,
    sizes: jax.Array,
    places: jax.Array,
    arriving: jax.Array,
    axis: str,
) -> jax.Array:
    """Sends runs of rows to the other devices of a mesh axis, by gathering everything.

    `rows[starts[d] : starts[d] + sizes[d]]` goes to device d, to its `room[places[d] : ...]`. The
    result is `room` with the rows that came; `arriving` [n] i32 says how many come from each
    device. It means what `jax.lax.ragged_all_to_all` means, which XLA:CPU lacks.
    """
    me = jax.lax.axis_index(axis)
    place = jnp.arange(room.shape[0], dtype=jnp.int32)
    gathered = [jax.lax.all_gather(array, axis) for array in (rows, starts, sizes, places)]
    for sent, start, size, first in zip(*gathered, strict=True):
        offset = place - first[me]
        is_here = (offset >= 0) & (offset < size[me])
        source = jnp.clip(start[me] + offset, 0, rows.shape[0] - 1)
        room = jnp.where(is_here[:, None], sent[source], room)
    return room


def can_move_rows(mesh: Mesh) -> bool:
    """Says that the devices of any mesh can gather."""
    return True


def move_rows_ragged(
    rows: jax.Array,
    room: jax.Array,
    starts: jax.Array,
    sizes: jax.Array,
    places: jax.Array,
    arriving: jax.Array,
    axis: str,
) -> jax.Array:
    """`move_rows` by the collective of accelerators: each row is sent to its device alone."""
    moved: jax.Array = jax.lax.ragged_all_to_all(
        rows, room, starts, sizes, places, arriving, axis_name=axis
    )
    return moved


def can_move_rows_ragged(mesh: Mesh) -> bool:
    """Says whether the compiler takes `move_rows_ragged` on this mesh."""
    return mesh.devices.flat[0].device_kind != _LIMITED_KIND or mesh.size <= _LIMITED_SIZE
