"""The search for the best split."""

from dataclasses import replace

import pytest

from mixtral_jax.errors import ConfigError
from mixtral_jax.planning.search import Search
from mixtral_jax.roofline.chips import topologies
from tests.support.plan_workload import DENSE, SMALL, workload_of


def test_a_missing_compiler_means_arithmetic_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_jax.planning.topology._COMPILERS", {"tpu": ("no_such_compiler",)})
    notes: list[str] = []
    search = Search(workload_of(SMALL), "auto", False, 1, notes.append, compiles=True)
    best = search.best_of(topologies("tpu:v5e:2x4"), lambda line: None)[0]
    assert best.method == "arithmetic"
    assert "mixtral-jax[plan]" in notes[0]


def test_sequences_are_split_over_a_mesh_that_is_given() -> None:
    with pytest.raises(ConfigError, match="--dp-attention is for the split of --mesh"):
        Search(workload_of(SMALL), "auto", True, 1, print, compiles=False)
    search = Search(workload_of(SMALL), "tensor=8", True, 1, print, compiles=False)
    with pytest.raises(ConfigError, match="give --mesh with expert=2 or more"):
        search.best_of(topologies("cpu:8"), lambda line: None)


def test_a_batch_that_no_split_can_hold() -> None:
    config = replace(DENSE, num_heads=3, num_kv_heads=3, vocab_size=513)
    search = Search(workload_of(config, batch=1), "auto", False, 1, print, compiles=False)
    with pytest.raises(ConfigError, match="cannot be split over 8 chips"):
        search.best_of(topologies("cpu:8"), lambda line: None)
