"""Certificates that are replaced under a running server, with real files and real handshakes."""

import asyncio
import logging
import os
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography import x509

from serving.access.renewal import Renewed, RenewedServerTls
from serving.access.tls import ServerTls
from serving.proto import inference_pb2, inference_pb2_grpc
from tests.support.certificates import Authority, Files
from tests.support.fakes import KEY, PATIENCE, ScriptedInference


def replace_files(files: Files, new: Files) -> None:
    """Puts new files in the place of others, as an operator's tool does: one after the other."""
    os.replace(new.cert, files.cert)
    os.replace(new.key, files.key)


def test_what_cannot_be_used_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The chain comes first and does not fit the key; then the key comes, too."""
    chain, key = tmp_path / "chain", tmp_path / "key"
    chain.write_text("1")
    key.write_text("1")

    def read() -> str:
        if chain.read_text() != key.read_text():
            raise ValueError("the two do not belong together")
        return chain.read_text()

    renewed = Renewed([chain, key], read)
    assert renewed.value == "1" and not renewed.look()
    chain.write_text("22")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert not renewed.look()
            assert renewed.reload_failed and renewed.value == "1"
        key.write_text("22")
        assert renewed.look()
        assert not renewed.reload_failed and renewed.value == "22"
        key.unlink()
        assert not renewed.look()
        assert renewed.reload_failed and renewed.value == "22"
        key.write_text("22")
        assert renewed.look() and not renewed.reload_failed
    levels = [record.levelname for record in caplog.records]
    assert levels == ["ERROR", "INFO", "ERROR", "INFO"]
    assert "stays in use: the two do not belong together" in caplog.text


def serial(pem: str | bytes) -> int:
    data = pem.encode() if isinstance(pem, str) else pem
    return x509.load_pem_x509_certificate(data).serial_number


async def shown(port: int) -> int:
    """The serial number of the certificate that a server shows in a new handshake."""
    pem = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
    return serial(pem)


async def until_shown(port: int, number: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while await shown(port) != number:
            await asyncio.sleep(0.1)


@asynccontextmanager
async def service(tls: RenewedServerTls) -> AsyncIterator[int]:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(ScriptedInference(), server)
    port = server.add_secure_port("127.0.0.1:0", tls.credentials())
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


def test_a_service_shows_a_new_certificate_and_no_call_fails(tmp_path: Path) -> None:
    old, new = (Authority(tmp_path, name) for name in ("old", "new"))
    files = old.issue("service")
    both = tmp_path / "both.pem"
    both.write_bytes(old.ca.read_bytes() + new.ca.read_bytes())

    async def ask(port: int, stop: asyncio.Event) -> int:
        """Asks on new connections until told to stop; returns how often."""
        count = 0
        while not stop.is_set():
            credentials = grpc.ssl_channel_credentials(both.read_bytes())
            # A pool of its own: connections of channels to one address are shared otherwise.
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as made:
                await inference_pb2_grpc.InferenceStub(made).GetModelInfo(
                    inference_pb2.GetModelInfoRequest(),
                    metadata=(("authorization", f"Bearer {KEY}"),),
                    timeout=PATIENCE,
                )
            count += 1
        return count

    async def run() -> None:
        tls = ServerTls.of_flags(files.cert, files.key, None)
        assert tls is not None
        renewed = RenewedServerTls(tls)
        async with service(renewed) as port:
            assert await shown(port) == serial(files.cert.read_bytes())
            stop = asyncio.Event()
            asking = asyncio.create_task(ask(port, stop))
            for _ in range(2):
                fresh = new.issue("fresh")
                number = serial(fresh.cert.read_bytes())
                replace_files(files, fresh)
                await until_shown(port, number)
            # Half a change is none.
            number = await shown(port)
            files.cert.write_bytes(old.issue("x").cert.read_bytes())
            async with asyncio.timeout(PATIENCE):
                while not renewed.reload_failed:
                    await asyncio.sleep(0.05)
            assert await shown(port) == number
            stop.set()
            assert await asking > 2

    asyncio.run(run())


def test_a_gateway_shows_a_new_certificate_and_open_connections_go_on(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    files = authority.issue("gateway")

    async def run() -> None:
        flags = ["--port=0", f"--tls-cert={files.cert}", f"--tls-key={files.key}"]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serving.gateway", *flags, "--metrics-port=0"),
            env=os.environ | {"MIXTRAL_JAX_API_KEY": KEY, "MIXTRAL_JAX_SERVICE_KEY": KEY},
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            metrics = re.search(r"http://\S+", (await process.stderr.readline()).decode())
            line = re.search(r"127\.0\.0\.1:(\d+)", (await process.stderr.readline()).decode())
            assert metrics is not None and line is not None
            port = int(line[1])
            context = ssl.create_default_context(cafile=str(authority.ca))
            async with (
                httpx.AsyncClient(verify=context, timeout=PATIENCE, trust_env=False) as client,
                httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as plain,
            ):
                live = f"https://127.0.0.1:{port}/health/live"
                assert (await client.get(live)).status_code == 200
                fresh = authority.issue("fresh")
                number = serial(fresh.cert.read_bytes())
                replace_files(files, fresh)
                await until_shown(port, number)
                for checked in (client, httpx.AsyncClient(verify=context, trust_env=False)):
                    assert (await checked.get(live)).status_code == 200
                await checked.aclose()
                files.key.write_text("nonsense")
                failed = "mixtral_certificate_reload_failed 1.0"
                async with asyncio.timeout(PATIENCE):
                    while failed not in (await plain.get(metrics[0])).text:
                        await asyncio.sleep(0.1)
                assert await shown(port) == number
        finally:
            process.send_signal(signal.SIGTERM)
            await process.communicate()

    asyncio.run(run())
