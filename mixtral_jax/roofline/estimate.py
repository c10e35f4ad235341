"""The arithmetic of a step on one chip: bytes, operations and collectives, without a compiler.

It is computed from the model's shapes, the sharding rules and the experts that tokens are expected
to choose. Chips share the work evenly but for the experts of a mixture, where the busiest chip
counts, because a step ends with its slowest chip.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.expert_load import (
    busiest_experts,
    busiest_pairs,
    computes_every_expert,
)
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.placement import Placement
from mixtral_jax.roofline.chips import Topology
from mixtral_jax.roofline.collective import Collective
from mixtral_jax.roofline.split import Split
from mixtral_jax.roofline.step_seconds import EstimatedSeconds, launch_seconds
from mixtral_jax.roofline.workload import Workload, unsplit_placement
from mixtral_jax.sharding import ShardingRules
from mixtral_jax.weight import QUANTIZED

# Arrays that a step is given beside parameters and pages: its inputs and the state of the draw.
_OTHER_ARGUMENTS = 8


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of parameters on one chip, those of the layers summed over all layers."""

    experts: int
    rest_of_layers: int
    embedding: int
    head: int  # the final norm too

    @property
    def total(self) -> int:
        """Bytes of all parameters."""
        return self.experts + self.rest_of_layers + self.embedding + self.head


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A workload on a topology under one split, by arithmetic.

    Sequences are divided into groups, each with its own tokens and pages: `num_groups` of
    `sequences` sequences. Arguments named `tokens` are the tokens of one group.
    """

    workload: Workload
    topology: Topology
    split: Split

    @cached_property
    def mesh(self) -> Mesh:
        """The split as a mesh without devices."""
        return self.split.mesh

    @cached_property
    def rules(self) -> ShardingRules:
        """The rules by which the serving step is sharded."""
        return ShardingRules.of(self.workload.model, self.mesh, self.split.dp_attention)

    @property
    def num_groups(self) -> int:
        """Number of groups that the sequences are divided into."""
        return self.rules.ways("B", self.mesh)

    @property
    def sequences(self) -> int:
        """Number of sequences of one group."""
        return -(-self.workload.batch // self.num_groups)

    @cached_property
    def placement(self) -> Placement:
        """The kernels, dtypes and page size that the model has on the topology's devices."""
        workload = self.workload
        return unsplit_placement(workload.dtype, self.topology.platform, workload.weight_dtypes)

    @property
    def kv_dtype(self) -> str:
        """The dtype of keys and values."""
        return self.workload.kv_dtype or self.placement.activation_dtype

    @property
    def activation_bytes(self) -> int:
        """Bytes of one number of the activations."""
        return 4 if self.placement.activation_dtype == "float32" else 2

    def with_batch(self, batch: int) -> "Estimate":
        """The same for so many sequences; what does not depend on them is not computed again."""
        other = replace(self, workload=replace(self.workload, batch=batch))
        for name in ("mesh", "rules", "placement", "_parameters", "weights"):
            other.__dict__[name] = getattr(self, name)
        return other

    def ways(self, letters: str, *, with_tokens: bool | None = None) -> int:
        """Number of devices over which any dimension named by the letters is split.

        `with_tokens` True counts only the mesh axes that also split the tokens, False only those
        that do not.
        """
        names = {axis for letter in letters for axis in getattr(self.rules, letter)}
        if with_tokens is not None:
            names = {axis for axis in names if (axis in self.rules.B) == with_tokens}
        return math.prod(self.mesh.shape[axis] for axis in names)

    @cached_property
    def _parameters(self) -> list[tuple[int, dict[str, Any]]]:
        """Each form of layer: how many there are, and the abstract parameters of a model with one
        such layer, by their names.
        """
        model = self.workload.model
        one_layer = ModelConfig.from_json({**model.to_json(), "num_layers": 1})
        forms = Counter(self.placement.of_layer(i).weight_dtypes for i in range(model.num_layers))
        parameters = []
        for weight_dtypes, count in forms.items():
            own = tuple((f"layers.0.{name}", dtype) for name, dtype in weight_dtypes)
            placement = replace(self.placement, weight_dtypes=own)
            named = named_parameters(Transformer(one_layer, placement, rngs=None))
            parameters.append((count, named))
        return parameters

    @cached_property
    def weights(self) -> WeightBytes:
        """Bytes of the parameters that one chip holds."""
        nbytes = {"experts": 0, "rest_of_layers": 0, "embedding": 0, "head": 0}
        for form, (count, parameters) in enumerate(self._parameters):
            for name, variable in parameters.items():
                array, letters = variable.get_value(), variable.get_metadata("axes")
                ways = math.prod(self.rules.ways(letter, self.mesh) for letter in letters)
                on_chip = array.size * array.dtype.itemsize // ways
                if name.startswith("layers."):
                    place = "experts" if "E" in letters else "rest_of_layers"
                    nbytes[place] += on_chip * count
                elif form == 0:  # these are there once
                    nbytes["embedding" if name.startswith("embed.") else "head"] += on_chip
        return WeightBytes(**nbytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page on one chip, all layers."""
        model = self.workload.model
        heads = model.num_kv_heads // self.rules.ways("K", self.mesh)
        kernels, size = self.placement.kernels, self.workload.page_size
        page = kernels.page_form(size, heads, model.head_size, self.kv_dtype)
        return model.num_layers * page.nbytes

    @property
    def attended_page_bytes(self) -> int:
        """Bytes of the pages on one chip that one sequence reads in a decode step."""
        return -(-self.workload.attended_tokens // self.workload.page_size) * self.page_bytes

    def chosen_share(self, tokens: int) -> float:
        """Expected share of its experts that the busiest chip needs; 1 for a dense model."""
        held = self.workload.model.num_experts // self.ways("E")
        return self._busiest_experts(tokens) / held if held else 1.0

    def read_share(self, tokens: int) -> float:
        """The experts that the model's own step reads on the busiest chip over those it holds.

        In the ragged form they are counted from the tiles that the kernel fetches for groups of
        even sizes, so a kernel that reads an expert once for each of its tiles of rows counts it so
        often, and the share may exceed 1.
        """
        if self.computes_every_expert(tokens):
            return 1.0
        return self.chosen_share(tokens) * self.reads_of_an_expert(tokens)

    def reads_of_an_expert(self, tokens: int) -> float:
        """Times that the ragged form reads an expert that some token chose."""
        model = self.workload.model
        if not model.is_moe:
            return 1.0
        rows = self._tokens_met(tokens) * model.experts_per_token
        experts = max(1, round(self._busiest_experts(tokens)))
        pairs = min(rows, max(experts, round(self._expert_rows(tokens))))
        sizes = [pairs // experts + (i < pairs % experts) for i in range(experts)]
        expert_reads = self.placement.kernels.expert_reads
        reads = [expert_reads(sizes, rows, matrix) for matrix in self._expert_matrices]
        return sum(reads) / len(reads) / experts

    @property
    def _expert_matrices(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of gate, up and down [E O I] on one chip."""
        model, dtype = self.workload.model, self.workload.dtype
        held, inside = (
            model.num_experts // self.ways("E"),
            model.feed_forward_size // self.ways("F"),
        )
        shapes = 2 * [(held, inside, model.hidden_size)] + [(held, model.hidden_size, inside)]
        kind = QUANTIZED.get(dtype, dtype)
        if dtype == "int4":  # two inputs in a byte
            shapes = [(held, outputs, inputs // 2) for held, outputs, inputs in shapes]
        return tuple(jax.ShapeDtypeStruct(shape, kind) for shape in shapes)

    def _busiest_experts(self, tokens: int) -> float:
        """Expected number of experts that are chosen on the chip where it is the largest."""
        model = self.workload.model
        if not model.is_moe:
            return 0.0
        return busiest_experts(
            self._tokens_met(tokens),
            model.num_experts,
            model.experts_per_token,
            self.ways("E"),
            self._replicas,
        )

    def computes_every_expert(self, tokens: int) -> bool:
        """Says whether the model's own step takes the dense form (`model.moe.moe_local`)."""
        model, kernels = self.workload.model, self.placement.kernels
        return model.is_moe and computes_every_expert(
            tokens,
            self._tokens_met(tokens),
            model.num_experts,
            model.experts_per_token,
            self._expert_matrices[0],
            kernels,
        )

    def least_bytes(self, tokens: int, sequences: int) -> float:
        """Bytes that any program must move in a step on the busiest chip.

        They are the weights that are used, the pages that are attended to, the activations once
        between two layers, and the head.
        """
        return self._step_bytes(tokens, sequences, self.chosen_share(tokens))

    def moved_bytes(self, tokens: int, sequences: int) -> float:
        """Bytes that the model's own step moves on the busiest chip.

        They exceed `least_bytes` where the model reads experts that no token chose, or an expert
        more than once.
        """
        return self._step_bytes(tokens, sequences, self.read_share(tokens))

    def _step_bytes(self, tokens: int, sequences: int, share_of_experts: float) -> float:
        model, weights = self.workload.model, self.weights
        read = weights.rest_of_layers + weights.experts * share_of_experts
        read += weights.embedding if model.tied_embeddings else weights.head
        activations = 2 * model.num_layers * tokens * model.hidden_size * self.activation_bytes
        return read + sequences * self.attended_page_bytes + activations

    def _tokens_met(self, tokens: int) -> int:
        """Number of tokens whose experts one chip computes: its own and those gathered to it."""
        return tokens * self.ways("EF", with_tokens=True)

    @property
    def _replicas(self) -> int:
        """Number of sets of chips that hold the same experts and compute different tokens."""
        return self.num_groups // self.ways("EF", with_tokens=True)

    def operations(self, tokens: int, attended: int) -> float:
        """Floating-point operations of a step on the busiest chip; a multiply-add counts as two.

        `attended` is the number of tokens that each token attends to on average.
        """
        model = self.workload.model
        heads = model.num_heads / self.ways("N")
        kv_heads = model.num_kv_heads / self.ways("K")
        projections = model.hidden_size * model.head_size * (2 * heads + 2 * kv_heads)
        attention = 2 * attended * heads * model.head_size
        feed_forward = 3 * model.hidden_size * model.feed_forward_size / self.ways("F")
        layer = tokens * (projections + attention) + self._expert_rows(tokens) * feed_forward
        everyone = self.sequences * self.num_groups
        head = everyone * model.hidden_size * model.vocab_size / self.ways("V")
        return 2 * (model.num_layers * layer + head)

    def _expert_rows(self, tokens: int) -> float:
        """Number of rows that the busiest chip sends through feed-forward networks or experts."""
        model, chips, met = self.workload.model, self.ways("E"), self._tokens_met(tokens)
        if not model.is_moe:
            return float(met)
        if self.computes_every_expert(tokens):
            return met * model.num_experts / chips
        chosen = model.experts_per_token
        return busiest_pairs(met, model.num_experts, chosen, chips, self._replicas)

    def seconds(self, tokens: int, sequences: int, attended: int) -> EstimatedSeconds:
        """Seconds of a step of `tokens` tokens that reads the pages of `sequences` sequences.

        `attended` is the number of tokens that each token attends to on average. The whole step is
        one compiled program.
        """
        chip = self.topology.chip
        return EstimatedSeconds(
            memory=self.moved_bytes(tokens, sequences) / chip.bandwidth,
            compute=self.operations(tokens, attended) / chip.peak(self.workload.product_dtype),
            network=self.network_seconds(*self.collectives(tokens)),
            launch=launch_seconds(self.num_arguments, self.topology.chips),
        )

    def temporary_bytes(self, tokens: int) -> float:
        """Bytes of intermediate results on the busiest chip at the widest place of a layer.

        They are the rows of the residual, the projections and the feed-forward networks, in four
        bytes each, because products of int8 are summed in int32.
        """
        model = self.workload.model
        rows = tokens * 4 * model.hidden_size
        inner = 2 * model.hidden_size + 3 * model.feed_forward_size / self.ways("F")
        return 4 * (rows + self._expert_rows(tokens) * inner)

    @property
    def num_arguments(self) -> int:
        """Number of arrays that a step is given: parameters, pages, and a few more."""
        _, parameters = self._parameters[0]
        of_layer = sum(name.startswith("layers.") for name in parameters)
        layers, outer = self.workload.model.num_layers, len(parameters) - of_layer
        return layers * (of_layer + 1) + outer + _OTHER_ARGUMENTS

    def network_seconds(self, layer: Sequence[Collective], outer: Sequence[Collective]) -> float:
        """Seconds of all collectives of a step: those of each layer, and those around them."""
        chip = self.topology.chip

        def seconds(collectives: Sequence[Collective]) -> float:
            return sum((item.seconds(chip.network, chip.latency) for item in collectives), 0.0)

        return self.workload.model.num_layers * seconds(layer) + seconds(outer)

    def collectives(self, tokens: int) -> tuple[tuple[Collective, ...], tuple[Collective, ...]]:
        """Collectives of one layer, and those before and behind all layers.

        They are those that the serving step writes by its layout.
        """
        model = self.workload.model
        row = model.hidden_size * self.activation_bytes
        letters = "EF" if model.is_moe else "F"
        layer = [*self._sums(tokens * row, "N")]
        gathered = self.ways(letters, with_tokens=True)
        if gathered > 1:
            layer.append(Collective("all-gather", tokens * gathered * row, gathered, False))
        layer += self._sums(tokens * gathered * row, letters)
        everyone = self.sequences * self.num_groups
        outer = [*self._sums(tokens * self.ways("V", with_tokens=True) * row, "V")]
        if self.num_groups > 1:
            outer.append(Collective("all-gather", everyone * row, self.num_groups, False))
        if self.ways("V") > 1:
            logits = everyone * model.vocab_size * 4
            outer.append(Collective("all-gather", logits, self.ways("V"), False))
        return tuple(layer), tuple(outer)

    def _sums(self, nbytes: int, letters: str) -> Iterator[Collective]:
        """Collectives that sum what devices computed with their parts of the letters."""
        shared = self.ways(letters, with_tokens=True)
        if shared > 1:
            yield Collective("reduce-scatter", nbytes, shared, False)
        rest = self.ways(letters, with_tokens=False)
        if rest > 1:
            yield Collective("all-reduce", nbytes // shared, rest, False)
