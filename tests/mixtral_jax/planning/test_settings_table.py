"""Every row of the table of settings in docs/numbers.md: what it names fits, and starts."""

import pytest

from benchmarks.settings_table import BEGIN, CHIPS, END, MODELS, NUMBERS, chosen, workload_for
from mixtral_jax.planning.plan import plan_by_arithmetic
from mixtral_jax.roofline.chips import topologies
from mixtral_jax.roofline.page_memory import page_memory, temporary_memory
from mixtral_jax.roofline.settings import context_that_fits, split_placement, step_buckets
from mixtral_jax.roofline.split import Split
from mixtral_jax.sharding import mesh_sizes
from serving.scheduling.scheduler import Scheduler
from serving.scheduling.step_plan import Limits


def rows() -> list[list[str]]:
    """The cells of the rows in docs/numbers.md."""
    table = NUMBERS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    lines = table.splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_every_chip_and_model() -> None:
    """Nothing is left out that fits: 24 GB cards hold no 8x22B in bfloat16, 4090s two models."""
    names = {(row[0], row[1], row[2].rpartition(":")[0]) for row in rows()}
    expected = {
        (title, dtype, chip) for title in MODELS for dtype in ("bfloat16", "int8") for chip in CHIPS
    }
    assert expected - names == {
        ("Mixtral-8x22B", "bfloat16", "gpu:l4"),
        ("Mixtral-8x22B", "bfloat16", "gpu:rtx4090"),
        ("Mixtral-8x22B", "int8", "gpu:rtx4090"),
        ("Mixtral-8x7B", "bfloat16", "gpu:rtx4090"),
    }


@pytest.mark.parametrize("row", rows(), ids=lambda row: " ".join(row[:3]))
def test_a_row_starts_with_its_settings(row: list[str]) -> None:
    title, dtype, name, mesh = row[:4]
    (topology,) = topologies(name)
    workload = workload_for(MODELS[title], dtype, topology.platform)
    split = Split.of(
        workload.model, *mesh_sizes(mesh.partition(" ")[0].strip("`")), "--dp-attention" in mesh
    )
    settings = chosen(workload, topology, split)
    placement = split_placement(workload, topology, split)
    groups = placement.num_sequence_groups
    plan = plan_by_arithmetic(workload, topology, split)
    assert plan.fits
    chip = topology.chip
    pages = page_memory(chip.memory, plan.weight_bytes)
    assert plan.weight_bytes + pages + temporary_memory(chip.memory) <= chip.memory
    sizes = settings.max_sequences // groups, settings.max_step_tokens // groups
    buckets = step_buckets(*sizes, few=True)
    context = context_that_fits(workload.model, placement, chip, settings)
    limits = Limits(
        num_pages=context // settings.page_size,
        page_size=settings.page_size,
        max_sequences=sizes[0],
        max_step_tokens=sizes[1],
        max_context=context,
        max_waiting=1,
    )
    Scheduler(limits)
    assert limits.room == context >= workload.context
    assert len(buckets) <= 6 and buckets[-1] == sizes[1] >= 2 * sizes[0]
    # A step of the widest bucket computes in what is set aside for it.
    assert plan.estimate.temporary_bytes(buckets[-1]) <= temporary_memory(chip.memory)
    assert [*row[4:6], *row[7:10]] == [
        f"{settings.max_sequences}",
        f"{settings.max_step_tokens:,}",
        f"{settings.page_size}",
        settings.kv_dtype,
        f"{context:,}",
    ], "make settings-table"
