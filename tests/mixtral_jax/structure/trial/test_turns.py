import threading

from mixtral_jax.structure.trial.turns import Turns


def test_one_caller_has_one_worker() -> None:
    turns: Turns[str] = Turns()
    for job in ("a1", "a2"):
        turns.put(b"a", job)
    turns.put(b"b", "b1")
    assert turns.take() == (b"a", "a1")
    assert turns.take() == (b"b", "b1")  # though a2 came before it
    turns.finish(b"a", 0.0)
    assert turns.take() == (b"a", "a2")


def test_who_used_less_comes_first() -> None:
    now = 0.0
    turns: Turns[str] = Turns(lambda: now)
    turns.put(b"slow", "1")
    turns.take()
    turns.finish(b"slow", 2.0)
    turns.put(b"slow", "2")
    turns.put(b"new", "3")
    assert turns.take() == (b"new", "3")
    turns.finish(b"new", 1.0)
    turns.put(b"new", "4")
    assert turns.take() == (b"new", "4")  # one second is less than two
    turns.finish(b"new", 2.0)
    turns.put(b"new", "5")
    assert turns.take() == (b"slow", "2")


def test_time_is_forgotten() -> None:
    now = 0.0
    turns: Turns[str] = Turns(lambda: now)
    turns.put(b"old", "1")
    turns.take()
    turns.finish(b"old", 2.0)
    now = 90.0  # three half-lives: a quarter of a second is left
    turns.put(b"new", "2")
    turns.take()
    turns.finish(b"new", 0.5)
    turns.put(b"new", "3")
    turns.put(b"old", "4")
    assert turns.take() == (b"old", "4")


def test_close_ends_those_who_wait() -> None:
    turns: Turns[str] = Turns()
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.append(turns.take()))
    thread.start()
    assert turns.close() == []
    thread.join()
    assert taken == [None]
    assert turns.take() is None
