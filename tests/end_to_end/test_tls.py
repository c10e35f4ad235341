"""Certificates: HTTPS before the gateway, mTLS between it and the service."""

import asyncio
import os
import re
import signal
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health, health_pb2_grpc

from serving.access.tls import Certificate, ServerTls, ServiceTls
from serving.client import AsyncClient
from serving.errors import Unavailable
from serving.proto import inference_pb2, inference_pb2_grpc
from tests.support.certificates import Authority, Files, private_pem
from tests.support.fakes import KEY, PATIENCE, ScriptedInference


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "authority")


def test_https_before_and_mtls_behind_the_gateway(authority: Authority, tmp_path: Path) -> None:
    web, service, gateway = (authority.issue(name) for name in ("web", "service", "gateway"))
    stranger = Authority(tmp_path, "stranger").issue("gateway")
    server_tls = ServerTls.of_flags(service.cert, service.key, authority.ca)
    assert server_tls is not None

    async def info(
        port: int, shown: Files | None, ca: Path = authority.ca, patience: float = 0.0
    ) -> int:
        """Asks GET /info of a gateway that shows that certificate; for so long while it says 503.

        Returns the last status.
        """
        flags = ["--port", "0", "--target", f"127.0.0.1:{port}", "--service-ca", str(ca)]
        flags += ["--tls-cert", str(web.cert), "--tls-key", str(web.key)]
        if shown is not None:
            flags += ["--service-cert", str(shown.cert), "--service-key", str(shown.key)]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serving.gateway", *flags),
            env=os.environ | {"MIXTRAL_JAX_API_KEY": "a" * 16, "MIXTRAL_JAX_SERVICE_KEY": KEY},
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stderr is not None
            line = (await process.stderr.readline()).decode()
            url = re.search(r"https://127\.0\.0\.1:\d+", line)
            assert url is not None, line
            context = ssl.create_default_context(cafile=str(authority.ca))
            context.verify_flags |= ssl.VERIFY_X509_STRICT  # as newer Pythons do of themselves
            async with httpx.AsyncClient(verify=context, timeout=PATIENCE) as client:
                deadline = time.monotonic() + patience
                while True:
                    answer = await client.get(f"{url[0]}/info", headers={"api-key": "a" * 16})
                    if answer.status_code != 503 or time.monotonic() > deadline:
                        break
                    await asyncio.sleep(0.1)
                assert (await client.get(f"{url[0]}/info")).status_code == 401
            process.send_signal(signal.SIGTERM)
            await process.communicate()
            assert process.returncode == 0
            return answer.status_code
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def run() -> None:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(ScriptedInference(), server)
        checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
        await checks.set("mixtral.v1.Inference", 1)
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        port = server.add_secure_port("127.0.0.1:0", server_tls.credentials())
        await server.start()
        assert await info(port, gateway, patience=20.0) == 200
        assert await info(port, None) == 503
        assert await info(port, stranger) == 503
        assert await info(port, gateway, ca=tmp_path / "stranger.pem") == 503
        await server.stop(0)

    asyncio.run(run())


def test_a_service_that_has_another_name_than_its_address(authority: Authority) -> None:
    files = authority.issue("models.example")

    async def name(tls: ServiceTls, port: int) -> str:
        channel = grpc.aio.secure_channel(f"localhost:{port}", tls.credentials(), tls.options())
        async with channel:
            info = await inference_pb2_grpc.InferenceStub(channel).GetModelInfo(
                inference_pb2.GetModelInfoRequest(),
                metadata=(("authorization", f"Bearer {KEY}"),),
                timeout=PATIENCE,
            )
            return info.name

    async def run() -> None:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(ScriptedInference(), server)
        tls = ServerTls(Certificate(files.cert, files.key))
        port = server.add_secure_port("127.0.0.1:0", tls.credentials())
        await server.start()
        assert await name(ServiceTls(authority.ca, name="models.example"), port) == "scripted-7B"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await name(ServiceTls(authority.ca), port)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await server.stop(0)

    asyncio.run(run())


def test_the_python_client_shows_and_checks_certificates(authority: Authority) -> None:
    async def run() -> None:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(ScriptedInference(), server)
        files = authority.issue("models.example")
        tls = ServerTls(Certificate(files.cert, files.key), authority.ca)
        port = server.add_secure_port("127.0.0.1:0", tls.credentials())
        await server.start()
        roots = authority.ca.read_bytes()
        own = Certificate(*vars(authority.issue("client")).values()).pair()
        for target, name in ((f"127.0.0.1:{port}", None), (f"localhost:{port}", "models.example")):
            async with AsyncClient(
                target, key=KEY, root_certificates=roots, certificate=own, server_name=name
            ) as client:
                assert (await client.info()).name == "scripted-7B"
        strangers: list[dict[str, Any]] = [{"root_certificates": roots}, {"tls": True}, {}]
        for stranger in strangers:
            async with AsyncClient(f"127.0.0.1:{port}", key=KEY, **stranger) as client:
                with pytest.raises(Unavailable):
                    await client.info()
        await server.stop(0)

    asyncio.run(run())


def test_what_is_wrong_with_files_names_the_flag(authority: Authority, tmp_path: Path) -> None:
    one, other = authority.issue("one"), authority.issue("other")
    nowhere, nonsense, locked = (tmp_path / name for name in ("no", "nonsense", "locked"))
    nonsense.write_text("nonsense")
    secret = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1()), secret))
    cert, key, ca = one.cert, one.key, authority.ca
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: Certificate.of_flags("tls", cert, None), "--tls-cert and --tls-key need one"),
        (lambda: Certificate.of_flags("tls", None, key), "--tls-cert and --tls-key need one"),
        (lambda: Certificate.of_flags("tls", nowhere, key), f"--tls-cert {nowhere}: No such file"),
        (lambda: Certificate.of_flags("tls", cert, nowhere), f"--tls-key {nowhere}: No such file"),
        (lambda: Certificate.of_flags("tls", cert, other.key), "do not belong together"),
        (lambda: Certificate.of_flags("tls", nonsense, key), "no certificate and key in PEM"),
        (lambda: Certificate.of_flags("tls", cert, nonsense), "no certificate and key in PEM"),
        (lambda: Certificate.of_flags("tls", cert, locked), "without a password"),
        (lambda: ServerTls.of_flags(None, None, ca), "needs --tls-cert and --tls-key"),
        (lambda: ServerTls.of_flags(cert, key, nowhere), f"--tls-client-ca {nowhere}: No such"),
        (lambda: ServerTls.of_flags(cert, key, nonsense), "no certificate in PEM"),
        (lambda: ServiceTls.of_flags(None, cert, key, None), "need --service-ca"),
        (lambda: ServiceTls.of_flags(None, None, None, "x"), "need --service-ca"),
        (lambda: ServiceTls.of_flags(nonsense, None, None, None), "--service-ca .*no certificate"),
        (lambda: ServiceTls.of_flags(ca, cert, None, None), "--service-cert and --service-key"),
    ]
    for work, words in wrong:
        with pytest.raises(ValueError, match=words) as caught:
            work()
        assert "\n" not in str(caught.value)
    assert Certificate.of_flags("tls", None, None) is None
    assert ServerTls.of_flags(None, None, None) is None
    assert ServiceTls.of_flags(None, None, None, None) is None
    assert ServiceTls.of_flags(ca, cert, key, "x") is not None
