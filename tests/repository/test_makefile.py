"""`make help` explains every target."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_make_target_explains_itself() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    explained = set(re.findall(r"^  make ([a-z-]+) +\S", out.stdout, re.MULTILINE))
    assert explained == set(phony.split())
    assert {"install", "serve", "chat", "test", "check"} <= explained


def test_the_gate_runs_targets_that_exist() -> None:
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    targets = re.findall(r"^make (.*)$", gate, re.MULTILINE)
    assert targets
    for target in " ".join(targets).split():
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
