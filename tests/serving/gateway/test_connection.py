"""The gateway's own certificate is renewed, and no call is lost by it."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from serving.access.tls import Certificate, ServerTls, ServiceTls
from serving.gateway.connection import Connection
from serving.gateway.upstream import ModelService
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from tests.support.certificates import Authority
from tests.support.fakes import KEY, PATIENCE, ScriptedInference


class Naming(ScriptedInference):
    """Notes the name in the certificate of whoever asks for an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateChunk]:
        self.names.append(context.auth_context()["x509_common_name"][0].decode())
        async for chunk in super().Generate(request, context):
            yield chunk


def test_later_calls_show_the_new_certificate_and_those_under_way_go_on(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    own, served = authority.issue("first"), authority.issue("service")

    async def run() -> None:
        inference = Naming()
        server = grpc.aio.server()
        rpc.add_InferenceServicer_to_server(inference, server)
        tls = ServerTls(Certificate(served.cert, served.key), authority.ca)
        port = server.add_secure_port("127.0.0.1:0", tls.credentials())
        await server.start()
        shown = ServiceTls(authority.ca, Certificate(own.cert, own.key))
        connection = Connection(f"127.0.0.1:{port}", shown)
        async with connection.channel(lambda newest: service.use(newest)) as channel:
            service = ModelService(channel, KEY)
            under_way = service.generate(pb.GenerateRequest(text="one !wait two"))
            assert (await under_way.read()) is not None
            own.key.write_text("nonsense")
            async with asyncio.timeout(PATIENCE):
                while not connection.reload_failed:
                    await asyncio.sleep(0.05)
            fresh = authority.issue("second")
            os.replace(fresh.cert, own.cert)
            os.replace(fresh.key, own.key)
            async with asyncio.timeout(PATIENCE):
                while inference.names[-1] != "second":
                    answer = service.generate(pb.GenerateRequest(text="one"))
                    while await answer.read() is not None:
                        pass
                    await asyncio.sleep(0.05)
            assert not connection.reload_failed
            inference.release()
            texts = []
            while (chunk := await under_way.read()) is not None:
                texts.append(chunk.text)
            assert texts[0] == " two"
        await server.stop(0)

    asyncio.run(run())
