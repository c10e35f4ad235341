"""The share of a GPU's memory that JAX takes."""

import pytest

from serving.launch.gpu_memory import take_gpu_memory


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"XLA_CLIENT_MEM_FRACTION": "0.95"}),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}),
        # JAX refuses to start with both.
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".6"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".6"}),
    ],
)
def test_what_the_operator_says_stays(given: dict[str, str], expected: dict[str, str]) -> None:
    take_gpu_memory(given)
    assert given == expected
