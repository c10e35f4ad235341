"""The clients that exist, as their own packages, each in a process of its own, against the server.

What a client checks stands in its script in tests/clients: information on the model where it asks
for it, a completion, a stream, extra parameters, a wrong key, a bad parameter, a conversation.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.client_envs import CLIENTS, run, run_node, run_python
from tests.support.identity import Identity, surroundings
from tests.support.servers import Server, running, serve_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Iterator[Server]:
    with running(serve_command(smollm2, "--kv-memory", "12")) as server:
        yield server


@pytest.mark.parametrize(
    ("environment", "script"),
    [
        (None, "openai_client"),
        (None, "plain_http"),
        ("mistral-v3", "mistral_v3"),
        ("mistral-v1", "mistral_v1"),
        pytest.param("langchain", "langchain_clients", marks=pytest.mark.soak),
        ("litellm", "litellm_client"),
        ("anthropic", "anthropic_client"),
    ],
)
def test_a_client(environment: str | None, script: str, plain: Server) -> None:
    place = {"ENDPOINT": plain.url, "KEY": plain.key}
    path = CLIENTS / f"{script}.py"
    if environment is None:
        run([sys.executable, str(path)], place)
    else:
        run_python(environment, path, place)


@pytest.mark.parametrize(
    ("credential", "version"),
    [
        ("key", "b6"),
        ("default credential", "b9"),
        pytest.param("key", "b9", marks=pytest.mark.soak),
        pytest.param("default credential", "b6", marks=pytest.mark.soak),
    ],
)
def test_azures_python_client(
    version: str, credential: str, secure: Server, pem: Path, identity: Identity
) -> None:
    place = surroundings(secure, pem, identity, credential)
    path = CLIENTS / "azure_inference.py"
    if version == "b9":
        run([sys.executable, str(path)], place)
    else:
        run_python("azure-b6", path, place)


def test_azures_python_client_without_tls(plain: Server) -> None:
    place = {"AZURE_INFERENCE_ENDPOINT": plain.url, "AZURE_INFERENCE_CREDENTIAL": plain.key}
    run([sys.executable, str(CLIENTS / "azure_inference.py")], place)


@pytest.mark.parametrize(
    "credential", [pytest.param("key", marks=pytest.mark.soak), "default credential"]
)
def test_azures_javascript_client(
    credential: str, secure: Server, pem: Path, identity: Identity
) -> None:
    run_node(CLIENTS / "azure_rest.mjs", surroundings(secure, pem, identity, credential))
