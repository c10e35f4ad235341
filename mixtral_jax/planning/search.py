"""The search for the best split: all splits by arithmetic, the best of them with the compiler."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.planning.compiler import compile_in_subprocess
from mixtral_jax.planning.compiler_process import CompileError
from mixtral_jax.planning.plan import (
    Plan,
    best_first,
    compile_job,
    plan_by_arithmetic,
    with_compiler,
)
from mixtral_jax.planning.topology import installed
from mixtral_jax.roofline.chips import Topology
from mixtral_jax.roofline.settings import settings_for_split
from mixtral_jax.roofline.split import Split, candidates
from mixtral_jax.roofline.workload import Workload
from mixtral_jax.sharding import mesh_sizes

# Seconds from the start within which the compilation of another split must be likely to end.
_TIME_LIMIT = 150.0
# A plan whose arithmetic exceeds the chip's memory by this factor is not compiled.
_TOO_LARGE = 1.1

_MODELS: dict[str, Callable[[], ModelConfig]] = {
    "mistral-7b-v0.1": ModelConfig.mistral_7b_v01,
    "mistral-7b-instruct-v0.1": ModelConfig.mistral_7b_v01,
    "mistral-7b-instruct-v0.2": ModelConfig.mistral_7b_instruct_v02,
    "mistral-7b-v0.3": ModelConfig.mistral_7b_instruct_v03,
    "mistral-7b-instruct-v0.3": ModelConfig.mistral_7b_instruct_v03,
    "mixtral-8x7b-v0.1": ModelConfig.mixtral_8x7b_v01,
    "mixtral-8x7b-instruct-v0.1": ModelConfig.mixtral_8x7b_v01,
    "mixtral-8x22b-instruct-v0.1": ModelConfig.mixtral_8x22b_instruct_v01,
    "mathstral-7b-v0.1": ModelConfig.mathstral_7b_v01,
    "codestral-22b-v0.1": ModelConfig.codestral_22b_v01,
    "mistral-small-instruct-2409": ModelConfig.mistral_small_22b_2409,
    "mistral-nemo-base-2407": ModelConfig.mistral_nemo_12b_2407,
    "mistral-nemo-instruct-2407": ModelConfig.mistral_nemo_12b_2407,
    "mistral-small-24b-base-2501": ModelConfig.mistral_small_24b_2501,
    "mistral-small-24b-instruct-2501": ModelConfig.mistral_small_24b_2501,
    "smollm2-135m-instruct": ModelConfig.smollm2_135m,
    "tiny-random": lambda: ModelConfig.tiny(vocab_size=260),
}


def known_model(name: str) -> ModelConfig:
    """The config of a published model, by its name on Hugging Face with or without its owner.

    Raises ConfigError for any other name.
    """
    plain = name.rpartition("/")[2].lower()
    if plain not in _MODELS:
        raise ConfigError(
            f"no model is known as {name!r}; give one of {', '.join(_MODELS)}, or --checkpoint "
            "FOLDER"
        )
    return _MODELS[plain]()


class Search:
    """A search for the best split of one workload.

    Args:
        workload: the model and the traffic to plan for.
        mesh: "auto", or the only split to look at, such as "data=1,expert=8,tensor=1".
        dp_attention: the form of attention of that split; "auto" compares both.
        tries: number of splits that the compiler is asked about.
        note: called with a line for each thing that went otherwise than asked.
        compiles: False for arithmetic alone.
        by_chip: plan each split with the step of prompts, and the dtype of keys and values, that
            `serve` chooses there, in place of the workload's.

    Raises ConfigError for `dp_attention` without a split that it is about.
    """

    def __init__(
        self,
        workload: Workload,
        mesh: str,
        dp_attention: bool,
        tries: int,
        note: Callable[[str], None],
        compiles: bool,
        by_chip: bool = False,
    ) -> None:
        if dp_attention and mesh == "auto":
            raise ConfigError(
                "--dp-attention is for the split of --mesh, and all splits are compared with and "
                "without it; leave it out, or give --mesh with expert=2 or more"
            )
        self.workload = workload
        self.mesh = mesh
        self.dp_attention = dp_attention
        self.tries = tries
        self.note = note
        self.compiles = compiles
        self.by_chip = by_chip
        self.start = time.monotonic()

    def best_of(self, sizes: list[Topology], progress: Callable[[str], None]) -> list[Plan]:
        """Plans for the first topology that holds the workload, or for the last; the best first.

        Compiled plans come before those by arithmetic. `progress` is called with a line for each
        step of the search. Raises ConfigError where the model cannot be split over the chips.
        """
        if self.compiles and not installed(sizes[0].platform):
            self.compiles = False
            extra = "plan" if sizes[0].platform == "tpu" else "plan-gpu"
            self.note(
                f"no compiler for {sizes[0].platform} is installed, so this is arithmetic: "
                f"pip install 'mixtral-jax[{extra}]'"
            )
        if self.mesh != "auto" and len(sizes) > 1:
            chips = math.prod(mesh_sizes(self.mesh))
            sizes = [size for size in sizes if size.chips == chips] or sizes[-1:]
        plans: list[Plan] = []
        for topology in sizes:
            latest = self._plans(topology, progress, is_last=topology is sizes[-1])
            plans = latest or plans
            if latest and latest[0].fits:
                break
        if not plans:
            model = self.workload.model
            raise ConfigError(
                f"{model.num_experts or 'no'} experts, {model.num_kv_heads} key/value heads and a "
                f"batch of {self.workload.batch} cannot be split over {sizes[-1].chips} chips; "
                "take fewer, or a larger batch"
            )
        return plans

    def _plans(
        self, topology: Topology, progress: Callable[[str], None], is_last: bool
    ) -> list[Plan]:
        """Plans for one topology, the best first; empty where the model cannot be split over it."""
        progress(f"{topology}: comparing splits")
        splits = self._splits(topology)
        plans = best_first([plan_by_arithmetic(self.workload, topology, s) for s in splits])
        if self.by_chip:
            plans[: self.tries] = map(self._by_chip, plans[: self.tries])
        if not plans or not self.compiles:
            return plans
        if plans[0].total_bytes > _TOO_LARGE * topology.chip.memory and not is_last:
            return plans
        # A plan that is too large by arithmetic is compiled once, as it may need less in truth.
        tries = self.tries if plans[0].fits else 1
        compiled: list[Plan] = []
        refused: set[Split] = set()
        longest = 0.0
        for plan in plans:
            began = time.monotonic()
            if len(compiled) == tries or began - self.start + longest > _TIME_LIMIT:
                break
            try:
                compiled.append(self._compile(plan, f"{len(compiled) + 1}/{tries}", progress))
            except CompileError as error:
                refused.add(plan.split)
                self.note(f"{topology}, {plan.split}: {error}")
            longest = max(longest, time.monotonic() - began)
        if not compiled:
            self.note("so this is arithmetic")
            return plans
        done = refused | {plan.split for plan in compiled}
        return [*best_first(compiled), *(plan for plan in plans if plan.split not in done)]

    def _by_chip(self, plan: Plan) -> Plan:
        """The plan with what `serve` chooses for its topology and split."""
        settings = settings_for_split(self.workload, plan.topology, plan.split)
        workload = replace(
            self.workload, prefill_tokens=settings.max_step_tokens, kv_dtype=settings.kv_dtype
        )
        return plan_by_arithmetic(workload, plan.topology, plan.split)

    def _splits(self, topology: Topology) -> list[Split]:
        """All splits over the topology, or the only one that was asked for."""
        model = self.workload.model
        if self.mesh == "auto":
            return candidates(model, self.workload.batch, topology.chips)
        split = Split.of(model, *mesh_sizes(self.mesh), self.dp_attention)
        if split.chips != topology.chips:
            raise ConfigError(
                f"--mesh {self.mesh} is for {split.chips} chips, {topology} has {topology.chips}; "
                "the sizes must multiply to that, or give --mesh auto"
            )
        return [split]

    def _compile(self, plan: Plan, number: str, progress: Callable[[str], None]) -> Plan:
        """The plan with the compiler's figures; raises CompileError."""
        title = f"{plan.topology}, split {number} ({plan.split})"
        progress(f"{title}: starting the compiler")
        report = compile_in_subprocess(compile_job(plan), lambda line: progress(f"{title}: {line}"))
        return with_compiler(plan, report)
