"""The data set of the package: the same for a seed, and no name of the held-out rows in another."""

from pathlib import Path

from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from mixtral_jax.training.bookings import bookings, write_bookings
from mixtral_jax.training.dataset import Dataset, Source


def test_a_request_holds_what_its_answer_says() -> None:
    for booking in bookings(50, seed=1):
        fields = [field.split("=") for field in booking.answer.split("; ")]
        assert [name for name, _ in fields] == ["name", "guests", "time"]
        assert all(value in booking.request for _, value in fields)


def test_held_out_rows_have_other_names() -> None:
    known = {b.answer.split(";")[0] for b in bookings(500, seed=1)}
    others = {b.answer.split(";")[0] for b in bookings(500, seed=1, held_out=True)}
    assert len(known) > 30
    assert len(others) > 10
    assert not known & others


def test_a_seed_gives_the_same_rows(tmp_path: Path) -> None:
    assert bookings(5, seed=1) == bookings(5, seed=1) != bookings(5, seed=2)
    write_bookings(tmp_path / "a.jsonl", bookings(5, seed=1))
    data = Dataset.read([Source(tmp_path / "a.jsonl")], ByteTokenizer(), 256)
    assert data.account.examples == 5
    assert data.account.targets == sum(len(b.answer) + 1 for b in bookings(5, seed=1))
