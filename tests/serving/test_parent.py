"""Duties of a process to the one that started it."""

import os

import pytest

from serving.parent import BEAT_VARIABLE, beat


def test_a_beat_is_a_byte_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BEAT_VARIABLE, raising=False)
    beat()  # without a parent that watches, nothing happens
    reading, writing = os.pipe()
    monkeypatch.setenv(BEAT_VARIABLE, str(writing))
    beat()
    beat()
    assert os.read(reading, 16) == b"11"
    with pytest.raises(BlockingIOError):  # the first beat has made it so
        while True:
            os.write(writing, b"1" * 4096)
    beat()  # the pipe is full
    os.close(reading)
    beat()  # the parent is gone
    os.close(writing)
    beat()  # the variable names no pipe
