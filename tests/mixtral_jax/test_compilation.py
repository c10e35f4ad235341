"""Compilations are counted while somebody counts, and compiled programs are kept for a model."""

import copy

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax import compilation
from mixtral_jax.compilation import CompilationCount, CompiledPrograms, keep_programs
from mixtral_jax.errors import ConfigError


def test_programs_in_a_store_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "find_spec", lambda module: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "s3://bucket/xla")
    with pytest.raises(ConfigError, match="is s3://bucket/xla.* pip install s3fs, or name a fol"):
        keep_programs()
    monkeypatch.setattr(compilation, "find_spec", lambda module: module)
    keep_programs()  # and leaves the rest to jax


def test_a_count_ends_when_it_is_closed() -> None:
    with CompilationCount() as count:
        jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
        during = count.value
    jax.jit(lambda x: x + 2)(jnp.zeros(4)).block_until_ready()
    assert during > 0
    assert count.value == during


def test_the_programs_longest_unused_are_dropped() -> None:
    programs = CompiledPrograms(limit=2)
    programs.keep("a", 1)
    programs.keep("b", 2)
    assert programs.get("a") == 1
    programs.keep("c", 3)
    assert [programs.get(key) for key in "abc"] == [1, None, 3]


def test_kept_programs_are_no_part_of_a_model() -> None:
    programs = CompiledPrograms()
    programs.keep("a", 1)
    other = copy.deepcopy(programs)
    assert other.get("a") is None
    assert programs == other and hash(programs) == hash(other)
