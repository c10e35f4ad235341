"""Inputs of one step in two rows of int32, as a program of a whole step takes them.

Each array of the host that a program is given costs a transfer to every device. So everything is
laid out in a row, floats as their bits, and the program takes it apart:

    common  the parameters by which rows draw, then the batch
    rare    tokens of the rows' histories, and biases: wide, and none in most steps, for which the
            devices keep a blank row
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.step.inputs import StepInputs
from mixtral_jax.step.sampling import SamplingArrays


class PackedLayout(NamedTuple):
    """Shapes of one bucket's inputs, by which they are laid out and taken apart.

    Attributes:
        like: inputs of the bucket.
    """

    like: StepInputs

    def pack(self, inputs: StepInputs) -> np.ndarray:
        """Lays out the common arrays."""
        return _row([_drawing(inputs.sampling), _walking(inputs)])

    def pack_drawing(self, inputs: StepInputs) -> np.ndarray:
        """Lays out the beginning of the common arrays, which `unpack_sampling` reads."""
        return _row(_drawing(inputs.sampling))

    def pack_rare(self, inputs: StepInputs) -> np.ndarray:
        """Lays out the arrays that most steps do not need."""
        return _row(_rare(inputs.sampling))

    @property
    def num_drawing(self) -> int:
        """Number of the first places of `common` that `unpack_sampling` reads."""
        leaves = jax.tree.leaves(_drawing(self.like.sampling))
        return sum(int(np.size(leaf)) for leaf in leaves)

    def unpack(self, common: jax.Array, rare: jax.Array) -> StepInputs:
        """Takes both rows apart, in a program."""
        sampling = self.unpack_sampling(common, rare)
        batch, follows, last, slots = _taken(common[self.num_drawing :], _walking(self.like))
        return StepInputs(batch, follows, last, sampling, slots)

    def unpack_sampling(self, drawing: jax.Array, rare: jax.Array) -> SamplingArrays:
        """Takes the part apart by which rows draw: the beginning of `common`, and `rare`.

        The last token of each row's history is known on the device alone, and NO_ID here.
        """
        like = self.like.sampling
        numbers, prompt_length = _taken(drawing, _drawing(like))
        tokens, biases = _taken(rare, _rare(like))
        history = like.history._replace(tokens=tokens, prompt_length=prompt_length)
        return like._replace(**numbers, history=history, biases=biases)


def _drawing(sampling: SamplingArrays) -> Any:
    wide = ("history", "biases")
    numbers = {name: array for name, array in sampling._asdict().items() if name not in wide}
    return numbers, sampling.history.prompt_length


def _walking(inputs: StepInputs) -> Any:
    return inputs.batch, inputs.follows, inputs.last, inputs.slots


def _rare(sampling: SamplingArrays) -> Any:
    return sampling.history.tokens, sampling.biases


def _row(arrays: Any) -> np.ndarray:
    leaves = [np.asarray(leaf).reshape(-1).view(np.int32) for leaf in jax.tree.leaves(arrays)]
    return np.concatenate(leaves)


def _taken(row: jax.Array, like: Any) -> Any:
    leaves, tree = jax.tree.flatten(like)
    taken, place = [], 0
    for leaf in leaves:
        end = place + leaf.size
        array = jax.lax.bitcast_convert_type(row[place:end], leaf.dtype)
        taken.append(jnp.reshape(array, leaf.shape))
        place = end
    return jax.tree.unflatten(tree, taken)
