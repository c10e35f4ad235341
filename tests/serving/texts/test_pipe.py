"""Messages over a stream: whole, in order, bounded, and never waited for by who sends them."""

import queue
import socket
import struct
import time

import pytest

from serving.texts.pipe import MAX_BYTES, Buffer, Pipe, PipeError, framed

PATIENCE = 10.0


def test_messages_come_whole_however_their_bytes_are_cut() -> None:
    messages = [b"", b"a", b"bc" * 300, b"d"]
    stream = b"".join(map(framed, messages))
    for size in (1, 3, 7, len(stream)):
        buffer, got = Buffer(), []
        for start in range(0, len(stream), size):
            got += list(buffer.feed(stream[start : start + size]))
        assert got == messages


def test_a_length_beyond_the_bound_is_refused_before_its_bytes_come() -> None:
    with pytest.raises(PipeError, match="at most"):
        list(Buffer().feed(struct.pack("<I", MAX_BYTES + 1)))


def test_two_ends_talk_and_each_hears_that_the_other_has_gone() -> None:
    ours, theirs = socket.socketpair()
    got: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    pipe = Pipe(ours, got.put, lost.put)
    pipe.start()
    pipe.send(lambda: b"hello")
    assert theirs.recv(99) == framed(b"hello")
    theirs.sendall(framed(b"good") + framed(b"bye"))
    assert [got.get(timeout=PATIENCE) for _ in range(2)] == [b"good", b"bye"]
    theirs.close()
    assert lost.get(timeout=PATIENCE) == "it has gone"
    pipe.send(lambda: b"nobody")  # does nothing
    assert lost.empty()


def test_what_cannot_be_taken_closes_the_pipe_and_says_why() -> None:
    ours, theirs = socket.socketpair()
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()

    def refuse(message: bytes) -> None:
        raise ValueError("nonsense")

    Pipe(ours, refuse, lost.put).start()
    theirs.sendall(framed(b"x"))
    assert "nonsense" in lost.get(timeout=PATIENCE)
    assert theirs.recv(1) == b""
    theirs.close()


def test_an_end_that_does_not_read_is_cut_off_and_delays_nobody() -> None:
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()

    def send(patience: float) -> tuple[Pipe, socket.socket]:
        ours, theirs = socket.socketpair()
        pipe = Pipe(ours, lambda message: None, lost.put, patience=patience)
        pipe.start()
        for _ in range(1000):
            pipe.send(lambda: bytes(1 << 16))
        return pipe, theirs

    began = time.monotonic()
    pipe, theirs = send(PATIENCE)
    assert time.monotonic() - began < PATIENCE and lost.empty()  # no send has waited for it
    pipe.close()
    theirs.close()
    _, theirs = send(0.2)
    assert lost.get(timeout=PATIENCE) == "it does not read what it is sent"
    theirs.close()


def test_closing_tells_nobody() -> None:
    ours, theirs = socket.socketpair()
    lost: list[str] = []
    pipe = Pipe(ours, lambda message: None, lost.append)
    pipe.start()
    pipe.close()
    assert theirs.recv(1) == b"" and not lost
    theirs.close()
