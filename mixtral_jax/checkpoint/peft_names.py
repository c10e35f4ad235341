"""The names of PEFT's tensors: where in a model each pair of matrices belongs, and its shapes.

A pair is `base_model.model.MODULE.lora_A.weight` [U I] and `.lora_B.weight` [O U]. Experts come in
two forms:

    one by one   `block_sparse_moe.experts.E.w1|w3|w2`, as transformers 4 named them; vLLM and
                 SGLang read these only, and PEFT reads them too
    fused        `mlp.experts` of transformers 5, by PEFT's `target_parameters`: A is [E*U I], the
                 experts slowest; B is [O U*E], the experts fastest; gate and up are one matrix
                 of 2*F outputs, with one A

The rows of q and k are in half-split rotary order, as ours are: nothing is permuted.
(huggingface/peft 0.21, tuners/lora/layer.py `ParamWrapper`, utils/transformers_weight_conversion)
"""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mixtral_jax.checkpoint.peft_config import ALL_LINEAR, PeftConfig
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import adapter_letters

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
_ATTENTION = {target: f"self_attn.{target}_proj" for target in "qkvo"}
_DENSE = {target: f"mlp.{target}_proj" for target in ("gate", "up", "down")}
_EXPERTS = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a pair of PEFT's matrices in a model.

    Args:
        module: the name that the pair's tensors begin with, without `base_model.model.`.
        asked: the name of the module or parameter that PEFT's settings are matched with.
        is_parameter: `target_parameters` asks for it, else `target_modules` does.
        layer: counted from 0.
        targets: ours; gate and up together where they are one matrix.
        expert: counted from 0; None for all experts, or where there are none.
        outputs, inputs: sizes O and I of the matrix that it is added to, of one expert.
        experts: E where the pair holds all experts, else 0.
    """

    module: str
    asked: str
    is_parameter: bool
    layer: int
    targets: tuple[str, ...]
    expert: int | None
    outputs: int
    inputs: int
    experts: int

    @property
    def a(self) -> str:
        """The name of the tensor A."""
        return f"{PREFIX}{self.module}{A}"

    @property
    def b(self) -> str:
        """The name of the tensor B."""
        return f"{PREFIX}{self.module}{B}"

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A and of B."""
        rows = rank * max(1, self.experts)
        return (rows, self.inputs), (self.outputs, rows)


def module_name(layer: int, target: str, is_moe: bool, expert: int | None = None) -> str:
    """The name of a target's module, with experts one by one: the form that we write."""
    if target in _ATTENTION:
        return f"model.layers.{layer}.{_ATTENTION[target]}"
    if not is_moe:
        return f"model.layers.{layer}.{_DENSE[target]}"
    if target == "router":
        return f"model.layers.{layer}.block_sparse_moe.gate"
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{_EXPERTS[target]}"


def places(model: ModelConfig, settings: PeftConfig, names: Collection[str]) -> list[Place]:
    """All places that an adapter's settings ask for; `names` are those of its tensors.

    They show in which form the experts are stored, and, where the settings ask for all linear
    layers, which of them have an adapter.
    """
    is_fused = model.is_moe and _is_fused(settings, names)
    wanted = []
    for layer in range(model.num_layers):
        for place in _of_layer(model, settings, layer, is_fused):
            if place.is_parameter:
                is_asked = settings.has_parameter(place.asked)
                # target_modules may name the router, though it is a parameter in transformers 5.
                if place.targets == ("router",):
                    is_asked |= settings.has_module(place.module, layer)
            elif settings.target_modules == ALL_LINEAR:
                is_asked = place.a in names or place.b in names
            else:
                is_asked = settings.has_module(place.asked, layer)
            if is_asked:
                wanted.append(place)
    return wanted


def _is_fused(settings: PeftConfig, names: Collection[str]) -> bool:
    if any(".block_sparse_moe." in name for name in names):
        return False
    return bool(settings.target_parameters) or any(".mlp." in name for name in names)


def _of_layer(
    model: ModelConfig, settings: PeftConfig, layer: int, is_fused: bool
) -> Iterator[Place]:
    """All places that a layer has in one of the two forms."""

    def place(
        *targets: str, module: str, asked: str = "", expert: int | None = None, experts: int = 0
    ) -> Place:
        outputs, inputs = _sizes(model, targets[0])
        return Place(
            module=module,
            asked=asked or module,
            is_parameter=bool(asked),
            layer=layer,
            targets=targets,
            expert=expert,
            outputs=outputs * len(targets),
            inputs=inputs,
            experts=experts,
        )

    def plain(target: str, expert: int | None = None) -> Place:
        return place(target, module=module_name(layer, target, model.is_moe, expert), expert=expert)

    yield from (plain(target) for target in _ATTENTION)
    if not model.is_moe:
        yield from (plain(target) for target in _DENSE)
    elif not is_fused:
        yield plain("router")
        for expert in range(model.num_experts):
            yield from (plain(target, expert) for target in _EXPERTS)
    else:
        mlp = f"model.layers.{layer}.mlp"
        yield place("router", module=f"{mlp}.gate", asked=f"{mlp}.gate.weight")
        # Two parameters of one module are wrapped one in the other, the first one within.
        is_nested = settings.has_parameter(f"{mlp}.experts.down_proj")
        count = model.num_experts
        yield place(
            *("gate", "up"),
            module=f"{mlp}.experts" + ".base_layer" * is_nested,
            asked=f"{mlp}.experts.gate_up_proj",
            experts=count,
        )
        yield place(
            *("down",),
            module=f"{mlp}.experts",
            asked=f"{mlp}.experts.down_proj",
            experts=count,
        )


def _sizes(model: ModelConfig, target: str) -> tuple[int, int]:
    """Outputs and inputs of the matrix beside which a target's adapter stands."""
    a, b = adapter_letters(target, model)
    sizes = model.axis_sizes
    outputs, inputs = b.removeprefix("E").removesuffix("U"), a.removeprefix("E").removeprefix("U")
    return math.prod(sizes[x] for x in outputs), math.prod(sizes[x] for x in inputs)


def reason_against(name: str, model: ModelConfig, settings: PeftConfig) -> str:
    """Says why the tensor of an adapter has no place in a model, as the end of a sentence."""
    if ".lora_magnitude_vector" in name:
        return "it is of DoRA, which is not supported"
    if ".lora_embedding_" in name or "lm_head" in name or "embed_tokens" in name:
        return "embeddings and head take no adapter here"
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= model.num_layers:
        return f"the base has {model.num_layers} layers"
    expert = re.search(r"\.experts\.(\d+)\.", name)
    if expert and model.is_moe and int(expert[1]) >= model.num_experts:
        return f"the base has {model.num_experts} experts"
    if not model.is_moe and (".block_sparse_moe." in name or ".experts." in name):
        return "the base has no experts"
    if not name.endswith((A, B)) or not name.startswith(f"{PREFIX}model.layers."):
        return f"names are {PREFIX}model.layers.N.MODULE.lora_A.weight and .lora_B.weight"
    asked = settings.target_modules or settings.target_parameters
    wanted = asked if isinstance(asked, str) else ", ".join(asked)
    return f"{settings.path.name} asks for {wanted}, and the base has {_kind(model)}"


def _kind(model: ModelConfig) -> str:
    return f"{model.num_experts} experts" if model.is_moe else "no experts"
