"""The text processes of a service, as its engine's process starts, watches and ends them.

They share the port of gRPC, of which the system gives each new connection to one of them. One that
dies is started again (child.py), and the calls of the others go on.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence

from serving.accounting.ledger_server import LEDGER_VARIABLE, LedgerServer
from serving.child import Child
from serving.errors import SetupError
from serving.parent import PARENT_VARIABLE
from serving.ports import hold_port
from serving.proto import texts_pb2 as pb
from serving.texts.hub import Hub, adapters_message

MODULE = "serving.launch.text_process"
_BEAT_SECONDS = 20.0  # a process whose loop stands still for longer is killed
_LOOK_SECONDS = 0.1
_START_SECONDS = 120.0
_PORT_SECONDS = 5.0  # processes of an engine's process that was killed end within them
_END_SECONDS = 5.0  # that a process may take to end after its drain


class TextProcesses:
    """A front of several processes.

    Args:
        hub: Their pipes.
        welcome: What each is told first, but for its ports and the adapters.
        digests: Returns the digests of the loaded adapters by their names.
        options: The command line of each.
        address: Host and port that they share; port 0 takes any.
        own_ports: A port on 127.0.0.1 for each alone; empty: they have none.
        count: Their number.
        ledger: The accounts that they share, which end with them.
        say: Called with lines for the operator.
    """

    def __init__(
        self,
        hub: Hub,
        welcome: pb.Welcome,
        digests: Callable[[], Mapping[str, str]],
        options: Sequence[str],
        address: tuple[str, int],
        own_ports: Sequence[int],
        count: int,
        ledger: LedgerServer,
        say: Callable[[str], None],
    ) -> None:
        self._hub, self._welcome, self._digests = hub, welcome, digests
        self._host, self._port = address
        self._own_ports, self._say = own_ports, say
        self._ledger = ledger
        environment = {
            **os.environ,
            PARENT_VARIABLE: str(os.getpid()),
            LEDGER_VARIABLE: ledger.address,
        }
        self._children = [
            Child(
                f"text process {index}",
                [MODULE, *options],
                environment,
                beat_seconds=_BEAT_SECONDS,
                connect=self._connecting(index),
            )
            for index in range(count)
        ]
        self._told: Mapping[str, str] = {}
        self._held: socket.socket | None = None
        self._watch: asyncio.Task[None] | None = None
        self._is_ending = False
        self.was_told_to_end = asyncio.Event()

    async def start(self) -> int:
        """Starts the processes, and waits until all serve; returns the port that they share."""
        loop = asyncio.get_running_loop()

        def drain() -> None:
            loop.call_soon_threadsafe(self.was_told_to_end.set)

        self._hub.on_drain = drain
        self._held = await self._hold()
        self._welcome.port = self._held.getsockname()[1]
        self._watch = asyncio.create_task(self._keep_running())
        deadline = time.monotonic() + _START_SECONDS
        while not all(child.has_served for child in self._children):
            if self._watch.done():
                self._watch.result()
            if time.monotonic() > deadline:
                raise SetupError(f"the text processes do not serve after {_START_SECONDS:g} s")
            await asyncio.sleep(_LOOK_SECONDS / 2)
        return self._welcome.port

    async def failed(self) -> None:
        """Raises SupervisorError when a process is given up."""
        assert self._watch is not None
        await asyncio.shield(self._watch)

    async def leave(self) -> None:
        """Has their health say no."""
        self._hub.tell(pb.ToText(leaving=pb.Leaving()))

    async def finish(self, deadline: float) -> None:
        """Has them end when their running answers have; kills those that do not."""
        self._is_ending = True
        if self._watch is not None:
            self._watch.cancel()
        seconds = max(0.0, deadline - time.monotonic())
        self._hub.tell(pb.ToText(ending=pb.Ending(seconds=seconds)))
        processes = [child.process for child in self._children if child.process is not None]
        last = time.monotonic() + seconds + _END_SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < last:
            await asyncio.sleep(_LOOK_SECONDS / 2)
        self.kill()

    def kill(self) -> None:
        """Ends those that are left at once."""
        self._is_ending = True
        for child in self._children:
            if child.process is not None and child.process.poll() is None:
                child.process.kill()
                child.process.wait()
            child.close()
        self._hub.close()
        self._ledger.close()
        if self._held is not None:
            self._held.close()

    def _connecting(self, index: int) -> Callable[[], int]:
        def connect() -> int:
            welcome = pb.Welcome()
            welcome.CopyFrom(self._welcome)
            welcome.adapters.CopyFrom(adapters_message(self._digests()))
            if self._own_ports:
                welcome.own_port = self._own_ports[index]
            return self._hub.connect(index, welcome, lambda reason: self._lost(index, reason))

        return connect

    def _lost(self, index: int, reason: str) -> None:
        """Ends a process whose pipe has closed: it serves nobody any more."""
        process = self._children[index].process
        if self._is_ending or process is None or process.poll() is not None:
            return
        self._say(f"text process {index} is ended, for {reason}")
        process.kill()

    async def _keep_running(self) -> None:
        while True:
            for index, child in enumerate(self._children):
                child.keep_running()
                state = self._hub.state(index)
                if state is not None and state.is_serving:
                    child.note_serving()
            digests = self._digests()
            if digests != self._told:
                self._told = digests
                self._hub.tell_adapters(digests)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _hold(self) -> socket.socket:
        """Returns a socket that keeps the port for our own processes; it takes no connection.

        Raises SetupError if another server has the port.
        """
        deadline = time.monotonic() + _PORT_SECONDS
        while True:
            try:
                return hold_port(self._host, self._port)
            except OSError:
                if time.monotonic() > deadline:
                    raise SetupError(
                        f"cannot listen on {self._host}:{self._port}; is another server running "
                        "there?"
                    ) from None
            await asyncio.sleep(_LOOK_SECONDS)
