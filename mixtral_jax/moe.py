"""Mixture of experts (arXiv:2401.04088): a router sends each token to X of E SwiGLU experts.

One sum, three equal forms:
    dense    every expert computes every token, the router's weights pick; the oracle
    ragged   tokens sorted by expert, one grouped product per matrix; one device
    sharded  experts split over the mesh: each device runs the ragged form on the experts that it
             holds, for the tokens that it sees, and a psum adds up
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mixtral_jax.axes import Choice, ChoiceWeights, FlatHidden, Hidden
from mixtral_jax.config import ModelConfig
from mixtral_jax.layers import Linear, parameter
from mixtral_jax.sharding import ShardingRules

Form = Literal["dense", "ragged"]

# y[M, out] = x[M, in] @ w[E, out, in]^T, rows of x in E groups: contracts the weight's last axis.
_GROUPED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def route(logits: jax.Array, experts_per_token: int) -> tuple[Choice, ChoiceWeights]:
    """Chooses the X likeliest experts of each token and weighs them by a softmax over those X.

    logits [T E] -> ids [T X] i32, weights [T X] f32 that sum to 1. Equal to Hugging Face's softmax
    over all experts, then top-k, then renormalising.
    """
    top, choice = jax.lax.top_k(logits.astype(jnp.float32), experts_per_token)
    return choice, jax.nn.softmax(top, axis=-1)


class MoE(nnx.Module):
    """Router and experts of one layer."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
        mesh: Mesh | None,
        rules: ShardingRules,
    ) -> None:
        self.router = Linear("E", "D", config, dtype, rngs)
        self.gate = Experts("EFD", config, dtype, rngs)
        self.up = Experts("EFD", config, dtype, rngs)
        self.down = Experts("EDF", config, dtype, rngs)
        self.experts_per_token = config.experts_per_token
        self.mesh = mesh
        self.rules = rules

    def __call__(self, x: Hidden, form: Form = "ragged") -> Hidden:
        """x [*R D] -> [*R D]. `form` chooses between dense and ragged; a mesh means sharded."""
        flat = x.reshape(-1, x.shape[-1])
        choice, weights = route(self.router(flat), self.experts_per_token)
        experts = (self.gate.weight[...], self.up.weight[...], self.down.weight[...])
        if self.mesh is not None:
            flat = moe_sharded(flat, choice, weights, experts, self.mesh, self.rules)
        elif form == "dense":
            flat = moe_dense(flat, choice, weights, experts)
        else:
            flat = moe_ragged(flat, choice, weights, experts)
        return flat.reshape(x.shape)


class Experts(nnx.Module):
    """One matrix of every expert."""

    def __init__(
        self, axes: str, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None
    ) -> None:
        self.weight = parameter(axes, config, dtype, rngs)


Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate "EFD", up "EFD", down "EDF"


def moe_dense(
    x: FlatHidden, choice: Choice, weights: ChoiceWeights, experts: Weights
) -> FlatHidden:
    """Every expert on every token: E/X times the work, and nothing to get wrong."""
    gate, up, down = experts
    hidden = jax.nn.silu(jnp.einsum("TD,EFD->TEF", x, gate)) * jnp.einsum("TD,EFD->TEF", x, up)
    each = jnp.einsum("TEF,EDF->TED", hidden, down)
    combine = jnp.sum(
        jax.nn.one_hot(choice, gate.shape[0], dtype=jnp.float32) * weights[..., None], axis=1
    )
    return jnp.einsum("TED,TE->TD", each, combine.astype(x.dtype))


def moe_ragged(
    x: FlatHidden, choice: Choice, weights: ChoiceWeights, experts: Weights
) -> FlatHidden:
    """Each token's experts only. A choice >= the number of experts held here adds nothing.

    Worked example, 2 tokens, X=2, choice [[2, 0], [0, 1]]: the four (token, expert) pairs sorted
    by expert are (0,0) (1,0) (1,1) (0,2), so rows 0 1 1 0 of x, in groups of 2, 1 and 1.
    """
    gate, up, down = experts
    num_experts, picks = gate.shape[0], choice.shape[1]
    pair_expert = choice.reshape(-1)
    order = jnp.argsort(pair_expert, stable=True)
    rows = x[order // picks]
    sizes = jnp.bincount(pair_expert, length=num_experts)

    def grouped(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot_general(lhs, rhs, sizes, _GROUPED)

    out = grouped(jax.nn.silu(grouped(rows, gate)) * grouped(rows, up), down)
    out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
    # Rows of experts held elsewhere are behind the last group, where the product is unspecified.
    out = jnp.where((pair_expert < num_experts)[:, None], out, jnp.zeros((), out.dtype))
    out = out.reshape(*choice.shape, -1)
    return jnp.einsum("TXD,TX->TD", out, weights.astype(x.dtype))


def moe_sharded(
    x: FlatHidden,
    choice: Choice,
    weights: ChoiceWeights,
    experts: Weights,
    mesh: Mesh,
    rules: ShardingRules,
) -> FlatHidden:
    """Experts over the mesh: every device serves the tokens of its data shard with its experts."""
    held = experts[0].shape[0] // mesh.shape[rules.E]
    # Tokens are split as rows of a batch are; a count that does not divide is computed everywhere.
    rows = rules.spec("BD")
    if x.shape[0] % mesh.shape[rules.B]:
        rows = jax.sharding.PartitionSpec()

    def local(
        x: jax.Array, choice: jax.Array, weights: jax.Array, *experts: jax.Array
    ) -> jax.Array:
        mine = choice - held * jax.lax.axis_index(rules.E)
        mine = jnp.where((mine >= 0) & (mine < held), mine, held)
        partial = moe_ragged(x, mine, weights, (experts[0], experts[1], experts[2]))
        return jax.lax.psum(partial, (rules.E, rules.F))

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, rows, rules.spec("EFD"), rules.spec("EFD"), rules.spec("EDF")),
        out_specs=rows,
    )
    out: jax.Array = sharded(x, choice, weights, *experts)
    return out
