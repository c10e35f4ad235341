"""Fronts: who answers calls for an engine, in this process or in processes of their own."""

import asyncio
import time
from typing import Any, Protocol

import grpc

from serving.access.credentials import Access
from serving.access.renewal import RenewedServerTls
from serving.accounting.admission import Admission
from serving.accounting.caller_fields import CallerFields
from serving.engine.worker import EngineWorker
from serving.errors import SetupError
from serving.service.service import InferenceService, create_server, set_serving


class Front(Protocol):
    """Answers calls by an engine, whose end it does not outlive."""

    @property
    def was_told_to_end(self) -> asyncio.Event:
        """Set by Drain."""

    async def start(self) -> int:
        """Begins to serve; returns the port. Raises SetupError."""

    async def failed(self) -> None:
        """Raises, at some time, why calls can be answered no more; else it never returns."""

    async def leave(self) -> None:
        """Has health say no; calls that come all the same are served."""

    async def finish(self, deadline: float) -> None:
        """Returns when running answers have ended, or at that time.monotonic(); all calls end."""

    def kill(self) -> None:
        """Ends what is left of it at once."""


class LocalFront:
    """A server of gRPC on this process's event loop.

    Args:
        worker: The engine's.
        inference: The service.
        address: Where it listens.
        access: Who may ask.
        tls: Its certificate; None without TLS.
        admission: Admits the calls of others than the gateway.
        fields: Marks them.
        max_calls: Requests that the engine can hold.
    """

    def __init__(
        self,
        worker: EngineWorker,
        inference: InferenceService,
        address: str,
        access: Access,
        tls: RenewedServerTls | None,
        admission: Admission,
        fields: CallerFields,
        max_calls: int,
    ) -> None:
        self._worker, self._inference = worker, inference
        self._address, self._access, self._tls = address, access, tls
        self._admission, self._fields, self._max_calls = admission, fields, max_calls
        self._server: grpc.aio.Server | None = None
        self._checks: Any = None

    @property
    def was_told_to_end(self) -> asyncio.Event:
        """Set by Drain."""
        return self._inference.was_told_to_end

    async def start(self) -> int:
        """Begins to serve; returns the port."""
        try:
            self._server, port, self._checks = await create_server(
                self._address,
                self._inference,
                self._access,
                self._tls,
                self._admission,
                self._fields,
                self._max_calls,
            )
        except OSError as error:
            raise SetupError(str(error)) from None
        return port

    async def failed(self) -> None:
        """Never returns."""
        await asyncio.Event().wait()

    async def leave(self) -> None:
        """Has health say no."""
        await set_serving(self._checks, False)

    async def finish(self, deadline: float) -> None:
        """Waits for running answers, and ends the server."""
        while self._worker.num_under_way and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert self._server is not None
        await self._server.stop(1.0)  # calls that watch its health would go on for ever

    def kill(self) -> None:
        """Does nothing: it ends with the loop."""
