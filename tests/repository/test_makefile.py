"""`make help` explains every target."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_make_target_explains_itself() -> None:
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ["install", "serve", "chat", "test", "check", "proto", "bench", "notebooks"]:
        assert f"make {target} " in out.stdout
