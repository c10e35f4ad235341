"""The notebooks run from their first cell to their last, and give the values that they speak of.

CI runs the first and the third on one device; all of them run on one and on eight, and from the
wheel in an environment of their own, where CI has no time for it (`make soak`).
"""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"


class Shown(NamedTuple):
    """The texts of a notebook's outputs, without colours, and the number of its figures."""

    text: str
    figures: int


def executed(name: str, folder: Path, kernel: str = "python3") -> Shown:
    """Runs a notebook in `folder`, in a kernel of its own."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=500, kernel_name=kernel, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.get("text", "") for output in outputs]
    texts += [output.get("data", {}).get("text/plain", "") for output in outputs]
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    return Shown(re.sub(r"\x1b\[[\d;]*m", "", "\n".join(texts)), figures)


def check(name: str, shown: Shown) -> None:
    """Holds what a notebook shows to what it speaks of."""
    text, figures = shown
    number = name[:2]
    assert figures == {"01": 1, "02": 3, "03": 1, "04": 0, "05": 2, "06": 1}[number]
    if number == "01":
        assert "The capital of France is Paris" in text.replace("\n", "")
    elif number == "02":
        assert "((30, 1, 21, 2), (30, 1, 21, 4), (31, 1, 21, 576))" in text
        assert "Param(" in text and "axes='EFD'" in text  # beside treescope's view
    elif number == "03":
        assert "axes EFD whole (4, 96, 64)" in text and "on one device (1, 48, 64)" in text
        (difference,) = re.findall(r"difference of a logit is (\S+)", text)
        assert float(difference) < 1e-5
        assert "{'2x2': True, '2x4': True, '4x4': True}" in text
    elif number == "04":
        assert text.replace("\n", "").count("The capital of France is Paris.") == 2  # gRPC, HTTP
        assert "'completion_tokens': 8" in text
    elif number == "05":
        before, after = re.findall(r"exact: (\d+) of 8", text)
        assert before == "0" and int(after) >= 7
        answer = r"name=\w+; guests=\d+; time=\d+:\d+$"
        base, tuned = (re.findall(rf"^{name}: (.*)$", text, re.M) for name in ("base", "bookings"))
        assert not re.match(answer, base[0]) and re.match(answer, tuned[0])
    elif number == "06":
        assert "'districts':" in text and "valid: 10 of 10" in text
        assert re.search(r"'17\d\d-[01]\d-[0-3]\d'", text)


def run_on(devices: int, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Runs a notebook on so many devices of the CPU; returns what was checked."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(devices))
    if devices > 1:
        # XLA has a thread for each core. Collectives of more devices hold them all, and what else a
        # device has to run then waits for ever.
        monkeypatch.setenv("NPROC", str(2 * devices))
    shown = executed(name, folder)
    check(name, shown)
    if name[:2] != "04":
        assert f"cpu: {8 if name[:2] == '03' else devices} device" in shown.text
    return shown


@pytest.fixture(scope="module")
def mixture(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with its feed-forward copied into four experts."""
    from convert.convert import convert

    folder = tmp_path_factory.mktemp("mixture") / "smollm2-4x135m"
    convert(smollm2_gguf, folder, dtype="float32", upcycle_experts=4)
    return folder


@pytest.mark.slow
def test_01_generates(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_JAX_MODEL", str(smollm2))
    run_on(1, "01_generate", tmp_path, monkeypatch)


@pytest.mark.soak
def test_03_splits_and_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(1, "03_sharding_and_plan", tmp_path, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("01_generate", 8),
        ("04_serve_and_chat", 1),
        ("04_serve_and_chat", 8),
        ("06_structured_output", 1),
        ("06_structured_output", 8),
    ],
)
def test_it_runs_on(
    name: str, devices: int, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXTRAL_JAX_MODEL", str(smollm2))
    run_on(devices, name, tmp_path, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("devices", [1, 8])
def test_02_looks_inside(
    devices: int, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXTRAL_JAX_MODEL", str(mixture))
    run_on(devices, "02_inside_the_experts", tmp_path, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("devices", [1, 8])
def test_05_learns_the_form_and_goes_on_where_it_was(
    devices: int, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXTRAL_JAX_MODEL", str(smollm2))
    monkeypatch.setenv("MIXTRAL_JAX_RUN", str(tmp_path / "run"))
    first = run_on(devices, "05_finetune", tmp_path, monkeypatch)
    assert "step 1: loss" in first.text and "step 6: loss" in first.text
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    # As after a machine that was lost between the last two checkpoints.
    (tmp_path / "run" / "checkpoints" / "6").rename(tmp_path / "lost")
    again = run_on(devices, "05_finetune", tmp_path, monkeypatch)
    steps = [re.findall(r"step (\d): loss (\S+),", shown.text) for shown in (first, again)]
    assert steps[1] == steps[0][4:] and len(steps[1]) == 2
    assert re.findall("exact.*", again.text) == re.findall("exact.*", first.text)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jupyter's folder with the kernel "bare": a new environment that has ipykernel alone."""
    home = tmp_path_factory.mktemp("bare")
    constraints = ["-c", str(ROOT / "constraints.txt")]
    quiet = ["--quiet", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--wheel-dir", str(home / "wheels"), str(ROOT)]
    subprocess.check_call([sys.executable, "-m", "pip", *wheel, *quiet])
    venv.create(home / "venv", with_pip=True)
    python = str(home / "venv" / "bin" / "python")
    subprocess.check_call([python, "-m", "pip", "install", *quiet, *constraints, "ipykernel"])
    spec = home / "kernels" / "bare"
    spec.mkdir(parents=True)
    command = [python, "-P", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    content = {"argv": command, "display_name": "bare", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(content), encoding="utf-8")
    return home


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_all_of_them_from_the_wheel(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PATH", str(kernel))
    monkeypatch.setenv("PIP_FIND_LINKS", str(kernel / "wheels"))
    monkeypatch.setenv("PIP_CONSTRAINT", str(ROOT / "constraints.txt"))
    for variable in ("PYTHONPATH", "JAX_NUM_CPU_DEVICES", "MIXTRAL_JAX_MODEL", "MIXTRAL_JAX_RUN"):
        monkeypatch.delenv(variable, raising=False)
    elsewhere = kernel / "elsewhere"
    elsewhere.mkdir()
    for path in sorted(FOLDER.glob("*.ipynb")):
        check(path.stem, executed(path.stem, elsewhere, "bare"))
    assert not list((kernel / "venv").rglob("site-packages/libtpu")), "the platform's, not ours"
    assert sorted(os.listdir(elsewhere / "checkpoints")) == [
        "smollm2-135m-instruct",
        "smollm2-135m-instruct-4x",
    ]
