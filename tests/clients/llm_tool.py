"""llm, the command: chats, a conversation, a schema, a function and a text."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL, KEY, NAME = os.environ["ENDPOINT"], os.environ["KEY"], "azureai"
BASE = {"model_name": NAME, "api_base": f"{URL}/v1", "api_key_name": "ours"}
MODELS = [
    {"model_id": "ours", **BASE, "supports_tools": True, "supports_schema": True},
    {"model_id": "ours-text", **BASE, "completion": True},
]

with tempfile.TemporaryDirectory() as home:
    # JSON is YAML too.
    (Path(home) / "extra-openai-models.yaml").write_text(json.dumps(MODELS), encoding="utf-8")

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(
            command,
            env={**os.environ, "LLM_USER_PATH": home},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    llm("keys", "set", "ours", "--value", KEY)
    short = ("-o", "max_tokens", "8", "-o", "temperature", "0")
    streamed = llm("-m", "ours", "Say hello.", *short)
    assert streamed.strip()
    assert llm("-m", "ours", "--no-stream", "Say hello.", *short) == streamed
    assert llm("-c", "Once more.", *short).strip()
    shape = llm("-m", "ours", "--schema", "age int", "A person.", "-o", "max_tokens", "120")
    assert isinstance(json.loads(shape)["age"], int)
    llm("-m", "ours", "-T", "llm_version", "Which version is this?", *short)
    assert llm("-m", "ours-text", "The capital of France is", *short).strip()
