"""The products of weights in groups as a loop in numpy, each operation of float32 rounded alone."""

import numpy as np

from mixtral_jax.weight import Weight, unpacked


def by_loops(x: np.ndarray, weight: Weight) -> np.ndarray:
    """`product` for a weight of int4 or int8x16."""
    values = unpacked(weight.values) if weight.is_int4 else weight.values
    return product(np.asarray(x), np.asarray(values), np.asarray(weight.scale))


def product(x: np.ndarray, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows f32 [R I], rounded to int8 group by group, by whole numbers [O I]: f32 [R O].

    Args:
        x: the rows.
        values: those of a weight.
        scales: of each group [O G], or with minima [O G 2].
    """
    num_groups = scales.shape[1]
    scales = scales.astype(np.float32)
    groups = x.reshape(len(x), num_groups, -1)
    row_scale = np.max(np.abs(groups), axis=2) / np.float32(127)
    rows = np.rint(groups * (np.float32(1) / row_scale)[:, :, None]).astype(np.int32)
    weights = values.reshape(len(values), num_groups, -1).astype(np.int32)
    total = np.zeros((len(x), len(values)), np.float32)
    for group in range(num_groups):
        row, of_group = rows[:, group], scales[:, group]
        dots = (row @ weights[:, group].T).astype(np.float32)
        if scales.ndim == 2:
            added = dots * of_group
        else:
            sums = row.sum(axis=1).astype(np.float32)[:, None]
            added = dots * of_group[:, 0] + sums * of_group[:, 1]
        total += added * row_scale[:, group, None]
    return total
