"""Tokens travel to the experts that they chose, and back: for many tokens on each device.

Where both tokens and experts are split over one mesh axis of n devices, every device could gather
all tokens (`moe.moe_local`): a row then moves n - 1 times. Here it moves only to the devices that
hold one of its X experts, at most X times each way, whatever n is. No token is dropped: each device
has room for all tokens of all others, of which a grouped product computes those that came.

    sent      a device's rows, by destination, in the order of its tokens
    received  n blocks of room for T rows, one for each sender
    returned  the partial sums, on the same way back, where they are added up

Who sends what is a function of everybody's choices, which are small and gathered first; so no
offsets need to be exchanged.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Bool

from mixtral_jax.axes import Choice, ChoiceWeights, FlatHidden

AXIS = "expert"
# Larger slices of such chips lack links that ragged_all_to_all wants: the compiler refuses it.
_LIMITED = ("TPU v5 lite", 16)


def is_possible(mesh: Mesh) -> bool:
    """Whether the mesh's devices can exchange rows so."""
    kind, most = _LIMITED
    return mesh.devices.flat[0].device_kind != kind or mesh.size <= most


class Exchange:
    """The journeys of one device's tokens, and of those that come to it; in a `shard_map`.

    Args:
        choice: experts of each of this device's tokens [T X].
        weights: of these [T X].
        held: experts of each device, which are in order.
        devices: size of the mesh axis.
        platform: of the devices; CPU lacks the primitive and takes `exchanged`.
    """

    def __init__(
        self, choice: Choice, weights: ChoiceWeights, held: int, devices: int, platform: str
    ) -> None:
        tokens, picks = choice.shape
        self._tokens, self._devices, self._platform = tokens, devices, platform
        me = jax.lax.axis_index(AXIS)
        choices = jax.lax.all_gather(choice, AXIS)  # [n T X], by sender
        goes = _destinations(choices, held, devices)  # [n T n]
        sizes = jnp.sum(goes, axis=1, dtype=jnp.int32)  # [n n], by sender and destination
        starts = jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes
        self._sizes, self._starts, self._me = sizes, starts, me

        # Of this device's rows: (destination, token) pairs, as far as there are any.
        most = tokens * min(picks, devices)
        (pairs,) = jnp.nonzero(goes[me].T.reshape(-1), size=most, fill_value=tokens * devices)
        self._is_sent = pairs < tokens * devices
        self._row = (pairs % tokens).astype(jnp.int32)

        # Of the rows that come: each sender's in the order of its tokens, then unused room.
        to_me = goes[:, :, me]
        order = jnp.argsort(~to_me, axis=1, stable=True)[:, :, None]
        is_used = jnp.arange(tokens, dtype=jnp.int32)[None] < sizes[:, me, None]
        chosen = jnp.take_along_axis(choices, order, axis=1) - held * me
        is_mine = is_used[:, :, None] & (chosen >= 0) & (chosen < held)
        all_weights = jax.lax.all_gather(weights, AXIS)
        self.choice = jnp.where(is_mine, chosen, held).reshape(-1, picks)
        self.weights = jnp.take_along_axis(all_weights, order, axis=1).reshape(-1, picks)

    def send(self, x: FlatHidden) -> jax.Array:
        """This device's tokens [T D] -> those that come to it [n*T D], as `choice` says."""
        blocks = jnp.full(self._devices, self._me * self._tokens, jnp.int32)
        room = jnp.zeros((self._devices * self._tokens, x.shape[1]), x.dtype)
        me = self._me
        return self._move(
            x[self._row], room, self._starts[me], self._sizes[me], blocks, self._sizes[:, me]
        )

    def give_back(self, sums: FlatHidden) -> jax.Array:
        """Sums of the rows that came [n*T D] -> sums of this device's own tokens [T D]."""
        blocks = jnp.arange(self._devices, dtype=jnp.int32) * self._tokens
        room = jnp.zeros((len(self._row), sums.shape[1]), sums.dtype)
        me = self._me
        back = self._move(
            sums, room, blocks, self._sizes[:, me], self._starts[:, me], self._sizes[me]
        )
        back = jnp.where(self._is_sent[:, None], back, jnp.zeros((), back.dtype))
        own = jnp.zeros((self._tokens, sums.shape[1]), sums.dtype)
        return own.at[self._row].add(back)

    def _move(
        self,
        rows: jax.Array,
        room: jax.Array,
        starts: jax.Array,
        sizes: jax.Array,
        places: jax.Array,
        comes: jax.Array,
    ) -> jax.Array:
        if self._platform == "cpu":
            return exchanged(rows, room, starts, sizes, places, AXIS)
        moved: jax.Array = jax.lax.ragged_all_to_all(
            rows, room, starts, sizes, places, comes, axis_name=AXIS
        )
        return moved


def _destinations(choices: jax.Array, held: int, devices: int) -> Bool[jax.Array, "n T n"]:
    """Which devices each token goes to."""
    owner = choices // held
    return jnp.any(jax.nn.one_hot(owner, devices, dtype=jnp.bool_), axis=2)


def exchanged(
    rows: jax.Array,
    room: jax.Array,
    starts: jax.Array,
    sizes: jax.Array,
    places: jax.Array,
    axis: str,
) -> jax.Array:
    """What jax.lax.ragged_all_to_all gives, by gathering everything: its oracle, and for CPU.

    `rows[starts[d] : starts[d] + sizes[d]]` goes to device d, to its `room[places[d] : ...]`.
    """
    me = jax.lax.axis_index(axis)
    place = jnp.arange(room.shape[0], dtype=jnp.int32)
    everybody = [jax.lax.all_gather(part, axis) for part in (rows, starts, sizes, places)]
    for sent, start, size, first in zip(*everybody, strict=True):
        offset = place - first[me]
        is_here = (offset >= 0) & (offset < size[me])
        source = jnp.clip(start[me] + offset, 0, rows.shape[0] - 1)
        room = jnp.where(is_here[:, None], sent[source], room)
    return room
