"""Facts: what a run is made of, by which a run with another base is refused."""

import hashlib

import numpy as np

from mixtral_jax.model.transformer import Transformer, named_parameters

_VALUES = 16  # of each weight
_OTHER_LAYERS = "layers."
_FIRST_LAYER = "layers.0."


def weights_digest(model: Transformer) -> str:
    """Returns a digest of the first values of each weight around the layers and of the first layer.

    It tells bases apart that were trained or rounded otherwise, and reads a few bytes.
    """
    digest = hashlib.sha256()
    for name, variable in sorted(named_parameters(model).items()):
        if name.startswith(_OTHER_LAYERS) and not name.startswith(_FIRST_LAYER):
            continue
        array = variable.get_value()
        corner = tuple(slice(1) for _ in array.shape[:-1])
        values = np.asarray(array[(*corner, slice(_VALUES))]).astype(np.float32)
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()[:16]
