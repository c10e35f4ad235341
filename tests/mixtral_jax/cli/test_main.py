"""The command line as a user types it."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mixtral_jax.checkpoint.adapter import read_adapter, write_adapter
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.adapter import AdapterConfig
from tests.support import sources
from tests.support.adapters import random_adapter
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
    assert "merge" in out and "export-adapter" in out


@pytest.mark.slow
def test_chat_with_the_toy() -> None:
    out = mixtral_jax("chat", "--model=tiny-random", "--max-tokens=5", "--seed=1", text="hi\nho\n")
    assert out.returncode == 0, out.stderr
    assert len(out.stdout.split("\n")) >= 3


@pytest.mark.slow
def test_chat_in_a_form_and_with_tools(tmp_path: Path) -> None:
    schema, tools = tmp_path / "schema.json", tmp_path / "tools.json"
    schema.write_text('{"enum": ["yes", "no"]}', encoding="utf-8")
    toy = ("chat", "--model=tiny-random", "--temperature=1.5", "--seed=1")
    out = mixtral_jax(*toy, f"--json-schema={schema}", text="hi\nho\n")
    assert out.returncode == 0, out.stderr
    assert all(json.loads(line) in ("yes", "no") for line in out.stdout.splitlines())
    tools.write_text('[{"type": "function", "function": {"name": "now"}}]', encoding="utf-8")
    out = mixtral_jax(*toy, "--max-tokens=4", f"--tools={tools}", text="hi\n")
    assert out.returncode == 0, out.stderr
    tools.write_text("[3]", encoding="utf-8")
    out = mixtral_jax(*toy, f"--tools={tools}", text="hi\n")
    assert out.returncode == 1 and f"entry 0 of {tools} is no function" in out.stderr
    schema.write_text('{"type": "blue"}', encoding="utf-8")
    out = mixtral_jax(*toy, f"--json-schema={schema}", text="hi\n")
    assert out.returncode == 1 and out.stderr.startswith("mixtral-jax: ")


@pytest.mark.soak
def test_chat_with_an_adapter(tmp_path: Path) -> None:
    settings = AdapterConfig(targets=("q", "down"), rank=4, alpha=8.0)
    config = open_pretrained("tiny-random").card.model
    adapter = random_adapter(config, settings, size=0.5)
    write_adapter(tmp_path / "mine", adapter, settings, base="some/base")
    toy = ("chat", "--model=tiny-random", "--temperature=0", "--max-tokens=8")
    plain = mixtral_jax(*toy, text="hi\n")
    adapted = mixtral_jax(*toy, f"--adapter={tmp_path / 'mine'}", text="hi\n")
    assert adapted.returncode == 0 and adapted.stdout != plain.stdout
    wrong = mixtral_jax(*toy, f"--adapter={tmp_path}", text="hi\n")
    assert wrong.returncode != 0 and "adapter_config.json" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_dtype_is_checked_before_a_download(tmp_path: Path) -> None:
    out = mixtral_jax("convert", "nobody/nothing", str(tmp_path / "made"), "--dtype=int2")
    assert out.returncode == 1 and "dtype 'int2' is not supported" in out.stderr


def test_chat_without_a_model() -> None:
    out = mixtral_jax("chat", "--model=nowhere")
    assert out.returncode == 1
    assert out.stderr.startswith("mixtral-jax: nowhere is not a mixtral-jax checkpoint")


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_adapter_is_shown_exported_and_merged(tmp_path: Path) -> None:
    source = sources.write_hf(tmp_path / "hf", sources.MOE, sources.tensors(sources.MOE))
    base, adapter, tuned = tmp_path / "base", tmp_path / "adapter", tmp_path / "tuned"
    assert mixtral_jax("convert", str(source), str(base), "--dtype=bfloat16").returncode == 0
    settings = AdapterConfig(targets=("q", "gate", "up", "down"), rank=4, alpha=8.0)
    config = from_hf(sources.MOE)
    write_adapter(adapter, random_adapter(config, settings), settings, "some/base")
    facts = json.loads(mixtral_jax("info", str(adapter), "--json").stdout)
    assert (facts["base"], facts["rank"], facts["layers_changed"]) == ("some/base", 4, 3)
    assert "q_proj, w1, w3, w2" in mixtral_jax("info", str(adapter)).stdout
    merged = mixtral_jax("merge", str(base), str(adapter), str(tuned))
    assert merged.returncode == 0, merged.stderr
    *lines, worst, path = merged.stdout.splitlines()
    assert len(lines) == 4 and worst.startswith("bfloat16 loses most in layer ")
    assert path == str(tuned)
    exported = mixtral_jax("export", str(base), str(tmp_path / "out"), f"--adapter={adapter}")
    assert exported.returncode == 0 and worst in exported.stdout
    again = tmp_path / "again"
    made = mixtral_jax("export-adapter", str(base), str(adapter), str(again), "--base=my/base")
    assert made.returncode == 0, made.stderr
    assert read_adapter(again, config).digest == read_adapter(adapter, config).digest
    assert read_adapter(again, config).base == "my/base"
    wrong = mixtral_jax("merge", str(base), str(base), str(tmp_path / "never"))
    assert wrong.returncode == 1 and "is no adapter" in wrong.stderr


def test_a_bad_source_is_one_clear_error(tmp_path: Path) -> None:
    tensors = sources.tensors(sources.MOE)
    tensors["model.surprise"] = tensors.pop("model.norm.weight")
    source = sources.write_hf(tmp_path / "hf", sources.MOE, tensors)
    out = mixtral_jax("convert", str(source), str(tmp_path / "made"))
    assert out.returncode == 1
    assert "model.surprise" in out.stderr and "model.norm.weight" in out.stderr
    assert "Traceback" not in out.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_mistyped_source_is_one_line() -> None:
    out = mixtral_jax("convert", "/no/such/folder", "never")
    assert out.returncode == 1 and out.stdout == ""
    (line,) = out.stderr.splitlines()
    assert line.startswith("mixtral-jax: ") and "/no/such/folder" in line


def test_debug_shows_where_an_error_of_the_user_was_raised() -> None:
    out = mixtral_jax("--debug", "info", "nowhere")
    assert out.returncode == 1
    first, *_, last = out.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.startswith("mixtral-jax: nowhere is not a mixtral-jax checkpoint")


def test_version() -> None:
    out = mixtral_jax("--version")
    first, second = out.stdout.splitlines()
    assert (out.returncode, first) == (0, f"mixtral-jax {version('mixtral-jax')}")
    assert second.startswith("kernels for CPU: ")


def test_a_wrong_flag_is_one_line_that_names_it() -> None:
    out = mixtral_jax("serve", "--modle=x")
    assert out.returncode == 2 and out.stdout == ""
    (line,) = out.stderr.splitlines()
    assert line.startswith("mixtral-jax: ") and line.endswith("(see mixtral-jax serve --help)")
    assert "--modle" in line
    missing = mixtral_jax("serve")
    assert missing.returncode == 2 and "--model" in missing.stderr
    assert mixtral_jax("bench", "--url=http://x", "tiny-random").returncode == 2


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    """A strict zip that fails is a ValueError, and yet not the user's."""
    code = (
        "import mixtral_jax.checkpoint.parameters as parameters\n"
        "def fault(*_): return list(zip([1], [], strict=True))\n"
        "parameters.parameter_shapes = fault\n"
        "from mixtral_jax.cli.main import main; main()"
    )
    out = python(code, "info", "tiny-random")
    assert out.returncode == 1
    first, *_, last = out.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert "ValueError: zip() argument 2 is shorter than argument 1" in out.stderr
    assert last.startswith("mixtral-jax: this is a fault of mixtral-jax; please report it")


def test_ctrl_c_is_quiet() -> None:
    code = (
        "import mixtral_jax.checkpoint.parameters as parameters, os, signal\n"
        "def wait(*_): os.kill(os.getpid(), signal.SIGINT)\n"
        "parameters.count_parameters = wait\n"
        "from mixtral_jax.cli.main import main; main()"
    )
    out = python(code, "info", "tiny-random")
    assert (out.returncode, out.stdout, out.stderr) == (130, "", "")


def python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
