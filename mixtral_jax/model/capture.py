"""Capture: intermediate values of a layer, recorded while it runs.

Layers record by these names; B rows, T tokens, M = B*T*X pairs of a token and one of its experts:

    block.in            [B T D]      inputs of the layer
    block.out           [B T D]      what it gives
    attention.qkv       [B T D]      inputs of the products with q, k and v
    attention.q         [B T N H]    queries, rotated
    attention.k         [B T K H]    keys, rotated
    attention.o         [B T N H]    inputs of the product with o
    feed_forward.in     [*R D]       inputs of the router, gate and up
    feed_forward.down   [*R F]       inputs of down; [M F] in a mixture, sorted by expert
    feed_forward.sizes  [E] i32      rows of each expert in feed_forward.down
    router.logits       [B*T E]      what the router gives each expert
    router.choice       [B*T X] i32  the experts of each token
    router.weights      [B*T X] f32  and what each weighs in the sum

That is the full form; the paged one records router.choice alone, [T X] of a step's flat row.
"""

from collections.abc import Collection

import jax


class Capture:
    """Keeps the values whose names are asked for, and lets all others pass.

        capture = Capture({"router.weights"})
        x = block.full(x, rotary, capture)
        capture.values["router.weights"]

    One capture is for one layer: a second one would overwrite its values. Within `jax.jit`, make it
    inside the function and return its values.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self.names = frozenset(names)
        self.values: dict[str, jax.Array] = {}

    def record(self, name: str, value: jax.Array) -> None:
        """Keeps `value` if `name` was asked for."""
        if name in self.names:
            self.values[name] = value


NOTHING = Capture()
