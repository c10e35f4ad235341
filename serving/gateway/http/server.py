"""The gateway's server: uvicorn's, with connections that are accepted within limits.

uvicorn leaves accepting to asyncio, which takes every connection and gives a TLS handshake a
minute. Here a connection is counted before anything of it is read (connections.py).
"""

import asyncio
import errno
import logging
import socket
from contextlib import suppress

import uvicorn

from serving.errors import Unavailable
from serving.gateway.http.connections import Connections, Place
from serving.gateway.http.drain import Drain, DrainingServer
from serving.gateway.http.protocol import Protocol, refusal_of

# Errors of accept(2) where the process, or the machine, may open no more files.
_NO_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_PAUSE_SECONDS = 0.1  # after an error of accept(2)
_CLOSING_SECONDS = 5.0  # time for the end of a TLS connection

logger = logging.getLogger(__name__)


class HttpServer(DrainingServer):
    """Accepts connections at a socket, and serves each by a `Protocol`.

    Args:
        config: uvicorn's configuration, whose application is `drain`.
        drain: The drain to begin at the first signal.
        listener: A socket that listens. It is closed in the end.
        connections: Says which connections there is room for.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Drain,
        listener: socket.socket,
        connections: Connections,
    ) -> None:
        super().__init__(config, drain)
        self._listener = listener
        self._connections = connections
        self._accepting: asyncio.Task[None] | None = None
        self._opening: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the application, and accepts connections from then on."""
        await super().startup(sockets=[])
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting, and waits for requests under way as long as uvicorn does."""
        if self._accepting is not None:
            self._accepting.cancel()
        self._listener.close()
        for task in list(self._opening):
            task.cancel()
        await super().shutdown(sockets)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except ConnectionError:
                continue  # the client has gone already
            except OSError as error:
                if error.errno in _NO_FILES:
                    self._connections.refuse("files", "")
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            try:
                self._take(connection, str(address[0]))
            except Exception:  # a fault of ours must not keep the others out
                logger.exception("a connection could not be taken")
                connection.close()
            await asyncio.sleep(0)  # lets others run, and the connection's task begin

    def _take(self, connection: socket.socket, address: str) -> None:
        def end() -> None:
            task.cancel()

        place = self._connections.take(address, end)
        if place is None:
            if self.config.ssl is None:
                error = Unavailable("too many connections are open; try again shortly")
                connection.setblocking(False)
                with suppress(OSError):  # the client may have gone
                    connection.send(refusal_of(error))
            connection.close()
            return
        task = asyncio.create_task(self._open(connection, address, place))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket, address: str, place: Place) -> None:
        """Makes a connection ready for requests; with TLS its handshake belongs to that."""
        limits, tls = self._connections.limits, self.config.ssl
        is_open = False
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._protocol(place),
                connection,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else limits.head_seconds,
                ssl_shutdown_timeout=None if tls is None else _CLOSING_SECONDS,
            )
            is_open = True
        except OSError:  # also TLS errors and time-outs; the connection has been closed
            self._connections.refuse("handshake", address)
        finally:
            if not is_open:
                place.leave()

    def _protocol(self, place: Place) -> Protocol:
        return Protocol(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            connections=self._connections,
            place=place,
        )
