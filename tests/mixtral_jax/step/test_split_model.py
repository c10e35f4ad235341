"""The options that programs of a step are compiled with."""

import pytest

from mixtral_jax.step.split_model import compiler_options


def test_conditions_are_part_of_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = compiler_options("gpu")
    assert options is not None
    kinds = options["xla_gpu_enable_command_buffer"].split(",")
    assert {"FUSION", "CUSTOM_CALL", "CONDITIONAL", "WHILE"} <= set(kinds)


def test_other_platforms_have_no_graphs() -> None:
    assert compiler_options("cpu") is None and compiler_options("tpu") is None


def test_a_list_in_the_environment_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=")
    assert compiler_options("gpu") is None
