"""Notebooks are small, begin and end alike, and keep no output but the figures that are meant."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_LINES = 60  # of code


def cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook, with their source as one text."""
    read = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in read]


def code(path: Path) -> list[str]:
    """The sources of the code cells."""
    return [cell["source"] for cell in cells(path) if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_defines_nothing(path: Path) -> None:
    lines = [line for source in code(path) for line in source.splitlines() if line.strip()]
    assert len(lines) < MOST_LINES
    definitions = ("def ", "class ", "async def ")
    assert not [line for line in lines if line.lstrip().startswith(definitions)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_a_title_an_install_cell_and_a_next_step(path: Path) -> None:
    first, last = cells(path)[0], cells(path)[-1]
    assert first["cell_type"] == last["cell_type"] == "markdown"
    assert first["source"].startswith("# ")
    titles = [
        line
        for cell in cells(path)
        if cell["cell_type"] == "markdown"
        for line in cell["source"].splitlines()
        if line.startswith("# ")
    ]
    assert len(titles) == 1
    install = code(path)[0]
    assert install == code(NOTEBOOKS[0])[0]
    if path != NOTEBOOKS[-1]:
        following = NOTEBOOKS[NOTEBOOKS.index(path) + 1]
        assert f"({following.name})" in last["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_says_what_it_needs_and_how_long_it_takes(path: Path) -> None:
    first = cells(path)[0]["source"]
    assert "colab-badge.svg" in first
    assert re.search(
        r"\*\*Needs\*\* .+\*\*Takes\*\* (a|two|three) minutes? on two CPU cores", first
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_figure_follows_what_to_look_for(path: Path) -> None:
    text = ""
    for cell in cells(path):
        if cell["cell_type"] == "markdown":
            text = cell["source"]
            assert "\\n" not in text, "a line break that was escaped twice"
        elif cell["metadata"].get("keep_output"):
            assert "Look " in text, cell["source"]


@pytest.mark.parametrize("is_in_clone", [True, False])
def test_the_platforms_jax_is_kept(
    is_in_clone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec, commands = importlib.util.find_spec, list[list[str]]()
    installed = {"jax": "0.11.3", "libtpu": "0.0.50"}  # as on a TPU whose jaxlib is built in
    monkeypatch.setattr(importlib.metadata, "version", installed.get)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: find_spec("json") if name in installed else None,
    )
    monkeypatch.setattr(subprocess, "check_call", commands.append)
    (tmp_path / "notebooks").mkdir()
    if is_in_clone:
        (tmp_path / "mixtral_jax").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    exec(code(NOTEBOOKS[0])[0], {})
    package = "..[notebook]" if is_in_clone else "mixtral-jax[notebook]"
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    assert commands == [[*pip, package, "jax==0.11.3", "libtpu==0.0.50"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_says_which_devices_it_has_or_uses_none(path: Path) -> None:
    sources = code(path)
    imports_jax = any("import jax" in source for source in sources)
    if path.stem.startswith("04"):
        assert not imports_jax, "the server holds the device"
        return
    assert any("mixtral_jax.show_devices()" in source for source in sources[:3])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_figures_that_are_meant_are_kept(path: Path) -> None:
    for cell in cells(path):
        if cell["cell_type"] != "code":
            continue
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        wanted = {"image/png"} if cell["metadata"].get("keep_output") else set()
        assert kinds == wanted and cell["execution_count"] is None, cell["source"]
    assert path.stat().st_size < 400_000
