"""Clients whose scripts ask for structured answers and calls, and the bodies that they send.

`python -m tests.support.structure_clients` runs every script against the recorder and writes what
it sent to tests/clients/bodies, a body a line; a test repeats that and compares.
"""

import importlib.metadata
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.client_envs import CLIENTS, run, run_node, run_python
from tests.support.recorder import recording

BODIES = CLIENTS / "bodies"
# Seconds for a script, which asks a real model up to thirty times.
_PATIENCE = 900
# These change the form of the answer only; a body that differs in nothing else is kept once.
_STREAMING = ("stream", "stream_options")


@dataclass(frozen=True)
class StructureClient:
    """A script in tests/clients, and where it runs."""

    name: str
    script: str
    environment: str | None
    """The file of a Python environment, `node`, or None for the environment of the tests."""
    packages: tuple[str, ...]
    """Whose versions the bodies are of."""

    def run(self, environment: Mapping[str, str]) -> str:
        """Runs the script to its end; returns its output. Fails as the script does."""
        path = CLIENTS / self.script
        if self.environment is None:
            return run([sys.executable, str(path)], environment, _PATIENCE)
        if self.environment == "node":
            return run_node(path, environment, _PATIENCE)
        return run_python(self.environment, path, environment, _PATIENCE)

    def versions(self) -> dict[str, str]:
        """The versions of the packages, as they are listed or installed."""
        if self.environment is None:
            return {name: importlib.metadata.version(name) for name in self.packages}
        if self.environment == "node":
            text = (CLIENTS / "package.json").read_text(encoding="utf-8")
            listed: dict[str, str] = json.loads(text)["dependencies"]
        else:
            text = (CLIENTS / f"{self.environment}.txt").read_text(encoding="utf-8")
            listed = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
        return {name: listed[name] for name in self.packages}


STRUCTURE_CLIENTS = [
    StructureClient("openai-python", "openai_structure.py", None, ("openai",)),
    StructureClient("extras-python", "extras_structure.py", None, ("openai",)),
    StructureClient("azure-python", "azure_structure.py", None, ("azure-ai-inference",)),
    StructureClient("mistral-python", "mistral_structure.py", "mistral-v3", ("mistralai",)),
    StructureClient(
        "langchain-python",
        "langchain_structure.py",
        "langchain",
        ("langchain-openai", "langchain-mistralai"),
    ),
    StructureClient("litellm-python", "litellm_structure.py", "litellm", ("litellm",)),
    StructureClient("instructor-python", "instructor_structure.py", "agents", ("instructor",)),
    StructureClient("pydantic-ai", "pydantic_ai_structure.py", "agents", ("pydantic-ai-slim",)),
    StructureClient("openai-agents", "agents_structure.py", "agents", ("openai-agents",)),
    StructureClient("anthropic-python", "anthropic_structure.py", "anthropic", ("anthropic",)),
    StructureClient("openai-node", "openai_structure.mjs", "node", ("openai", "zod")),
    StructureClient("azure-node", "azure_structure.mjs", "node", ("@azure-rest/ai-inference",)),
    StructureClient(
        "langchain-node",
        "langchain_structure.mjs",
        "node",
        ("@langchain/openai", "@langchain/mistralai"),
    ),
    StructureClient(
        "vercel-node",
        "vercel_structure.mjs",
        "node",
        ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible"),
    ),
]


@dataclass(frozen=True)
class Body:
    """What a client sent for a call of its script."""

    client: str
    call: str
    path: str
    body: dict[str, Any]


def recorded(name: str) -> tuple[dict[str, str], list[Body]]:
    """The versions and the bodies kept of a client."""
    lines = (BODIES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    versions, *bodies = map(json.loads, lines)
    return versions, [Body(name, **body) for body in bodies]


def sent(client: StructureClient) -> list[Body]:
    """Runs a client against the recorder; returns the distinct bodies that it sends."""
    with tempfile.TemporaryDirectory() as folder, recording(Path(folder)) as recorder:
        place = {"ENDPOINT": recorder.url, "KEY": "key", "MODEL": "m"}
        client.run({**place, "STEP_FILE": str(recorder.step_file)})
    kept: list[Body] = []
    for request in recorder.requests:
        body = {name: value for name, value in request["body"].items() if name not in _STREAMING}
        if not any((other.path, other.body) == (request["path"], body) for other in kept):
            kept.append(Body(client.name, request["call"], request["path"], body))
    return kept


def _record(client: StructureClient) -> None:
    lines: list[dict[str, Any]] = [client.versions()]
    lines += [{"call": body.call, "path": body.path, "body": body.body} for body in sent(client)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (BODIES / f"{client.name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for client in STRUCTURE_CLIENTS:
        if client.name in sys.argv[1:] or len(sys.argv) == 1:
            _record(client)
