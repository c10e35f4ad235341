"""aiperf, which measures by streams of chats and of texts: no request of its fails."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL, KEY, NAME = os.environ["ENDPOINT"], os.environ["KEY"], "azureai"
COUNT = 6

for kind in ("chat", "completions"):
    with tempfile.TemporaryDirectory() as place:
        command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--streaming"]
        command += ["--model", NAME, "--url", URL, "--api-key", KEY, "--endpoint-type", kind]
        command += ["--tokenizer", os.environ["TOKENIZER"], "--ui", "simple"]
        command += ["--request-count", str(COUNT), "--concurrency", "2"]
        command += ["--synthetic-input-tokens-mean", "30", "--output-tokens-mean", "8"]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (report,) = Path(place).rglob("profile_export_aiperf.json")
        figures = json.loads(report.read_text(encoding="utf-8"))
        assert figures["request_count"]["avg"] == COUNT, figures
        assert figures["error_summary"] == [], figures["error_summary"]
