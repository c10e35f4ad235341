"""The notebooks run from their first cell to their last, and give the values that they speak of.

CI runs the first and the third; what the others show, smaller tests show too.
"""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


def executed(name: str, monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[str, int]:
    """Runs a notebook in a kernel of its own; returns its texts and the number of its figures."""
    import nbformat
    from nbclient import NotebookClient

    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.get("text", "") for output in outputs]
    texts += [output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(texts), sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_01_generates(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, figures = executed("01_generate", monkeypatch, MIXTRAL_JAX_MODEL=str(smollm2))
    assert "Paris" in text
    assert figures == 1


@pytest.mark.slow
def test_03_splits_and_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    text, figures = executed("03_sharding_and_plan", monkeypatch)
    assert "cpu: 8 devices" in text
    assert "axes EFD whole (4, 96, 64)" in text and "on one device (1, 48, 64)" in text
    assert "'2x4': True" in text
    assert figures == 1


@pytest.mark.soak
def test_04_serves_and_answers(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, _ = executed("04_serve_and_chat", monkeypatch, MIXTRAL_JAX_MODEL=str(smollm2))
    assert text.count("Paris") >= 2  # by gRPC and by HTTP
    assert "completion_tokens" in text


@pytest.mark.soak
def test_06_gives_valid_answers(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, figures = executed("06_structured_output", monkeypatch, MIXTRAL_JAX_MODEL=str(smollm2))
    assert "'districts':" in text
    assert "10" in text.split()  # as many of ten as are valid
    assert figures == 1


@pytest.fixture(scope="module")
def mixture(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with its feed-forward copied into four experts."""
    from convert.convert import convert

    folder = tmp_path_factory.mktemp("mixture") / "smollm2-4x135m"
    convert(smollm2_gguf, folder, dtype="float32", upcycle_experts=4)
    return folder


@pytest.mark.soak
@pytest.mark.parametrize("devices", [1, 8])
def test_02_looks_inside(devices: int, mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"MIXTRAL_JAX_MODEL": str(mixture), "JAX_NUM_CPU_DEVICES": str(devices)}
    text, figures = executed("02_inside_the_experts", monkeypatch, **environment)
    assert f"cpu: {devices} device" in text
    assert "(30, 1, 21, 2)" in text.replace("\n", " ")
    assert figures == 3


@pytest.mark.soak
def test_05_learns_the_form(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"MIXTRAL_JAX_MODEL": str(smollm2), "MIXTRAL_JAX_RUN": str(tmp_path / "run")}
    text, figures = executed("05_finetune", monkeypatch, **environment)
    assert "exact: 0 of 8" in text
    assert "exact: 8 of 8" in text or "exact: 7 of 8" in text
    assert figures == 2
    assert "adapter_model.safetensors" in text
