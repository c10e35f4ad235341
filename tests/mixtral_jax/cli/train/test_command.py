"""`mixtral-jax train` from files to an adapter, and again."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixtral_jax.checkpoint.adapter import read_adapter
from mixtral_jax.checkpoint.pretrained import load, open_pretrained
from mixtral_jax.cli.main import app
from mixtral_jax.errors import UserError
from mixtral_jax.generation import generate
from mixtral_jax.training.bookings import bookings, write_bookings


def train(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["train", "--model=tiny-random", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.mark.slow
def test_a_run_writes_its_adapter_and_the_same_command_finds_it_done(tmp_path: Path) -> None:
    write_bookings(tmp_path / "a.jsonl", bookings(12, seed=1))
    write_bookings(tmp_path / "b.jsonl", bookings(3, seed=1, held_out=True))
    output = tmp_path / "tables"
    command = [
        f"--data={tmp_path}/a.jsonl",
        f"--validation={tmp_path}/b.jsonl",
        f"--output={output}",
        *("--steps=2", "--rows=2", "--length=128", "--rank=2", "--targets=q,router,down"),
        *("--set=samples=1", "--set=validate_every=1", "--mesh=expert=1"),
    ]
    text = train(*command)
    assert "rows of 128" in text
    assert "attention" in text and "router" in text and "feed-forward" in text
    assert "for 1 more steps, by the first one's" in text
    assert "validation loss" in text
    assert f"--adapter tables={output}/adapter" in text.splitlines()[-1]
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    once = ["step", "validation", "sample"]
    assert kinds == [*once, *once, "checkpoint", "end"]
    assert lines[2]["expected"].startswith("name=") and lines[2]["answered"]
    for name in ("asked", "expected", "answered", "base", "tuned"):
        assert f"\n{name:8} " in text
    assert (output / "curves.png").exists()
    stored = read_adapter(output / "adapter", open_pretrained("tiny-random").card.model)
    assert stored.rank == 2 and {"q", "router", "down"} <= set(stored.settings.targets)
    assert stored.base == "tiny-random"
    result = CliRunner().invoke(app, ["train", "--model=tiny-random", *command, "--seed=1"])
    assert "is of a run with seed=0, and this run has seed=1" in str(result.exception)
    again = train(*command)
    assert "goes on from step 2 of 2" in again
    assert "is there already" in again
    assert read_adapter(output / "adapter", open_pretrained("tiny-random").card.model).digest == (
        stored.digest
    )


@pytest.mark.soak
def test_all_parameters_are_trained_and_saved(tmp_path: Path) -> None:
    write_bookings(tmp_path / "a.jsonl", bookings(4, seed=1))
    text = train(
        f"--data={tmp_path}/a.jsonl",
        f"--output={tmp_path}/run",
        *("--full", "--steps=1", "--rows=2", "--length=128", "--mesh=expert=1"),
        *("--set=samples=1", "--learning-rate=1e-2"),
    )
    assert f"serve it: mixtral-jax serve --model {tmp_path}/run/model" in text
    tuned, tokenizer = load(tmp_path / "run/model")
    base, _ = load("tiny-random")
    words = (
        "".join(generate(m, tokenizer, "hi", max_tokens=8, temperature=0.0)) for m in (tuned, base)
    )
    assert len(set(words)) == 2


@pytest.mark.soak
def test_pairs_of_answers_are_learnt(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no!"}],
        }
        for i in range(5)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = train(
        f"--data={tmp_path}/a.jsonl",
        f"--validation={tmp_path}/a.jsonl",
        f"--output={tmp_path}/run",
        *("--steps=8", "--rows=2", "--length=32", "--rank=2", "--targets=q,v", "--mesh=expert=1"),
        *("--set=objective=preference", "--set=beta=0.2", "--set=validate_every=8"),
        *("--learning-rate=2e-2", "--set=samples=1"),
    )
    assert "5 pairs of a preferred answer" in text and "beta 0.2" in text
    assert "2.67 epochs of 3" in text
    assert "expected yes" in text
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    # The adapter changes nothing yet: the two are as likely as before, and the loss is log 2.
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert [line["targets"] for line in steps[:3]] == [2, 2, 1]
    (validation,) = (line for line in lines if line["kind"] == "validation")
    assert validation["targets"] == 5 and validation["accuracy"] == 1
    assert validation["margin"] > 0.05 and validation["loss"] < 0.68


def test_a_bad_row_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1 has messages"):
        train(f"--data={tmp_path}/a.jsonl", f"--output={tmp_path}/out")
