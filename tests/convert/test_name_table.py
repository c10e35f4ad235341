"""The table covers every parameter of every model, and says the same as the files of others."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from convert import name_table as mapping
from mixtral_jax.checkpoint.parameters import parameter_shapes
from mixtral_jax.config import ModelConfig
from mixtral_jax.hf_config import from_hf
from tests.support import sources

DENSE = from_hf(sources.DENSE)
MOE = from_hf(sources.MOE)


def names(dialect: str, variant: int) -> set[str]:
    """The names by which one way of storing experts is recognised."""
    table = mapping.DIALECTS[dialect]
    prefix = table.prefix.format(i=0)
    return {prefix + line.theirs.format(e=0) for line in table.experts[variant]}


@pytest.mark.parametrize(
    "config", [DENSE, MOE, replace(DENSE, tied_embeddings=True), ModelConfig.smollm2_135m()]
)
@pytest.mark.parametrize("dialect, variant", [(d, v) for d in mapping.DIALECTS for v in (0, -1)])
def test_every_element_comes_from_one_place(
    config: ModelConfig, dialect: str, variant: int
) -> None:
    table = mapping.name_table(config, dialect, names(dialect, variant)).rows
    shapes = parameter_shapes(config, "float32")
    assert {row.parameter for row in table} == shapes.keys()
    taken: dict[str, list[tuple[int, int]]] = {}
    for row in table:
        taken.setdefault(row.source, []).append((row.start, row.start + row.size))
    for name, array in shapes.items():
        mine = sorted((row for row in table if row.parameter == name), key=lambda row: row.index)
        assert [row.index for row in mine] == list(range(len(mine)))
        assert sum(row.size for row in mine) == array.size
    # And nothing of a source is left over, or used twice.
    for row in table:
        ends = sorted(taken[row.source])
        assert ends[0][0] == 0 and ends[-1][1] == np.prod(row.shape)
        assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))


@pytest.mark.parametrize("config", [sources.DENSE, sources.MOE])
def test_names_and_shapes_are_those_of_the_files(config: dict[str, Any]) -> None:
    hf = sources.tensors(config)
    ours = from_hf(config)
    forms = {"hf": hf, "mistral": sources.consolidated(hf), "gguf": sources.ggml(hf)}
    for dialect, tensors in forms.items():
        table = mapping.name_table(ours, dialect, tensors).rows
        assert {row.source: row.shape for row in table} == {
            name: value.shape for name, value in tensors.items()
        }


def test_fused_experts() -> None:
    """E=3 experts of 2F=192 rows of D=32: expert 1's up half begins after 1*6144 + 3072."""
    fused = sources.fused(sources.tensors(sources.MOE))
    table = mapping.name_table(MOE, "hf", fused).rows
    assert {row.source for row in table} == fused.keys()
    (row,) = [r for r in table if r.parameter == "layers.2.feed_forward.up.weight" and r.index == 1]
    assert row.source == "model.layers.2.mlp.experts.gate_up_proj"
    assert (row.shape, row.start, row.size) == ((3, 192, 32), 9216, 3072)


def test_only_queries_and_keys_are_reordered() -> None:
    def reordered(dialect: str) -> set[str]:
        return {r.parameter for r in mapping.name_table(MOE, dialect).rows if r.interleaved}

    heads = {f"layers.{i}.attention.{part}.weight" for i in range(3) for part in "qk"}
    assert reordered("hf") == set()
    assert reordered("mistral") == reordered("gguf") == heads


def test_upcycled_puts_the_dense_matrices_into_every_expert() -> None:
    table = mapping.name_table(DENSE, "hf", upcycle_experts=4).rows
    gate = [row for row in table if row.parameter == "layers.1.feed_forward.gate.weight"]
    assert [row.index for row in gate] == [0, 1, 2, 3]
    assert {row.source for row in gate} == {"model.layers.1.mlp.gate_proj.weight"}
    assert len([row for row in table if row.parameter == "layers.1.attention.q.weight"]) == 1
    norms = [row for row in table if row.parameter == "layers.1.feed_forward_norm.weight"]
    assert len(norms) == 1
