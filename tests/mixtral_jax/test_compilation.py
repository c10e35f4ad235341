"""Compilations are counted while somebody counts, and compiled programs are kept for a model."""

import copy

import jax
import jax.numpy as jnp

from mixtral_jax.compilation import CompilationCount, CompiledPrograms


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
