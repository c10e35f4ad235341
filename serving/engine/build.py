"""Preparation of an engine: an EngineConfig becomes a model, its limits and its programs.

In a group of processes all have the same config, and so prepare the same.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version

import jax
from jax.typing import DTypeLike

from mixtral_jax.checkpoint.adapter import read_adapter
from mixtral_jax.checkpoint.pretrained import Pretrained
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError, TopologyError
from mixtral_jax.model.adapter_stack import StackSizes, slot_bytes
from mixtral_jax.model.transformer import Transformer, held_bytes
from mixtral_jax.placement import Placement
from mixtral_jax.roofline.page_memory import page_memory
from mixtral_jax.roofline.settings import (
    GivenSettings,
    StepSettings,
    chip_under,
    settings_by_chip,
    step_buckets,
)
from mixtral_jax.step.buckets import Steps, compile_buckets
from mixtral_jax.step.inputs import StepSizes, mask_words
from serving.engine.adapters import AdapterSlots
from serving.engine.cache_memory import cache_bytes
from serving.engine.config import EngineConfig
from serving.engine.device import Order
from serving.engine.drafts.draft import Draft, LoadedDraft, compile_draft
from serving.engine.engine import Engine
from serving.engine.expert_load import ExpertLoad
from serving.engine.grammars import Grammars
from serving.engine.runner import Runner
from serving.scheduling.guesses.drafts import Drafter
from serving.scheduling.guesses.guesser import Proposer
from serving.scheduling.guesses.lookup import LookUp
from serving.scheduling.rhythm import Rhythm
from serving.scheduling.step_plan import Limits

# Each process may have the checkpoint elsewhere, and its own memory.
_OF_ONE_PROCESS = {"model", "kv_memory", "adapter", "adapters_folder"}
_FEW_ROWS = 8


def rows_of(bucket: int, limits: Limits) -> int:
    """Returns the number of sequences that a step of `bucket` tokens has room for."""
    few = bucket <= _FEW_ROWS and not limits.deterministic
    return min(bucket, limits.max_sequences) if few else limits.max_sequences


def compile_steps(
    model: Transformer,
    limits: Limits,
    progress: Callable[[str], None] = lambda line: None,
    kv_dtype: DTypeLike | None = None,
    *,
    has_masks: bool = True,
    adapters: StackSizes | None = None,
    counts_experts: bool = False,
    buckets: Sequence[int] = (),
    may_be_late: bool = False,
) -> Steps:
    """Compiles all steps of an engine; `limits` are those of one partition.

    Without `has_masks` no request may have a form, and without `adapters`, the sizes of their
    stacks, none may have an adapter. `counts_experts` is for an engine that has an `ExpertLoad`.
    Steps are padded to `buckets`, the largest step among them; without any, to those that
    `step_buckets` gives.
    With `may_be_late` whole steps that the first answers can do without are left to the caller.
    """
    sizes = StepSizes(
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        max_sequences=limits.max_sequences,
        max_context=limits.max_context,
    )
    if not buckets:
        few = model.placement.kernels.whole_step
        buckets = step_buckets(limits.max_sequences, limits.max_step_tokens, few)
    rows = {bucket: rows_of(bucket, limits) for bucket in buckets}
    first = rows.keys() & {min(rows), limits.max_sequences, max(rows)}
    return compile_buckets(
        model,
        sizes,
        rows,
        progress,
        kv_dtype,
        has_masks=has_masks,
        adapters=adapters,
        counts_experts=counts_experts,
        first=first if may_be_late else None,
    )


def proposer_of(config: EngineConfig) -> Proposer | None:
    """Returns what guesses the tokens of answers, or None."""
    return LookUp.of if config.speculate == "lookup" else None


def engine_of(
    model: Transformer,
    limits: Limits,
    steps: Steps,
    broadcast: Callable[[Order], None] | None = None,
    expert_load: ExpertLoad | None = None,
    max_decode_slowdown: float | None = None,
    proposer: Proposer | None = None,
    drafter: Drafter | None = None,
) -> Engine:
    """Returns an engine for a model on its devices.

    All programs are compiled before the first request; after that they are called directly, and any
    other shape raises instead of compiling.

    Args:
        model: the parameters; must not be changed afterwards.
        limits: sizes of the cache and of a step; under a mesh that splits sequences, of one
            partition.
        steps: the result of `compile_steps` for the same shapes and limits.
        broadcast: see `Engine`.
        expert_load: sums up what steps count that were compiled with `counts_experts`.
        max_decode_slowdown: see `EngineConfig`; None for prompts as large as a step has room for.
        proposer: see `Engine`.
        drafter: see `Engine`.
    """
    masks = Grammars(mask_words(model.config.vocab_size))
    runner, slots = Runner(model, steps, expert_load), None
    if steps.adapters is not None:
        slots = AdapterSlots(model.config, steps.adapters.sizes)
    rhythm: Rhythm | None = None
    if max_decode_slowdown is not None:
        rhythm = Rhythm(max_decode_slowdown, sorted(steps.rows))
    return Engine(
        runner,
        limits,
        broadcast,
        masks,
        proposer,
        adapters=slots,
        put_layer=runner.put_layer,
        rhythm=rhythm,
        drafter=drafter,
    )


def facts(config: EngineConfig, pretrained: Pretrained) -> dict[str, str]:
    """Returns what must be the same in all processes of a group, by the name that users know."""
    card = pretrained.card
    values = dataclasses.asdict(config)
    values["dtype"] = pretrained.loadable_dtype(config.dtype)
    values["max_adapters"] = config.num_adapters
    values["no_prefix_reuse"] = not values.pop("prefix_reuse")
    stacks = stack_sizes(config, card.model)
    return {
        **({} if stacks is None else {"the targets of adapters": ", ".join(stacks.targets)}),
        "mixtral-jax": version("mixtral-jax"),
        "jax": jax.__version__,
        "the model": card.name,
        "the model's config": hashlib.sha256(repr(card.model).encode()).hexdigest()[:16],
        **{
            f"--{name.replace('_', '-')}": str(value)
            for name, value in values.items()
            if name not in _OF_ONE_PROCESS and value is not None
        },
    }


@dataclass(frozen=True)
class Prepared:
    """A loaded model and its compiled programs, of which an engine or a runner is made."""

    model: Transformer
    limits: Limits
    """Limits of one partition of the sequences."""
    steps: Steps
    mesh: str | None
    """The mesh as `mesh_text` writes it; None on one device."""
    draft: LoadedDraft | None = None
    """The draft model that guesses the tokens of answers."""

    @property
    def max_sequences(self) -> int:
        """The number of sequences that are computed together, of all partitions."""
        return self.limits.max_sequences * self.steps.num_sequence_groups


def prepare(
    config: EngineConfig,
    pretrained: Pretrained,
    say: Callable[[str], None],
    agree: Callable[[Limits], Limits] = lambda limits: limits,
) -> Prepared:
    """Loads the model and compiles its programs.

    Args:
        config: What the operator asked for.
        pretrained: The checkpoint.
        say: Called with a line for each stage.
        agree: In a group of processes, turns the limits that this process has room for into those
            that all have room for.

    Raises UserError if the model cannot be run so.
    """
    placement = pretrained.placement(config.dtype, config.mesh, config.dp_attention)
    _check(placement, config, pretrained.card.model)
    draft: Draft | None = None
    if config.draft_model is not None:
        draft = Draft.open(config.draft_model, pretrained, placement)
    abstract = Transformer(pretrained.card.model, placement, rngs=None)
    stacks = stack_sizes(config, pretrained.card.model)
    settings = _settings(abstract, config, stacks, draft)
    for line in settings.lines:
        say(line)
    limits = agree(_limits(abstract, config, stacks, settings, draft))
    if placement.layout is not None:
        say(f"{placement.layout.mesh.size} devices: {placement.mesh_text}")
    # Reading the weights and compiling for their shapes do not wait for one another.
    with ThreadPoolExecutor(1) as pool:
        say(f"loading {config.model}")
        model = pool.submit(pretrained.load, placement)
        tokens = placement.num_sequence_groups * limits.num_pages * limits.page_size
        say(f"room for {tokens:,} tokens of all requests together")
        buckets = _buckets(config, placement, limits)
        sizes = ",".join(str(size * placement.num_sequence_groups) for size in buckets)
        say(f"--step-buckets {sizes}: each is a program to compile")
        if stacks is not None:
            slot = slot_bytes(abstract.config, placement, stacks)
            say(f"room for {stacks.slots} adapters of {slot / 1e6:,.0f} MB on each device")
        steps = compile_steps(
            abstract,
            limits,
            say,
            settings.kv_dtype,
            adapters=stacks,
            counts_experts=config.expert_metrics,
            buckets=buckets,
            # The processes of a group must choose the same bucket for a step.
            may_be_late=jax.process_count() == 1,
        )
        if jax.process_count() > 1:
            steps.prepare_scores()  # later, all processes would wait for the slowest
        loaded = None if draft is None else _loaded(draft, pool, limits, settings, say)
        return Prepared(model.result(), limits, steps, placement.mesh_text, loaded)


def _loaded(
    draft: Draft,
    pool: ThreadPoolExecutor,
    model: Limits,
    settings: StepSettings,
    say: Callable[[str], None],
) -> LoadedDraft:
    """Loads a draft model in the pool's thread, and compiles its programs meanwhile."""
    limits = draft.limits(model)
    name, room = draft.pretrained.card.name, limits.num_pages * limits.page_size
    say(f"loading the draft model {name}, with room for {room:,} tokens")
    loaded = pool.submit(draft.load)
    kv_dtype = draft.kv_dtype(limits.page_size, settings.kv_dtype)
    steps = compile_draft(draft.abstract, limits, say, kv_dtype)
    return LoadedDraft(loaded.result(), limits, steps)


def prepare_loaded(
    config: EngineConfig, model: Transformer, say: Callable[[str], None]
) -> Prepared:
    """Compiles the programs for a model that is loaded already, in one process.

    Args:
        config: As for `prepare`; its model, type and mesh are those of the loaded one.
        model: The parameters; must not be changed afterwards.
        say: Called with a line for each stage.

    Raises UserError if the model cannot be run so.
    """
    _check(model.placement, config, model.config)
    stacks = stack_sizes(config, model.config)
    settings = _settings(model, config, stacks)
    limits = _limits(model, config, stacks, settings)
    steps = compile_steps(
        model,
        limits,
        say,
        settings.kv_dtype,
        has_masks=False,
        adapters=stacks,
        buckets=_buckets(config, model.placement, limits),
    )
    return Prepared(model, limits, steps, model.placement.mesh_text)


def _check(placement: Placement, config: EngineConfig, model: ModelConfig) -> None:
    """Raises UserError if the model cannot be served so on these devices."""
    layout = placement.layout
    num_devices = 1 if layout is None else layout.mesh.size
    if jax.process_count() > 1 and num_devices != jax.device_count():
        raise TopologyError(
            f"the mesh has {num_devices} devices; with several processes it must have all "
            f"{jax.device_count()} of them"
        )
    if config.deterministic:
        placement.check_deterministic(model)
    placement.checked_kv_dtype(config.kv_dtype, model)
    if config.expert_metrics and not model.is_moe:
        raise ConfigError(
            "--expert-metrics counts the tokens of experts, and this model has none; leave it out"
        )


def stack_sizes(config: EngineConfig, model: ModelConfig) -> StackSizes | None:
    """Returns the sizes of the stacks of adapters; None for an engine without any.

    Where no folder is watched, only the weights that the adapters of the start change have stacks.

    Raises AdapterError if one of these is broken or does not fit.
    """
    count, rank = config.num_adapters, config.max_adapter_rank
    if not count:
        return None
    if config.adapters_folder is not None:
        return StackSizes.all_targets(model, count, rank)
    folders = config.adapters.values()
    read = [read_adapter(folder, model, max_rank=rank) for folder in folders]
    targets = {target for stored in read for target in stored.settings.targets}
    return StackSizes(slots=count, rank=rank, targets=tuple(targets))


def _held(model: Transformer, stacks: StackSizes | None, draft: Draft | None) -> int:
    """Returns the bytes of all weights and of adapters' stacks on each device."""
    held = held_bytes(model) + (0 if draft is None else draft.held_bytes)
    if stacks is not None:
        held += stacks.slots * slot_bytes(model.config, model.placement, stacks)
    return held


def _settings(
    model: Transformer,
    config: EngineConfig,
    stacks: StackSizes | None,
    draft: Draft | None = None,
) -> StepSettings:
    """Returns the sizes of steps, by chip where the operator does not give them.

    They follow from published figures, not from what is free at the moment, so that all processes
    of a group choose the same, and `plan` does too.
    """
    placement = model.placement
    chip, memory = chip_under(placement), None
    if chip is not None:
        memory = page_memory(chip.memory, _held(model, stacks, draft))
    if config.kv_memory is not None and jax.process_count() == 1:
        memory = config.kv_memory << 20
    if memory is not None and draft is not None:
        memory = int(memory * _share_beside(draft, model, config))
    given = GivenSettings(
        max_sequences=config.max_sequences,
        max_step_tokens=config.max_step_tokens,
        page_size=config.page_size,
        kv_dtype=config.kv_dtype,
    )
    return settings_by_chip(model.config, placement, chip, given, memory)


def _buckets(config: EngineConfig, placement: Placement, limits: Limits) -> tuple[int, ...]:
    """Returns the buckets of one partition: the operator's, or those that follow from the chip."""
    if not config.buckets:
        few = placement.kernels.whole_step
        return step_buckets(limits.max_sequences, limits.max_step_tokens, few)
    groups = placement.num_sequence_groups
    largest = limits.max_step_tokens
    sizes = {-(-size // groups) for size in config.buckets}
    return (*sorted(size for size in sizes if size < largest), largest)


def _share_beside(draft: Draft, model: Transformer, config: EngineConfig) -> float:
    """Returns the share of the memory of pages that a draft leaves to the model."""
    placement = model.placement
    page_size = config.page_size or placement.page_size
    kv_dtype = placement.checked_kv_dtype(config.kv_dtype, model.config)
    page = placement.page_form(model.config, page_size, kv_dtype)
    own = model.config.num_layers * page.nbytes
    return own / (own + draft.page_bytes(page_size, kv_dtype))


def _limits(
    model: Transformer,
    config: EngineConfig,
    stacks: StackSizes | None,
    settings: StepSettings,
    draft: Draft | None = None,
) -> Limits:
    """Returns the limits of one partition of the sequences; settings are of all together."""
    layout = model.layout
    parts = 1 if layout is None else layout.num_sequence_groups
    max_sequences = -(-settings.max_sequences // parts)
    if config.kv_memory is not None:
        memory = config.kv_memory << 20
    else:
        memory = cache_bytes(_held(model, stacks, draft))
    max_context, page_size = model.config.max_context, settings.page_size
    page = model.placement.page_form(model.config, page_size, settings.kv_dtype)
    bytes_of_page = float(model.config.num_layers * page.nbytes)
    if draft is not None:
        bytes_of_page += draft.page_bytes(page_size, settings.kv_dtype)
    room = int(memory // bytes_of_page)
    num_pages = max(1, min(max_sequences * max_context // page_size, room))
    limits = Limits(
        num_pages=num_pages,
        page_size=page_size,
        max_sequences=max_sequences,
        max_step_tokens=max(-(-settings.max_step_tokens // parts), max_sequences),
        max_context=max_context,
        max_waiting=-(-config.max_waiting // parts),
        window=model.config.sliding_window,
        prefix_reuse=config.prefix_reuse,
        deterministic=config.deterministic,
    )
    return dataclasses.replace(limits, max_context=limits.room)
