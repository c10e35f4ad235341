"""Settings by chip: how large the steps of an engine are, from the roofline of chip and model.

A step of answers alone reads the weights and the pages of every sequence, so its time is that of
the memory and hardly grows with the rows until it holds dozens of them; tokens of prompts ride
along for nothing until their products take as long as those reads. So

    sequences    as many as have room for 2,048 tokens each, and as keep a step of answers within
                 25 ms, or within twice the time that reading the weights takes
    step tokens  as many as it takes until products take as long as reads, beyond which a larger
                 step computes prompts no faster; and no more than keep a step within 25 ms, or
                 three times that of answers alone and 100 ms, so that answers keep their rhythm
                 beside a long prompt
    dtype of     the activations' own; int8, or fp8 where kernels read no int8, if a single
    the pages    sequence of the model's whole context would have no room otherwise
    page size    what the kernels fetch at once
    buckets      powers of four down from these two, because each of them is a program of the whole
                 model to compile

All are powers of two, computed once before the start, from published figures, for one group of
sequences; the same for the library, `plan` and `serve`. Where nothing is known of a chip they are
small, and on CPU they are those that were measured to be good there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax

from mixtral_jax.config import ModelConfig
from mixtral_jax.layout import Layout
from mixtral_jax.placement import Placement, flag_of
from mixtral_jax.roofline.chips import Chip, Topology, chip_of
from mixtral_jax.roofline.estimate import Estimate
from mixtral_jax.roofline.page_memory import page_memory, temporary_memory
from mixtral_jax.roofline.split import Split
from mixtral_jax.roofline.workload import Workload, unsplit_placement
from mixtral_jax.sharding import ShardingRules

TYPICAL_CONTEXT = 2048
STEP_SECONDS = 0.025  # forty tokens a second of each answer: faster than anybody reads
LONGEST_SECONDS = 0.1
_WEIGHTS_TIMES = 2
_ANSWERS_TIMES = 3
_LEAST_SEQUENCES, _MOST_SEQUENCES = 8, 256
_LEAST_TOKENS, _MOST_TOKENS = 128, 8192
_ON_CPU = (32, 128)  # sequences, and tokens of a step
_ON_UNKNOWN = (32, 512)
_SMALL = ("int8", "float8_e4m3fn")  # the more exact one first
_FEW_ROWS = 8
_FACTOR = 4  # from one bucket to the next


@dataclass(frozen=True, kw_only=True)
class GivenSettings:
    """Settings that are not to be chosen, by the names of their flags; None: by chip."""

    max_sequences: int | None = None
    max_step_tokens: int | None = None
    page_size: int | None = None
    kv_dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Sizes of an engine's steps on all devices together, and why they are so.

    Attributes:
        max_sequences: sequences that are computed together.
        max_step_tokens: tokens of a step.
        page_size: tokens of a page.
        kv_dtype: of keys and values.
        reasons: for each of these, in this order, a clause that says why.
    """

    max_sequences: int
    max_step_tokens: int
    page_size: int
    kv_dtype: str
    reasons: tuple[str, str, str, str]

    @property
    def lines(self) -> list[str]:
        """A line for each setting: its flag, its value and the reason."""
        values = (self.max_sequences, self.max_step_tokens, self.page_size, flag_of(self.kv_dtype))
        names = ("--max-sequences", "--max-step-tokens", "--page-size", "--kv-dtype")
        return [
            f"{name} {value}: {reason}"
            for name, value, reason in zip(names, values, self.reasons, strict=True)
        ]


def chip_under(placement: Placement) -> Chip | None:
    """The figures of the devices that a model is placed on; None for CPUs and unknown chips."""
    layout = placement.layout
    device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
    return chip_of(device.platform, device.device_kind)


def settings_by_chip(
    model: ModelConfig,
    placement: Placement,
    chip: Chip | None,
    given: GivenSettings | None = None,
    memory: int | None = None,
) -> StepSettings:
    """Chooses the sizes of an engine's steps for a model on its devices.

    Args:
        model: its sizes.
        placement: of the model.
        chip: figures of one of the placement's devices; None where they are unknown.
        given: settings that stay as they are.
        memory: bytes of pages on one device; None for what the chip has beside the weights.

    Raises ConfigError for a dtype of keys and values that these devices do not have.
    """
    given = given or GivenSettings()
    page_size = given.page_size or placement.page_size
    of_pages = "given" if given.page_size else f"what the {placement.kernels.platform} kernels read"
    if chip is None:
        return _without_figures(model, placement, given, page_size, of_pages)
    first, of_dtype = _with_kv_dtype(model, placement, chip, given, page_size, memory)
    groups, room = first.num_groups, _memory(first, memory)
    within = "" if groups == 1 else f", in each of {groups} groups of sequences"
    if given.max_sequences is not None:
        sequences, of_sequences = -(-given.max_sequences // groups), "given"
    else:
        highest = _MOST_SEQUENCES
        if given.max_step_tokens is not None:
            highest = min(highest, max(1, given.max_step_tokens // groups))
        sequences, reason = _sequences(first, room, highest)
        of_sequences = reason + within
    if given.max_step_tokens is not None:
        tokens, of_tokens = -(-given.max_step_tokens // groups), "given"
    else:
        tokens, reason = _tokens(first, sequences)
        of_tokens = reason + within
    return StepSettings(
        max_sequences=given.max_sequences or sequences * groups,
        max_step_tokens=given.max_step_tokens or tokens * groups,
        page_size=page_size,
        kv_dtype=first.kv_dtype,
        reasons=(of_sequences, of_tokens, of_pages, of_dtype),
    )


def split_placement(workload: Workload, topology: Topology, split: Split) -> Placement:
    """The placement that a model has on a topology under a split, of devices that are not here."""
    placement = unsplit_placement(workload.dtype, topology.platform, workload.weight_dtypes)
    rules = ShardingRules.of(workload.model, split.mesh, split.dp_attention)
    return replace(placement, layout=Layout(split.mesh, rules))


def settings_for_split(workload: Workload, topology: Topology, split: Split) -> StepSettings:
    """The settings that `serve` chooses for a model on these chips under this split."""
    placement = split_placement(workload, topology, split)
    chip = topology.chip if placement.kernels.whole_step else None
    given = GivenSettings(kv_dtype=workload.kv_dtype)
    return settings_by_chip(workload.model, placement, chip, given)


def context_that_fits(
    model: ModelConfig,
    placement: Placement,
    chip: Chip,
    settings: StepSettings,
    memory: int | None = None,
) -> int:
    """Tokens of the longest sequence for which there are pages; 0 where the weights do not fit."""
    estimate = _estimate(model, placement, chip, settings.kv_dtype, settings.page_size)
    pages = _memory(estimate, memory) // estimate.page_bytes
    whole = replace(estimate.workload, context=model.max_context)
    if pages >= whole.pages_per_sequence:
        return model.max_context
    return pages * settings.page_size


def estimate_of(
    model: ModelConfig, placement: Placement, chip: Chip, settings: StepSettings, batch: int
) -> Estimate:
    """The arithmetic of steps of `batch` sequences of 2,048 tokens with these settings."""
    estimate = _estimate(model, placement, chip, settings.kv_dtype, settings.page_size)
    return estimate.with_batch(batch)


def step_buckets(max_sequences: int, max_step_tokens: int, few: bool) -> tuple[int, ...]:
    """Numbers of tokens that a step of one group is padded to, from small to large.

    They are 1, 8, powers of two from 32 on, and the numbers that fill all rows or a whole step:
    padding takes a part of a step's time on a CPU, from what a step beside answers has for chunks
    of prompts too. With `few`, for accelerators, they are at most six: there a step of one token
    takes as long as one of dozens, and each bucket is a program of the whole model to compile.
    """
    if few:
        rows = min(max(max_sequences, _FEW_ROWS), max_step_tokens)
        sizes = {*_down(max_step_tokens, rows)}
        if rows >= 2 * _FEW_ROWS:
            sizes |= {*_down(rows, _FEW_ROWS)}
    else:
        sizes = {1, _FEW_ROWS, max_sequences, max_step_tokens}
        size = _FEW_ROWS * _FACTOR
        while size < max_step_tokens:
            sizes.add(size)
            size *= 2
    return tuple(sorted(size for size in sizes if size <= max_step_tokens))


def _down(highest: int, lowest: int) -> Iterator[int]:
    """Numbers from the highest to the lowest, each a quarter of the one before, or less."""
    yield highest
    size = -(-highest // _FACTOR)
    while size > 2 * lowest:
        yield size
        size = -(-size // _FACTOR)
    yield lowest


def _without_figures(
    model: ModelConfig,
    placement: Placement,
    given: GivenSettings,
    page_size: int,
    of_pages: str,
) -> StepSettings:
    """Settings where no figures of the chip are known, or it is a CPU."""
    is_known = not placement.kernels.whole_step
    sequences, tokens = _ON_CPU if is_known else _ON_UNKNOWN
    reason = "the default on CPU" if is_known else "careful, as the chip's figures are unknown"
    sequences = given.max_sequences or min(sequences, given.max_step_tokens or sequences)
    tokens = given.max_step_tokens or max(tokens, sequences)
    return StepSettings(
        max_sequences=sequences,
        max_step_tokens=tokens,
        page_size=page_size,
        kv_dtype=placement.checked_kv_dtype(given.kv_dtype, model),
        reasons=(
            "given" if given.max_sequences else reason,
            "given" if given.max_step_tokens else reason,
            of_pages,
            "given" if given.kv_dtype else "as they are computed",
        ),
    )


def _estimate(
    model: ModelConfig, placement: Placement, chip: Chip, kv_dtype: str, page_size: int
) -> Estimate:
    """The arithmetic of a placement, of one sequence of a typical context in each group."""
    layout = placement.layout
    split = Split(data=1, expert=1, tensor=1, copies=1, dp_attention=False)
    if layout is not None:
        sizes = layout.mesh.shape
        split = Split(
            data=sizes["data"],
            expert=sizes["expert"],
            tensor=sizes["tensor"] * sizes["copy"],
            copies=sizes["copy"],
            dp_attention="expert" in layout.rules.B,
        )
    workload = Workload(
        model=model,
        dtype=placement.dtype,
        kv_dtype=kv_dtype,
        batch=placement.num_sequence_groups,
        context=min(TYPICAL_CONTEXT, model.max_context),
        prefill_tokens=1,
        page_size=page_size,
        weight_dtypes=placement.weight_dtypes,
    )
    platform = placement.kernels.platform
    chips = -(-split.chips // chip.devices)
    topology = Topology(platform=platform, kind="", slice=str(chips), chip=chip)
    return Estimate(workload=workload, topology=topology, split=split)


def _memory(estimate: Estimate, memory: int | None) -> int:
    """Bytes of pages on one device."""
    if memory is not None:
        return memory
    return page_memory(estimate.topology.chip.memory, estimate.weights.total)


def _with_kv_dtype(
    model: ModelConfig,
    placement: Placement,
    chip: Chip,
    given: GivenSettings,
    page_size: int,
    memory: int | None,
) -> tuple[Estimate, str]:
    """The arithmetic with the dtype of keys and values that is chosen, and why it is."""
    own = placement.checked_kv_dtype(given.kv_dtype, model)
    estimate = _estimate(model, placement, chip, own, page_size)
    if given.kv_dtype is not None:
        return estimate, "given"
    pages = _memory(estimate, memory) // estimate.page_bytes
    needed = replace(estimate.workload, context=model.max_context).pages_per_sequence
    fitting = f"{pages * page_size:,} tokens fit, and the model's context has {model.max_context:,}"
    small = next((name for name in _SMALL if placement.has_pages(model, page_size, name)), None)
    if pages >= needed or small is None:
        return estimate, f"as they are computed; {fitting}"
    return _estimate(model, placement, chip, small, page_size), f"of {own} {fitting}"


def _sequences(first: Estimate, room: int, highest: int) -> tuple[int, str]:
    """The sequences of one group, and why."""
    pages = first.workload.pages_per_sequence * first.page_bytes
    context, fitting = first.workload.context, room // pages
    chosen, seconds = 1, 0.0
    while 2 * chosen <= highest:
        rows = 2 * chosen
        estimate = first.with_batch(rows * first.num_groups)
        answers = estimate.seconds(rows, rows, first.workload.attended_tokens)
        weights = estimate.seconds(rows, 0, 0)
        is_slow = answers.total > max(STEP_SECONDS, _WEIGHTS_TIMES * weights.total)
        if rows > _LEAST_SEQUENCES and (rows > fitting or is_slow):
            break
        chosen, seconds = rows, answers.total
    return chosen, (
        f"{fitting:,} sequences of {context:,} tokens fit, and a step of {chosen} takes about "
        f"{seconds * 1e3:.1f} ms"
    )


def _tokens(first: Estimate, sequences: int) -> tuple[int, str]:
    """The tokens of a step of one group, and why."""
    estimate = first.with_batch(sequences * first.num_groups)
    attended = first.workload.attended_tokens
    answers = estimate.seconds(sequences, sequences, attended).total
    limit = max(STEP_SECONDS, min(_ANSWERS_TIMES * answers, LONGEST_SECONDS))
    room = temporary_memory(first.topology.chip.memory)
    chosen = _LEAST_TOKENS
    while chosen < 2 * sequences:
        chosen *= 2
    while 2 * chosen <= _MOST_TOKENS:
        present = estimate.seconds(chosen, sequences, attended)
        longer = estimate.seconds(2 * chosen, sequences, attended)
        if present.compute >= present.memory or longer.total > limit:
            break
        if estimate.temporary_bytes(2 * chosen) > room:
            break
        chosen *= 2
    seconds = estimate.seconds(chosen, sequences, attended)
    return chosen, (
        f"such a step takes about {seconds.total * 1e3:.1f} ms, one of {sequences} answers alone "
        f"{answers * 1e3:.1f} ms"
    )
