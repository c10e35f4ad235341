"""`mixtral-jax train` from files to an adapter, and again."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixtral_jax.checkpoint.adapter import read_adapter
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.cli.main import app
from mixtral_jax.errors import UserError
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
        *("--steps=2", "--rows=2", "--length=128", "--rank=2", "--targets=q,v", "--mesh=expert=1"),
        *("--set=samples=1", "--set=validate_every=2"),
    ]
    text = train(*command)
    assert "rows of 128" in text
    assert "attention" in text
    assert "validation loss" in text
    assert f"--adapter tables={output}/adapter" in text.splitlines()[-1]
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds == ["step", "step", "validation", "checkpoint", "end"]
    assert (output / "curves.png").exists()
    stored = read_adapter(output / "adapter", open_pretrained("tiny-random").card.model)
    assert (stored.rank, stored.settings.targets) == (2, ("q", "v"))
    assert stored.base == "tiny-random"
    again = train(*command)
    assert "goes on from step 2 of 2" in again
    assert "is there already" in again
    assert read_adapter(output / "adapter", open_pretrained("tiny-random").card.model).digest == (
        stored.digest
    )


def test_a_bad_row_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1 has messages"):
        train(f"--data={tmp_path}/a.jsonl", f"--output={tmp_path}/out")
