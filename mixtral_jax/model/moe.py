"""Mixture of experts (arXiv:2401.04088): a router sends each token to X of E SwiGLU experts.

One sum, four equal forms:
    dense      every expert computes every token, the router's weights pick; the oracle
    ragged     tokens sorted by expert, one grouped product per matrix
    local      one device's side under a mesh: the ragged form (or the dense one) on the experts
               that it holds, for the tokens that it sees; the sums are added up
    exchanged  the same for many tokens, which travel to their experts and back

Serving takes the ragged form, which reads no expert that nobody chose; an accelerator takes the
dense one for few tokens that choose nearly all of them (expert_load.py). Places of a step that hold
no token choose no expert.
"""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax.axes import Choice, ChoiceWeights, FlatHidden, FlatTokens, Hidden, Scalar
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import Kernels
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.kernels.xla.low_rank import add_low_rank
from mixtral_jax.layout import Layout
from mixtral_jax.model import expert_exchange
from mixtral_jax.model.adapter import UNCHANGED, BlockAdapter, LowRank
from mixtral_jax.model.adapter_stack import (
    NO_ADAPTERS,
    NO_SLOT,
    AdaptedWeight,
    Adapters,
    BlockStacks,
    Stack,
    add_stacks,
)
from mixtral_jax.model.capture import NOTHING, Capture
from mixtral_jax.model.expert_load import computes_every_expert
from mixtral_jax.model.layers import Linear, weight_of, weight_parameters
from mixtral_jax.placement import Placement
from mixtral_jax.weight import Weight

Form = Literal["dense", "ragged"]
# gate "EFD", up "EFD", down "EDF"
Experts = tuple[AdaptedWeight, AdaptedWeight, AdaptedWeight]

# Tokens of one device from which on the exchange moves less than its own overhead is worth.
_MIN_EXCHANGED = 64


def route(logits: jax.Array, experts_per_token: int) -> tuple[Choice, ChoiceWeights]:
    """Chooses the X likeliest experts of each token and weighs them by a softmax over those X.

    logits [T E] -> ids [T X] i32, weights [T X] f32 that sum to 1. Equal to Hugging Face's softmax
    over all experts, then top-k, then renormalising.
    """
    top, choice = jax.lax.top_k(logits.astype(jnp.float32), experts_per_token)
    return choice, jax.nn.softmax(top, axis=-1)


def without_padding(choice: Choice, num_tokens: Scalar, num_experts: int) -> Choice:
    """The choice [T X] with E in place of every expert from token `num_tokens` on: none at all."""
    is_used = jnp.arange(choice.shape[0], dtype=jnp.int32) < num_tokens
    return jnp.where(is_used[:, None], choice, jnp.asarray(num_experts, choice.dtype))


class MoE(nnx.Module):
    """Router and experts of one layer."""

    def __init__(self, config: ModelConfig, placement: Placement, rngs: nnx.Rngs | None) -> None:
        between = placement.activation_dtype
        self.router = Linear("Q", "D", config, placement, rngs, dtype=between)

        def experts(name: str, outputs: str, inputs: str) -> ExpertMatrix:
            dtype = placement.dtype_of(f"feed_forward.{name}")
            return ExpertMatrix(outputs, inputs, config, dtype, rngs)

        self.gate, self.up = experts("gate", "EF", "D"), experts("up", "EF", "D")
        self.down = experts("down", "ED", "F")
        self.experts_per_token = config.experts_per_token
        self.layout, self.kernels = placement.layout, placement.kernels

    def full(
        self,
        x: Hidden,
        form: Form = "ragged",
        capture: Capture = NOTHING,
        *,
        adapter: BlockAdapter = UNCHANGED,
    ) -> Hidden:
        """x [*R D] -> [*R D]. `form` chooses between dense and ragged; a mesh means sharded.

        Only the ragged form records the inputs of down.
        """
        flat = x.reshape(-1, x.shape[-1])
        kernels = self.kernels.with_gradients()
        with jax.named_scope("router"):
            logits = self.router.full(flat, adapter.router)
            choice, weights = route(logits, self.experts_per_token)
        experts = self.adapted(adapter)
        capture.record("feed_forward.in", x)
        capture.record("router.logits", logits)
        capture.record("router.choice", choice)
        capture.record("router.weights", weights)
        with jax.named_scope("experts"):
            if self.layout is not None:
                flat = moe_sharded(flat, choice, weights, experts, self.layout, kernels)
            elif form == "dense":
                flat = moe_dense(flat, choice, weights, experts)
            else:
                flat = moe_ragged(flat, choice, weights, experts, kernels, capture)
        return flat.reshape(x.shape)

    def paged(
        self,
        x: FlatHidden,
        adapters: Adapters = NO_ADAPTERS,
        capture: Capture = NOTHING,
        num_tokens: Scalar | None = None,
    ) -> FlatHidden:
        """x [T D] -> [T D]; records the choice alone.

        Places from `num_tokens` on are padding, which no expert computes; None if there are none.
        """
        stacks, slots = adapters
        with jax.named_scope("router"):
            logits = self.router.paged(self.kernels.router_input(x), stacks.router, slots)
            choice, weights = route(logits, self.experts_per_token)
        capture.record("router.choice", choice)
        num_experts = logits.shape[1]
        if num_tokens is not None:
            choice = without_padding(choice, num_tokens, num_experts)
        experts = self.adapted(stacks)
        with jax.named_scope("experts"):
            if self.layout is not None:
                return moe_local(x, choice, weights, experts, self.layout, self.kernels, slots)
            if computes_every_expert(
                x.shape[0],
                x.shape[0],
                num_experts,
                self.experts_per_token,
                _decisive(experts),
                self.kernels,
            ):
                return moe_dense(x, choice, weights, experts, slots)
            return moe_ragged(x, choice, weights, experts, self.kernels, slots=slots)

    @property
    def experts(self) -> Experts:
        """The arrays of gate, up and down."""
        return self.adapted(UNCHANGED)

    def adapted(self, adapter: BlockAdapter | BlockStacks) -> Experts:
        """The same with what an adapter has beside them."""
        return (
            AdaptedWeight(self.gate.arrays, adapter.gate),
            AdaptedWeight(self.up.arrays, adapter.up),
            AdaptedWeight(self.down.arrays, adapter.down),
        )


class ExpertMatrix(nnx.Module):
    """One matrix of every expert."""

    def __init__(
        self,
        outputs: str,
        inputs: str,
        config: ModelConfig,
        dtype: str,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.weight, self.scale = weight_parameters(outputs, inputs, config, dtype, rngs)

    @property
    def arrays(self) -> Weight:
        """The matrices [E O I] with their scales."""
        return weight_of(self.weight, self.scale)


def moe_dense(
    x: FlatHidden,
    choice: Choice,
    weights: ChoiceWeights,
    experts: Experts,
    slots: FlatTokens | None = None,
) -> FlatHidden:
    """Every expert on every token: E/X times the work, and nothing to get wrong.

    A choice >= the number of experts held here adds nothing. `slots` [T] is for stacks.
    """

    def product(x: jax.Array, weight: AdaptedWeight) -> jax.Array:
        y = xla.product(x, weight.weight)
        if isinstance(weight.low, Stack):
            assert slots is not None, "rows of stacks have slots"
            return add_low_rank([y], x, slots, [weight.low.flat()])[0]
        return y if weight.low is None else y + weight.low.product(x)

    def expert(gate: AdaptedWeight, up: AdaptedWeight, down: AdaptedWeight) -> jax.Array:
        return product(xla.swiglu(product(x, gate), product(x, up)), down)

    outputs = jax.vmap(expert)(*experts)
    shares = jax.nn.one_hot(choice, outputs.shape[0], dtype=jnp.float32) * weights[..., None]
    return jnp.einsum("ETD,TE->TD", outputs, jnp.sum(shares, axis=1).astype(x.dtype))


def moe_ragged(
    x: FlatHidden,
    choice: Choice,
    weights: ChoiceWeights,
    experts: Experts,
    kernels: Kernels,
    capture: Capture = NOTHING,
    slots: FlatTokens | None = None,
) -> FlatHidden:
    """Each token's experts only. A choice >= the number of experts held here adds nothing.

    `slots` [T] is for stacks, whose groups are those of an expert and an adapter.

    Worked example, 2 tokens, X=2, choice [[2, 0], [0, 1]]: the four (token, expert) pairs sorted
    by expert are (0,0) (1,0) (1,1) (0,2), so rows 0 1 1 0 of x, in groups of 2, 1 and 1.
    """
    gate, up, down = experts
    num_experts, picks = gate.weight.values.shape[0], choice.shape[1]
    pair_expert = choice.reshape(-1)
    order = jnp.argsort(pair_expert, stable=True)
    rows = x[order // picks]
    sizes = jnp.bincount(pair_expert, length=num_experts)

    groups = _groups(pair_expert[order], order // picks, slots, experts)

    def products(x: jax.Array, *adapted: AdaptedWeight) -> list[jax.Array]:
        ys = [kernels.grouped(x, sizes, expert.weight) for expert in adapted]
        if groups is not None:
            stacks = [beside.low for beside in adapted if isinstance(beside.low, Stack | None)]
            return add_stacks(ys, x, groups, stacks, kernels, lead=2)
        for i, beside in enumerate(adapted):
            if isinstance(beside.low, LowRank):
                a, b = (Weight(jnp.asarray(matrix, x.dtype), None) for matrix in beside.low)
                ys[i] += kernels.grouped(kernels.grouped(x, sizes, a), sizes, b)
        return ys

    hidden = kernels.swiglu(*products(rows, gate, up))
    capture.record("feed_forward.down", hidden)
    capture.record("feed_forward.sizes", sizes)
    (out,) = products(hidden, down)
    out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
    # Rows of experts held elsewhere are behind the last group, where the product is unspecified.
    out = jnp.where((pair_expert < num_experts)[:, None], out, jnp.zeros((), out.dtype))
    out = out.reshape(*choice.shape, -1)
    return jnp.einsum("TXD,TX->TD", out, weights.astype(x.dtype))


def _groups(
    pair_expert: jax.Array, token: jax.Array, slots: FlatTokens | None, experts: Experts
) -> jax.Array | None:
    """The number of the matrices, by expert and slot, that each (token, expert) pair uses.

    Negative where it uses none; None where no row has an adapter.
    """
    stacks = [expert.low for expert in experts if isinstance(expert.low, Stack)]
    if slots is None or not stacks:
        return None
    num_experts, num_slots = stacks[0].a.shape[:2]
    slot = slots[token]
    is_used = (slot >= 0) & (pair_expert < num_experts)
    return jnp.where(is_used, pair_expert * num_slots + slot, NO_SLOT)


def moe_local(
    x: FlatHidden,
    choice: Choice,
    weights: ChoiceWeights,
    experts: Experts,
    layout: Layout,
    kernels: Kernels,
    slots: FlatTokens | None = None,
) -> FlatHidden:
    """One device's side of the sharded form: its tokens, its experts, inside a `shard_map`.

    Tokens that are split over devices with other experts are gathered, and the sums scattered; many
    tokens travel to their experts instead (`moe_exchanged`).
    """
    is_split = layout.axes_shared_with_tokens("EF") == (expert_exchange.AXIS,)
    if is_split and x.shape[0] >= _MIN_EXCHANGED and kernels.can_move_rows(layout.mesh):
        return moe_exchanged(x, choice, weights, experts, layout, kernels, slots)
    own_tokens = x.shape[0]
    slots = None if slots is None else layout.gather_tokens(slots, "EF")
    x, choice, weights = (layout.gather_tokens(array, "EF") for array in (x, choice, weights))
    held = experts[0].weight.values.shape[0]
    mine = choice - held * layout.part_index("E")
    mine = jnp.where((mine >= 0) & (mine < held), mine, held)
    num_experts = held * layout.rules.ways("E", layout.mesh)
    if computes_every_expert(
        own_tokens, x.shape[0], num_experts, choice.shape[1], _decisive(experts), kernels
    ):
        sums = moe_dense(x, mine, weights, experts, slots)
    else:
        sums = moe_ragged(x, mine, weights, experts, kernels, slots=slots)
    return layout.sum_over(sums, "EF")


def _decisive(experts: Experts) -> jax.Array:
    """The matrices by which the form of a step is chosen: of int4, if some are."""
    of_int4 = (expert.weight for expert in experts if expert.weight.is_int4)
    return next(of_int4, experts[0].weight).values


def moe_exchanged(
    x: FlatHidden,
    choice: Choice,
    weights: ChoiceWeights,
    experts: Experts,
    layout: Layout,
    kernels: Kernels,
    slots: FlatTokens | None = None,
) -> FlatHidden:
    """`moe_local` where tokens and experts are split over the axis `expert`, and nothing else."""
    held, devices = experts[0].weight.values.shape[0], layout.mesh.shape[expert_exchange.AXIS]
    dispatched = expert_exchange.dispatch(x, choice, weights, held, devices, kernels, slots)
    sums = moe_ragged(
        dispatched.rows,
        dispatched.choice,
        dispatched.weights,
        experts,
        kernels,
        slots=dispatched.slots,
    )
    # Parts of a sum over F go back unsummed: there are fewer rows at home.
    rest = Layout(layout.mesh, replace(layout.rules, E=()))
    return rest.sum_over(expert_exchange.combine(sums, dispatched, kernels), "F")


def moe_sharded(
    x: FlatHidden,
    choice: Choice,
    weights: ChoiceWeights,
    experts: Experts,
    layout: Layout,
    kernels: Kernels,
) -> FlatHidden:
    """`moe_local` on every device of the mesh, for whole arrays."""
    if x.shape[0] % layout.num_sequence_groups:  # then all tokens are computed everywhere
        layout = Layout(layout.mesh, replace(layout.rules, B=()))
    rows = layout.rules.spec("BD")

    def local(
        x: jax.Array, choice: jax.Array, weights: jax.Array, *experts: AdaptedWeight
    ) -> jax.Array:
        return moe_local(x, choice, weights, (experts[0], experts[1], experts[2]), layout, kernels)

    def spec(adapted: AdaptedWeight, letters: str) -> Any:
        expert, output, inputs = letters[0], letters[1], letters[2]
        rule = layout.rules.spec
        weight, scale = adapted.weight, None
        if weight.scale is not None:
            own = f"{letters}Z" if weight.is_int4 else letters
            scale = rule(own if weight.is_in_groups else letters[:2])
        low = None
        if adapted.low is not None:
            low = LowRank(rule(f"{expert}U{inputs}"), rule(f"{expert}{output}U"))  # type: ignore[arg-type]
        return AdaptedWeight(Weight(rule(letters), scale), low)  # type: ignore[arg-type]

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
