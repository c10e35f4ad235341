"""The channel to the service, and a new one when the gateway's own certificate is renewed.

gRPC reads the certificate of a client once for a channel. When its files change, later calls go
over a new channel, and the old one is closed when the calls under way on it have ended.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import grpc

from serving.access.renewal import LOOK_SECONDS, Renewed
from serving.access.tls import ServiceTls
from serving.channel import options_for

_CLOSING_SECONDS = 24 * 3600.0  # time that calls may go on over a channel that has been replaced


class Connection:
    """Channels to a service, of which the newest is for new calls.

    Args:
        target: The service as gRPC names it.
        tls: The files of its authority and of the gateway's certificate; None: no TLS.
    """

    def __init__(self, target: str, tls: ServiceTls | None) -> None:
        self._target, self._tls = target, tls
        self._renewed = None if tls is None else Renewed(tls.files, tls.checked_credentials)

    @property
    def reload_failed(self) -> bool:
        """True while an older certificate is shown, because the files cannot be used."""
        return self._renewed is not None and self._renewed.reload_failed

    @asynccontextmanager
    async def channel(
        self, replace: Callable[[grpc.aio.Channel], None]
    ) -> AsyncIterator[grpc.aio.Channel]:
        """Yields a channel, which connects when it is first used, and whenever it must again.

        Args:
            replace: Called with the channel for all later calls when there is a new one.
        """
        channels = [self._open()]
        following = asyncio.create_task(self._follow(channels, replace))
        try:
            yield channels[0]
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
            for channel in tuple(channels):  # replaced ones leave the list as they close
                await channel.close(None)

    async def _follow(
        self, channels: list[grpc.aio.Channel], replace: Callable[[grpc.aio.Channel], None]
    ) -> None:
        """Opens a new channel whenever the files have changed; never returns."""
        closing: set[asyncio.Task[None]] = set()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._renewed is None or not self._renewed.look():
                continue
            channels.append(self._open())
            replace(channels[-1])
            old = asyncio.create_task(_close(channels, channels[-2]))
            closing.add(old)
            old.add_done_callback(closing.discard)

    def _open(self) -> grpc.aio.Channel:
        options = options_for(self._target)
        if self._tls is None or self._renewed is None:
            return grpc.aio.insecure_channel(self._target, options=options)
        return grpc.aio.secure_channel(
            self._target, self._renewed.value, [*options, *self._tls.options()]
        )


async def _close(channels: list[grpc.aio.Channel], channel: grpc.aio.Channel) -> None:
    await channel.close(grace=_CLOSING_SECONDS)
    channels.remove(channel)
