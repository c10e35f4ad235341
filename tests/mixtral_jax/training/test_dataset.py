"""A data set tells what became of every row."""

import json
from pathlib import Path

import pytest

from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from mixtral_jax.training.dataset import BadRows, Dataset, LongRows, Source
from mixtral_jax.training.rows import DataError


def row(answer: str) -> str:
    """A chat of 6 ids and those of the answer, of which the answer and its end are targets."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages})


def file_of(folder: Path, *lines: str, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_rows_and_targets_are_counted(tmp_path: Path) -> None:
    sources = [Source(file_of(tmp_path, row("ab"), row("c")), 2)]
    examples, account = Dataset.read(sources, ByteTokenizer(), 10)
    assert [len(example.ids) for example in examples] == [8, 7, 8, 7]
    assert (account.rows, account.examples, account.tokens, account.targets) == (2, 4, 30, 10)
    assert account.target_share == pytest.approx(1 / 3)


def test_bad_rows_are_listed_together_or_dropped(tmp_path: Path) -> None:
    sources = [Source(file_of(tmp_path, row("ab"), "{", row("c"), "{}"))]
    with pytest.raises(DataError) as refusal:
        Dataset.read(sources, ByteTokenizer(), 10)
    lines = str(refusal.value).splitlines()
    assert lines[0].startswith("2 of 4 rows cannot be trained on")
    assert [line.split()[0] for line in lines[1:]] == [
        f"{tmp_path}/a.jsonl:2",
        f"{tmp_path}/a.jsonl:4",
    ]
    data = Dataset.read(sources, ByteTokenizer(), 10, bad_rows=BadRows.DROP)
    assert len(data.examples) == 2
    assert [bad.place[-2:] for bad in data.account.bad_rows] == [":2", ":4"]


def test_a_refusal_counts_rows(tmp_path: Path) -> None:
    many = file_of(tmp_path, *[row("a")] * 9, "{", *[row("a")] * 10)
    with pytest.raises(DataError) as refusal:
        Dataset.read([Source(many)], ByteTokenizer(), 10)
    assert str(refusal.value).splitlines() == [
        "1 of 20 rows cannot be trained on; bad_rows: drop leaves them out:",
        f"  {many}:10 is no JSON by itself: a row is one line (JSON Lines)",
    ]
    for policy in BadRows:
        both = [Source(many), Source(file_of(tmp_path, "", " ", name="b.jsonl"))]
        with pytest.raises(DataError, match=r"b\.jsonl is empty: it has no rows"):
            Dataset.read(both, ByteTokenizer(), 10, bad_rows=policy)
    with pytest.raises(DataError, match=r"\A2 of 2 rows cannot be trained on:\n"):
        Dataset.read([Source(file_of(tmp_path, "{", "["))], ByteTokenizer(), 10)


def test_nothing_to_train_on_is_refused_even_if_bad_rows_are_dropped(tmp_path: Path) -> None:
    for lines in (["{"], [""]):
        sources = [Source(file_of(tmp_path, *lines))]
        with pytest.raises(DataError, match=r"a\.jsonl"):
            Dataset.read(sources, ByteTokenizer(), 10, bad_rows=BadRows.DROP)


def test_long_rows_are_refused_cut_or_dropped(tmp_path: Path) -> None:
    sources = [Source(file_of(tmp_path, row("abcdef"), row("a")))]
    with pytest.raises(DataError, match=r"a\.jsonl:1 has 12 tokens, more than the length 8"):
        Dataset.read(sources, ByteTokenizer(), 8)
    cut = Dataset.read(sources, ByteTokenizer(), 8, long_rows=LongRows.TRUNCATE)
    assert [len(example.ids) for example in cut.examples] == [8, 7]
    assert (cut.account.truncated, cut.account.dropped) == (1, 0)
    dropped = Dataset.read(sources, ByteTokenizer(), 8, long_rows=LongRows.DROP)
    assert [len(example.ids) for example in dropped.examples] == [7]
    assert (dropped.account.truncated, dropped.account.dropped) == (0, 1)
    short = Dataset.read(sources, ByteTokenizer(), 7, long_rows=LongRows.TRUNCATE)
    assert short.account.truncated == 1  # it keeps a target
    with pytest.raises(
        DataError, match="has no row to train on that fits: all 2"
    ):  # all targets are cut off
        Dataset.read(sources, ByteTokenizer(), 5, long_rows=LongRows.TRUNCATE)


def test_a_source_has_a_weight() -> None:
    assert Source.parse("a.jsonl") == Source(Path("a.jsonl"), 1)
    assert Source.parse("b:c/a.jsonl:3") == Source(Path("b:c/a.jsonl"), 3)
    assert str(Source.parse("a.jsonl:3")) == "a.jsonl:3"
    for wrong in ("a.jsonl:0", "a.jsonl:0.5"):
        with pytest.raises(DataError, match="a whole number of at least 1"):
            Source.parse(wrong)
