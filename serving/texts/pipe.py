"""Pipe: messages over a stream of bytes between two processes of one machine.

A message stands behind its length, four bytes, the lowest first. One end may be used by threads
(`Pipe`), the other by an event loop (`Buffer` takes the bytes apart).
"""

import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

MAX_BYTES = 64 << 20
"""Of a message. A request has a prompt, and a grammar of a few megabytes at most."""
_LENGTH = struct.Struct("<I")
_MAX_PENDING = 50_000  # messages that wait to be sent
_READ = 1 << 18  # bytes


class PipeError(ValueError):
    """A message that is too large to be one of ours."""


def framed(message: bytes) -> bytes:
    """Returns a message with its length before it; raises PipeError if it is too large."""
    if len(message) > MAX_BYTES:
        raise PipeError(f"a message of {len(message):,} bytes; at most {MAX_BYTES:,} are sent")
    return _LENGTH.pack(len(message)) + message


class Buffer:
    """Bytes that have come, until they are whole messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Adds bytes; yields the messages that are whole now. Raises PipeError."""
        self._bytes += data
        place, size = 0, len(self._bytes)
        while size - place >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes, place)
            if length > MAX_BYTES:
                raise PipeError(f"a message of {length:,} bytes; at most {MAX_BYTES:,} are read")
            end = place + _LENGTH.size + length
            if end > size:
                break
            yield bytes(memoryview(self._bytes)[place + _LENGTH.size : end])
            place = end
        del self._bytes[:place]


class Pipe:
    """An end of the stream with two threads of its own: one reads, the other writes.

    So whoever sends never waits for the other end. An end that does not read what it is sent is cut
    off: as soon as one message waits for `patience` seconds, or too many do.

    Args:
        end: A connected stream socket, which the pipe closes.
        take: Called by the reading thread with each message; what it raises closes the pipe.
        lost: Called once, with the reason, when the pipe has closed for another reason than
            `close`; by one of the threads.
        patience: Seconds that the other end may take to read a message.
        name: Of the threads.
    """

    def __init__(
        self,
        end: socket.socket,
        take: Callable[[bytes], None],
        lost: Callable[[str], None],
        *,
        patience: float = 10.0,
        name: str = "pipe",
    ) -> None:
        self._end, self._take, self._lost = end, take, lost
        self._end.settimeout(None)
        seconds, rest = divmod(patience, 1)
        timeout = struct.pack("@ll", int(seconds), int(rest * 1e6))
        self._end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self._outgoing: queue.SimpleQueue[Callable[[], bytes] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_open = True
        threads = ((self._read, "reads"), (self._write, "writes"))
        self._threads = [
            threading.Thread(target=work, name=f"{name} {what}", daemon=True)
            for work, what in threads
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def send(self, write: Callable[[], bytes]) -> None:
        """Sends a message soon, which `write` returns to the writing thread. Never waits.

        After the pipe has closed it does nothing.
        """
        if self._outgoing.qsize() >= _MAX_PENDING:
            self._close("it does not read what it is sent")
        elif self._is_open:
            self._outgoing.put(write)

    def close(self) -> None:
        """Closes the stream, for both ends, and what has not been sent is lost."""
        self._close(None)

    def _close(self, reason: str | None) -> None:
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
        with suppress(OSError):  # the other end may have closed it
            self._end.shutdown(socket.SHUT_RDWR)  # wakes both threads
        self._outgoing.put(None)
        if reason is not None:
            self._lost(reason)

    def _read(self) -> None:
        buffer = Buffer()
        try:
            while data := self._end.recv(_READ):
                for message in buffer.feed(data):
                    self._take(message)
        except OSError:  # reset: it had not read all
            self._close("it has gone")
        except Exception as error:
            self._close(f"it sends what cannot be read: {error}")
        self._close("it has gone")

    def _write(self) -> None:
        try:
            while (write := self._outgoing.get()) is not None:
                self._end.sendall(framed(write()))
        except (TimeoutError, BlockingIOError):  # SO_SNDTIMEO has passed
            self._close("it does not read what it is sent")
        except OSError:
            self._close("it has gone")
        except Exception as error:
            self._close(f"a message to it cannot be written: {error}")
        self._end.close()
