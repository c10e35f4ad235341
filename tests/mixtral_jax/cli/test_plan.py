"""`mixtral-jax plan`: its answers for programs and for people, and its refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixtral_jax.cli.main import app
from mixtral_jax.planning.topology import installed


def plan(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["plan", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout) if "--json" in arguments else result.stdout


ASKED = {"fits", "bytes_per_chip", "ms_per_decode_step", "tokens_per_second", "bound", "mesh"}


def test_the_command_by_arithmetic(tmp_path: Path) -> None:
    picture = tmp_path / "time.png"
    found = plan(
        "--model=mixtral-8x7b-instruct-v0.1",
        "--dtype=int8",
        "--topology=tpu:v5e:2x4",
        "--batch=32",
        "--context=2048",
        "--price=9.6",
        f"--png={picture}",
        "--estimate",
        "--json",
    )
    assert found.keys() >= ASKED | {"method", "longest_context", "largest_batch"}
    assert (found["fits"], found["method"], found["estimate"]) == (True, "arithmetic", True)
    cost = 9.6 / 3600 / found["tokens_per_second"] * 1e6
    assert found["cost_per_million_tokens"] == pytest.approx(cost)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_compiles_in_a_process_of_its_own() -> None:
    found = plan(
        "--model=tiny-random",
        "--dtype=float32",
        "--topology=cpu:4",
        "--mesh=data=2,expert=2",
        "--batch=4",
        "--context=64",
        "--prefill-tokens=32",
        "--json",
    )
    assert found.keys() >= ASKED
    assert (found["method"], found["mesh"]) == ("compiled", "data=2,expert=2,tensor=1")


def test_a_text_for_people() -> None:
    said = plan("--model=mistral-7b-v0.1", "--topology=gpu:h100:1", "--estimate", "--price=2")
    for part in ("fits", "weights", "capacity", "decode step", "estimates", "a million tokens"):
        assert part in said


def test_it_finds_a_slice_that_holds_8x22b_with_its_whole_context() -> None:
    found = plan(
        "--model=mixtral-8x22b-instruct-v0.1",
        "--dtype=int8",
        "--topology=tpu:v5e",
        "--batch=1",
        "--context=65536",
        "--estimate",
        "--json",
    )
    assert (found["topology"], found["fits"]) == ("tpu:v5e:4x4", True)
    assert found["longest_context"] == 65_536


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=gpt-4"], "no model is known as 'gpt-4'; give one of mistral-7b-v0.1"),
        ([], "give either --model NAME or --checkpoint FOLDER"),
        (["--checkpoint=/no/such"], "is not a mixtral-jax checkpoint"),
        (["--model=mixtral-8x7b-v0.1", "--mesh=expert=4"], "for 4 chips, tpu:v5e:2x4 has 8"),
        (["--model=mixtral-8x7b-v0.1", "--mesh=expert=3"], "cannot be split 3 ways"),
        (["--model=mixtral-8x7b-v0.1", "--context=99999"], "longer than the model's 32768"),
        (["--model=smollm2-135m-instruct", "--kv-dtype=int8"], "of 128 values .* are 3 of 64"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan("--topology=tpu:v5e:2x4", "--estimate", *arguments)


@pytest.mark.soak
@pytest.mark.skipif(not installed("tpu"), reason="libtpu is not installed")
def test_mixtral_in_int8_on_eight_small_tpus() -> None:
    """Full size: 32 sequences of 2,048 fit, hardly a byte moves needlessly, and no weight does."""
    found = plan(
        "--model=mixtral-8x7b-instruct-v0.1",
        "--dtype=int8",
        "--topology=tpu:v5e:2x4",
        "--mesh=expert=8",
        "--prefill-tokens=256",
        "--json",
    )
    assert found["method"] == "compiled"
    assert found["fits"]
    assert 1 <= found["bytes_over_least"] <= 1.15
    assert not found["collectives_move_weights"]
    assert "ragged_paged_attention_kernel" in found["kernels"]["decode"]
