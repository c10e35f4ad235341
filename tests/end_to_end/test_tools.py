"""Tools that people point at a server, as their own packages, each in a process of its own.

What a tool does stands in its script in tests/clients; docs/clients.md has the others that were
tried, which take too long or too much of a disk to be installed here.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.client_envs import CLIENTS, run_node, run_python
from tests.support.servers import Server, running, serve_command

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    with running(serve_command(smollm2, "--kv-memory", "256")) as server:
        yield server


def test_llm(server: Server) -> None:
    run_python("llm", CLIENTS / "llm_tool.py", {"ENDPOINT": server.url, "KEY": server.key})


def test_semantic_kernel_over_https(smollm2: Path, pem: Path) -> None:
    options = ["--kv-memory", "256", "--tls-cert", str(pem), "--tls-key", str(pem)]
    with running(serve_command(smollm2, *options)) as server:
        place = {"ENDPOINT": server.url, "KEY": server.key}
        place |= {"SSL_CERT_FILE": str(pem), "REQUESTS_CA_BUNDLE": str(pem)}
        run_python("semantic-kernel", CLIENTS / "semantic_kernel_clients.py", place)


def test_aiperf(server: Server, smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((smollm2 / "tokenizer.json").read_bytes())
    config = {"model_type": "llama", "vocab_size": 49152}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    place = {"ENDPOINT": server.url, "KEY": server.key, "TOKENIZER": str(tmp_path)}
    run_python("aiperf", CLIENTS / "aiperf_tool.py", place, patience=300)


def test_every_provider_of_the_vercel_ai_sdk(server: Server) -> None:
    run_node(CLIENTS / "vercel_providers.mjs", {"ENDPOINT": server.url, "KEY": server.key})
