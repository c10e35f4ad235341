"""The legend: one letter per axis, and the named array types built from them.

    B  rows of a batch                      N  query heads
    T  new tokens                           K  key/value heads
    S  sequences, or cached positions       G  query heads per key/value head (N = K * G)
    D  width of the model                   H  size of a head
    F  width of the feed-forward            E  experts
    X  experts chosen per token             V  vocabulary
    L  layers                               P  pages of the cache
    W  width of a page table                Y  tokens per page
    R  rows to draw from                    J  biased tokens of a row
    Q  experts as the router scores them: every device knows all of these scores
    U  rank of an adapter                   A  adapters that rows of one step may use
    Z  scale and minimum of a group of int4

The same letters name the dimensions of an array's type (`Float[Array, "B T D"]`), the terms of an
einsum, the tag of a parameter (`axes="EFD"`) and the sharding (`ShardingRules.spec("EFD")`).
A letter of its own for K and V of one page, interleaved: `C` (C = 2 * K).
"""

import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int, Int8, Int32

# Activations.
Tokens = Int[Array, "B T"]
Hidden = Float[Array, "*R D"]
RowHidden = Float[Array, "B T D"]
RowQueries = Float[Array, "B T N H"]
RowKeys = Float[Array, "B T K H"]
Segments = Int[Array, "B T"]  # documents of a packed row, from 1; 0 is padding
FlatHidden = Float[Array, "T D"]
DrawnHidden = Float[Array, "R D"]
RowLogits = Float[Array, "B T V"]
FlatLogits = Float[Array, "R V"]
Queries = Float[Array, "*R N H"]
Keys = Float[Array, "*R K H"]
FlatQueries = Float[Array, "T N H"]
FlatKeys = Float[Array, "T K H"]
Positions = Int[Array, "*R"]

# Routing: the experts of each token and the weight of each.
Choice = Int[Array, "T X"]
ChoiceWeights = Float[Array, "T X"]
# Tokens that chose each expert; in all layers.
ExpertCounts = Int[Array, " E"]
LayerCounts = Int[Array, "L E"]

# The cache.
WordPages = Int32[Array, "P _ _ H"]  # see kernels/tpu/word_pages.py
Pages = Float[Array, "P Y C H"] | Int8[Array, "P Y C _"] | WordPages  # int8: see cache.py
PageTable = Int[Array, "S W"]
PagePairs = Int[Array, "S 2"]  # source and destination
FlatTokens = Int[Array, " T"]
Lengths = Int[Array, " S"]
QueryStarts = Int[Array, "S+1"]
Rows = Int[Array, " R"]
RowFloats = Float[Array, " R"]
Scalar = Int[Array, ""]

# Sampling.
RowHistory = Int[Array, "R S"]
RowBiasIds = Int[Array, "R J"]
RowBiases = Float[Array, "R J"]
RowMasks = Int32[Array, "R _"]  # V bits a row, 32 in each word: see sampling.py
RunTokens = Int32[Array, "_ R"]  # of each step of a run
HostRunTokens = Int32[np.ndarray, "_ R"]
PackedDraws = Int32[Array, "R 42"]
HostPackedDraws = Int32[np.ndarray, "R 42"]
HostRowMasks = Int32[np.ndarray, "R _"]
HostRows = Int32[np.ndarray, " R"]
HostRowFloats = Float32[np.ndarray, " R"]
HostTopIds = Int32[np.ndarray, "R 20"]
HostTopLogprobs = Float32[np.ndarray, "R 20"]
