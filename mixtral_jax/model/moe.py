"""Mixture of experts (arXiv:2401.04088): a router sends each token to X of E SwiGLU experts.

One sum, three equal forms:
    dense    every expert computes every token, the router's weights pick; the oracle
    ragged   tokens sorted by expert, one grouped product per matrix; one device
    sharded  experts split over the mesh: each device runs the ragged form on the experts that it
             holds, for the tokens that it sees, and a psum adds up
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mixtral_jax.axes import Choice, ChoiceWeights, FlatHidden, Hidden
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.cpu import native
from mixtral_jax.kernels.gpu import attention as gpu
from mixtral_jax.kernels.tpu import attention as tpu
from mixtral_jax.model import expert_exchange as exchange
from mixtral_jax.model.layers import Linear, Scaled, project, quantize_rows, weight_parameters
from mixtral_jax.sharding import Layout

Form = Literal["dense", "ragged"]
Product = Callable[[jax.Array, jax.Array, Scaled], jax.Array]  # as `grouped`

# So few tokens that an accelerator reads an expert's weights for longer than it computes with them
# for all tokens: sorting tokens by expert gains nothing, and one product less waits for another.
# (Peak rate over bandwidth is 240 multiply-adds a byte for TPU v5e and more for all others.)
FEW_TOKENS = 128
# Of one device, from which on the exchange moves less than its own overhead is worth.
_MANY_TOKENS = 64

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
        activations: DTypeLike,
        rngs: nnx.Rngs | None,
        layout: Layout | None,
    ) -> None:
        self.router = Linear("Q", "D", config, activations, rngs)
        self.gate = Experts("EF", "D", config, dtype, rngs)
        self.up = Experts("EF", "D", config, dtype, rngs)
        self.down = Experts("ED", "F", config, dtype, rngs)
        self.experts_per_token = config.experts_per_token
        self.layout = layout

    def full(self, x: Hidden, form: Form = "ragged") -> Hidden:
        """x [*R D] -> [*R D]. `form` chooses between dense and ragged; a mesh means sharded."""
        flat = x.reshape(-1, x.shape[-1])
        choice, weights = route(self.router(flat), self.experts_per_token)
        if self.layout is not None:
            flat = moe_sharded(flat, choice, weights, self._experts, self.layout)
        elif form == "dense":
            flat = moe_dense(flat, choice, weights, self._experts)
        else:
            flat = moe_ragged(flat, choice, weights, self._experts)
        return flat.reshape(x.shape)

    def paged(self, x: FlatHidden) -> FlatHidden:
        routed = x
        if self.layout is not None and self.layout.platform == "gpu":
            # Else XLA makes one product of the router's and the first expert's, and so copies the
            # expert's weights in every step.
            routed = jax.lax.optimization_barrier(x)
        choice, weights = route(project(routed, self.router)[0], self.experts_per_token)
        if self.layout is not None:
            product = partial(grouped, platform=self.layout.platform)
            return moe_local(x, choice, weights, self._experts, self.layout, product)
        return moe_ragged(x, choice, weights, self._experts, grouped)

    @property
    def _experts(self) -> "Weights":
        return self.gate.scaled, self.up.scaled, self.down.scaled


class Experts(nnx.Module):
    """One matrix of every expert."""

    def __init__(
        self,
        outputs: str,
        inputs: str,
        config: ModelConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.weight, self.scale = weight_parameters(outputs, inputs, config, dtype, rngs)

    @property
    def scaled(self) -> Scaled:
        return Scaled.of(self.weight, self.scale)


Weights = tuple[Scaled, Scaled, Scaled]  # gate "EFD", up "EFD", down "EDF"


def moe_dense(
    x: FlatHidden, choice: Choice, weights: ChoiceWeights, experts: Weights
) -> FlatHidden:
    """Every expert on every token: E/X times the work, and nothing to get wrong.

    A choice >= the number of experts held here adds nothing.
    """

    def expert(gate: Scaled, up: Scaled, down: Scaled) -> jax.Array:
        return down.product(jax.nn.silu(gate.product(x)) * up.product(x))

    each = jax.vmap(expert)(*experts)
    shares = jax.nn.one_hot(choice, each.shape[0], dtype=jnp.float32) * weights[..., None]
    return jnp.einsum("ETD,TE->TD", each, jnp.sum(shares, axis=1).astype(x.dtype))


def grouped_xla(x: jax.Array, sizes: jax.Array, weight: Scaled) -> jax.Array:
    """Rows in E groups, each against its own expert: x [M I], sizes [E], weight [E O I] -> [M O].

    Unspecified for rows behind the last group.
    """
    if weight.scale is None:
        return jax.lax.ragged_dot_general(x, weight.values, sizes, _GROUPED)
    rows, x_scale = quantize_rows(x)
    total = jax.lax.ragged_dot_general(
        rows, weight.values, sizes, _GROUPED, preferred_element_type=jnp.int32
    )
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    scale = weight.scale[jnp.minimum(expert, sizes.shape[0] - 1)]
    return (total.astype(jnp.float32) * (x_scale[:, None] * scale)).astype(x.dtype)


def grouped(
    x: jax.Array, sizes: jax.Array, weight: Scaled, platform: str | None = None
) -> jax.Array:
    """`grouped_xla`, on CPU by our kernel: there XLA's computes every expert for every row.

    `platform` is what the mesh is of; without a mesh, None, only CPU has kernels.
    """

    if platform == "tpu" and tpu.fits_grouped(x, weight):
        return tpu.grouped(x, sizes, weight)
    if platform == "gpu" and gpu.fits_grouped(weight):
        return gpu.grouped(x, sizes, weight)

    def xla() -> jax.Array:
        return grouped_xla(x, sizes, weight)

    def on_cpu() -> jax.Array:
        return native.grouped(x, sizes.astype(jnp.int32), weight.arrays)

    return native.on_cpu(on_cpu, xla) if x.dtype == jnp.float32 else xla()


def moe_ragged(
    x: FlatHidden,
    choice: Choice,
    weights: ChoiceWeights,
    experts: Weights,
    product: Product = grouped_xla,
) -> FlatHidden:
    """Each token's experts only. A choice >= the number of experts held here adds nothing.

    Worked example, 2 tokens, X=2, choice [[2, 0], [0, 1]]: the four (token, expert) pairs sorted
    by expert are (0,0) (1,0) (1,1) (0,2), so rows 0 1 1 0 of x, in groups of 2, 1 and 1.
    """
    gate, up, down = experts
    num_experts, picks = gate.values.shape[0], choice.shape[1]
    pair_expert = choice.reshape(-1)
    order = jnp.argsort(pair_expert, stable=True)
    rows = x[order // picks]
    sizes = jnp.bincount(pair_expert, length=num_experts)
    hidden = jax.nn.silu(product(rows, sizes, gate)) * product(rows, sizes, up)
    out = product(hidden, sizes, down)
    out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
    # Rows of experts held elsewhere are behind the last group, where the product is unspecified.
    out = jnp.where((pair_expert < num_experts)[:, None], out, jnp.zeros((), out.dtype))
    out = out.reshape(*choice.shape, -1)
    return jnp.einsum("TXD,TX->TD", out, weights.astype(x.dtype))


def moe_local(
    x: FlatHidden,
    choice: Choice,
    weights: ChoiceWeights,
    experts: Weights,
    layout: Layout,
    product: Product = grouped_xla,
) -> FlatHidden:
    """One device's side of the sharded form: its tokens, its experts, inside a `shard_map`.

    Tokens that are split over devices with other experts are gathered, and the sums scattered; many
    tokens travel to their experts instead (`moe_exchanged`).
    """
    is_split = layout.shared("EF") == (exchange.AXIS,)
    if is_split and x.shape[0] >= _MANY_TOKENS and exchange.is_possible(layout.mesh):
        return moe_exchanged(x, choice, weights, experts, layout, product)
    x, choice, weights = (layout.gather(part, "EF") for part in (x, choice, weights))
    held = experts[0].values.shape[0]
    mine = choice - held * layout.index("E")
    mine = jnp.where((mine >= 0) & (mine < held), mine, held)
    if layout.platform != "cpu" and x.shape[0] <= FEW_TOKENS:
        sums = moe_dense(x, mine, weights, experts)
    else:
        sums = moe_ragged(x, mine, weights, experts, product)
    return layout.total(sums, "EF")


def moe_exchanged(
    x: FlatHidden,
    choice: Choice,
    weights: ChoiceWeights,
    experts: Weights,
    layout: Layout,
    product: Product = grouped_xla,
) -> FlatHidden:
    """The same where tokens and experts are split over the axis `expert`, and nothing else."""
    held, devices = experts[0].values.shape[0], layout.mesh.shape[exchange.AXIS]
    way = exchange.Exchange(choice, weights, held, devices, layout.platform)
    sums = moe_ragged(way.send(x), way.choice, way.weights, experts, product)
    # Parts of a sum over F go back unsummed: there are fewer rows at home.
    rest = Layout(layout.mesh, replace(layout.rules, E=()))
    return rest.total(way.give_back(sums), "F")


def moe_sharded(
    x: FlatHidden, choice: Choice, weights: ChoiceWeights, experts: Weights, layout: Layout
) -> FlatHidden:
    """`moe_local` on every device of the mesh, for whole arrays."""
    if x.shape[0] % layout.parts:  # then all are computed everywhere
        layout = Layout(layout.mesh, replace(layout.rules, B=()))
    rows = layout.rules.spec("BD")

    def local(x: jax.Array, choice: jax.Array, weights: jax.Array, *experts: Scaled) -> jax.Array:
        return moe_local(x, choice, weights, (experts[0], experts[1], experts[2]), layout)

    def spec(weight: Scaled, letters: str) -> Scaled:
        scale = None if weight.scale is None else layout.rules.spec(letters[:2])
        return Scaled(layout.rules.spec(letters), scale)  # type: ignore[arg-type]

    specs = (spec(experts[0], "EFD"), spec(experts[1], "EFD"), spec(experts[2], "EDF"))
    sharded = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(rows, rows, rows, *specs),
        out_specs=rows,
        check_vma=False,  # kernels do not say over which axes they vary
    )
    out: jax.Array = sharded(x, choice, weights, *experts)
    return out
