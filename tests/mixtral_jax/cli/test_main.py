"""The command line as a user types it."""

import json
import subprocess
from pathlib import Path

from tests.support import sources
from tests.support.servers import COMMAND, environment


def mixtral_jax(*arguments: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [COMMAND, *arguments],
        env=environment(COLUMNS="100"),
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_names_every_command() -> None:
    out = mixtral_jax("--help").stdout
    for command in ("pull", "convert", "export", "info", "chat", "serve", "plan", "bench", "keys"):
        assert command in out


def test_chat_with_the_toy() -> None:
    out = mixtral_jax("chat", "--model=tiny-random", "--max-tokens=5", "--seed=1", text="hi\nho\n")
    assert out.returncode == 0, out.stderr
    assert len(out.stdout.split("\n")) >= 3


def test_chat_without_a_model() -> None:
    out = mixtral_jax("chat", "--model=nowhere")
    assert out.returncode == 1
    assert out.stderr.startswith("mixtral-jax: nowhere is not a mixtral-jax checkpoint")


def test_convert_info_export_round_trip(tmp_path: Path) -> None:
    source = sources.write_hf(tmp_path / "hf", sources.MOE, sources.tensors(sources.MOE))
    made, back = tmp_path / "made", tmp_path / "back"
    converted = mixtral_jax("convert", str(source), str(made), "--name=mine")
    assert converted.returncode == 0, converted.stderr
    facts = json.loads(mixtral_jax("info", str(made), "--json").stdout)
    assert (facts["name"], facts["num_experts"], facts["rope_theta"]) == ("mine", 3, 12_345.0)
    assert "mine" in mixtral_jax("info", str(made)).stdout
    assert mixtral_jax("export", str(made), str(back)).returncode == 0
    assert json.loads((back / "config.json").read_text())["model_type"] == "mixtral"
    again = mixtral_jax("convert", str(source), str(made))
    assert again.returncode == 1
    (*_, last) = again.stderr.splitlines()
    assert last.startswith("mixtral-jax: ") and "not empty" in last


def test_a_bad_source_is_one_clear_error(tmp_path: Path) -> None:
    tensors = sources.tensors(sources.MOE)
    tensors["model.surprise"] = tensors.pop("model.norm.weight")
    source = sources.write_hf(tmp_path / "hf", sources.MOE, tensors)
    out = mixtral_jax("convert", str(source), str(tmp_path / "made"))
    assert out.returncode == 1
    assert "model.surprise" in out.stderr and "model.norm.weight" in out.stderr
    assert "Traceback" not in out.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
