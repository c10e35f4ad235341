"""Tokens travel to the experts that they chose, and back: for many tokens on each device.

Where both tokens and experts are split over one mesh axis of n devices, every device could gather
all tokens (`moe.moe_local`): a row then moves n - 1 times. Here it moves only to the devices that
hold one of its X experts, at most X times each way, whatever n is. No token is dropped: each device
has room for all tokens of all others, of which a grouped product computes those that came.

    sent      a device's rows, by destination, in the order of its tokens
    received  n blocks of room for T rows, one for each sender
    returned  the partial sums, on the same way back, where they are added up

The choices of all devices are small and gathered first. Sizes and offsets follow from them on every
device, so none need to be exchanged.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from mixtral_jax.axes import Choice, ChoiceWeights, FlatHidden, FlatTokens
from mixtral_jax.kernels import Kernels

AXIS = "expert"


class Dispatched(NamedTuple):
    """The tokens that came to a device, and what `combine` needs to send their sums back.

    Of n devices with T tokens each.
    """

    rows: jax.Array  # [n*T D], a block of T for each sender, filled from its start
    choice: Choice  # [n*T X], experts of this device; the number it holds where none is meant
    weights: ChoiceWeights  # [n*T X]
    source: jax.Array  # [T*min(X, n)] i32: of each row that was sent, its token here
    is_sent: jax.Array  # [T*min(X, n)] bool: whether such a row was sent at all
    sizes: jax.Array  # [n n] i32: rows by sender and destination
    starts: jax.Array  # [n n] i32: where a sender's rows for a destination begin
    slots: jax.Array | None = None  # [n*T] i32: of the rows; None if no row has an adapter


def dispatch(
    x: FlatHidden,
    choice: Choice,
    weights: ChoiceWeights,
    held: int,
    devices: int,
    kernels: Kernels,
    slots: FlatTokens | None = None,
) -> Dispatched:
    """Sends this device's tokens [T D] to the devices of their experts; in a `shard_map`.

    Args:
        x: this device's tokens [T D].
        choice: experts of each of them [T X].
        weights: of these [T X].
        held: number of experts of each device, which are in order.
        devices: size n of the mesh axis.
        kernels: its `move_rows` moves them.
        slots: of the adapters of these tokens [T]; None if none has an adapter.
    """
    tokens, picks = choice.shape
    me = jax.lax.axis_index(AXIS)
    choices = jax.lax.all_gather(choice, AXIS)  # [n T X], by sender
    goes = _destinations(choices, held, devices)  # [n T n]
    sizes = jnp.sum(goes, axis=1, dtype=jnp.int32)  # [n n], by sender and destination
    starts = jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes

    # This device's rows as (destination, token) pairs, as far as there are any.
    num_pairs = tokens * min(picks, devices)
    (pairs,) = jnp.nonzero(goes[me].T.reshape(-1), size=num_pairs, fill_value=tokens * devices)
    source = (pairs % tokens).astype(jnp.int32)
    blocks = jnp.full(devices, me * tokens, jnp.int32)
    room = jnp.zeros((devices * tokens, x.shape[1]), x.dtype)
    rows = kernels.move_rows(x[source], room, starts[me], sizes[me], blocks, sizes[:, me], AXIS)

    # The rows that come: each sender's in the order of its tokens, then unused room.
    to_me = goes[:, :, me]
    order = jnp.argsort(~to_me, axis=1, stable=True)[:, :, None]
    is_used = jnp.arange(tokens, dtype=jnp.int32)[None] < sizes[:, me, None]
    chosen = jnp.take_along_axis(choices, order, axis=1) - held * me
    is_mine = is_used[:, :, None] & (chosen >= 0) & (chosen < held)
    all_weights = jax.lax.all_gather(weights, AXIS)
    return Dispatched(
        rows=rows,
        choice=jnp.where(is_mine, chosen, held).reshape(-1, picks),
        weights=jnp.take_along_axis(all_weights, order, axis=1).reshape(-1, picks),
        source=source,
        is_sent=pairs < tokens * devices,
        sizes=sizes,
        starts=starts,
        slots=slots if slots is None else _arrived(slots, order[:, :, 0]),
    )


def _arrived(slots: FlatTokens, order: jax.Array) -> jax.Array:
    """The slots [n*T] of the rows that come, in the order of each sender's tokens [n T]."""
    return jnp.take_along_axis(jax.lax.all_gather(slots, AXIS), order, axis=1).reshape(-1)


def combine(sums: jax.Array, dispatched: Dispatched, kernels: Kernels) -> FlatHidden:
    """Sends the sums of the rows that came [n*T D] back, and adds them up by token: [T D]."""
    me = jax.lax.axis_index(AXIS)
    sizes, starts = dispatched.sizes, dispatched.starts
    devices = len(sizes)
    tokens = len(sums) // devices
    blocks = jnp.arange(devices, dtype=jnp.int32) * tokens
    room = jnp.zeros((len(dispatched.source), sums.shape[1]), sums.dtype)
    returned = kernels.move_rows(sums, room, blocks, sizes[:, me], starts[:, me], sizes[me], AXIS)
    zero = jnp.zeros((), returned.dtype)
    returned = jnp.where(dispatched.is_sent[:, None], returned, zero)
    own = jnp.zeros((tokens, sums.shape[1]), sums.dtype)
    return own.at[dispatched.source].add(returned)


def _destinations(choices: jax.Array, held: int, devices: int) -> Bool[jax.Array, "n T n"]:
    """The devices that each token goes to."""
    owner = choices // held
    return jnp.any(jax.nn.one_hot(owner, devices, dtype=jnp.bool_), axis=2)
