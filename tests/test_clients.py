"""The clients that exist, as their own packages, each in a process of its own, against the server.

What a client checks stands in its script in tests/clients: information on the model where it asks
for it, a completion, a stream, extra parameters, a wrong key, a bad parameter, a conversation.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_envs import CLIENTS, run, run_node, run_python
from identity import TENANT, Identity, certificate, running_identity
from servers import COMMAND, Server, free_ports, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def identity() -> Iterator[Identity]:
    with running_identity() as identity:
        yield identity


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Iterator[Server]:
    with running(serve(smollm2)) as server:
        yield server


@pytest.fixture(scope="module")
def secure(smollm2: Path, pem: Path, identity: Identity) -> Iterator[Server]:
    options = ["--tls-cert", str(pem), "--tls-key", str(pem), "--entra-tenant", TENANT]
    options += ["--entra-authority", identity.url, "--entra-allow", identity.object_id]
    with running(serve(smollm2, *options)) as server:
        assert server.url.startswith("https://")
        yield server


def serve(model: Path, *options: str) -> list[str]:
    port, grpc_port = map(str, free_ports(2))
    command = [COMMAND, "serve", "--model", str(model), "--port", port, "--grpc-port", grpc_port]
    return [*command, *options]


def trusting(pem: Path) -> dict[str, str]:
    """How the clients are told of a certificate that nobody else vouches for."""
    return dict.fromkeys(("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"), str(pem))


@pytest.mark.parametrize(
    ("environment", "script"),
    [
        (None, "openai_client"),
        (None, "plain_http"),
        ("mistral-v3", "mistral_v3"),
        ("mistral-v1", "mistral_v1"),
        ("langchain", "langchain_clients"),
        ("litellm", "litellm_client"),
    ],
)
def test_a_client(environment: str | None, script: str, plain: Server) -> None:
    place = {"ENDPOINT": plain.url, "KEY": plain.key}
    path = CLIENTS / f"{script}.py"
    if environment is None:
        run([sys.executable, str(path)], place)
    else:
        run_python(environment, path, place)


@pytest.mark.parametrize("version", ["b9", "b6"])
@pytest.mark.parametrize("credential", ["key", "default credential"])
def test_azures_python_client(
    version: str, credential: str, secure: Server, pem: Path, identity: Identity
) -> None:
    place = azures(secure, pem, identity, credential)
    path = CLIENTS / "azure_inference.py"
    if version == "b9":
        run([sys.executable, str(path)], place)
    else:
        run_python("azure-b6", path, place)


def test_azures_python_client_without_tls(plain: Server) -> None:
    place = {"AZURE_INFERENCE_ENDPOINT": plain.url, "AZURE_INFERENCE_CREDENTIAL": plain.key}
    run([sys.executable, str(CLIENTS / "azure_inference.py")], place)


@pytest.mark.parametrize("credential", ["key", "default credential"])
def test_azures_javascript_client(
    credential: str, secure: Server, pem: Path, identity: Identity
) -> None:
    run_node(CLIENTS / "azure_rest.mjs", azures(secure, pem, identity, credential))


def azures(server: Server, pem: Path, identity: Identity, credential: str) -> dict[str, str]:
    place = {"AZURE_INFERENCE_ENDPOINT": server.url, **trusting(pem)}
    if credential == "key":
        return {**place, "AZURE_INFERENCE_CREDENTIAL": server.key}
    return {**place, **identity.environment}
