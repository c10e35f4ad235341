"""Lines of pairs, as TRL and OpenAI have them, become pairs; a wrong one is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_jax.tokenization.messages import Tool
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from mixtral_jax.training.dataset import Dataset, LongRows, Source
from mixtral_jax.training.packing import PairedData
from mixtral_jax.training.pairs import Pair, read_pair
from mixtral_jax.training.rows import Chat, Completion, DataError

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "yes"}
BAD = {"role": "assistant", "content": "no"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_the_forms_of_trl_and_openai_are_one_pair() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "input": {"messages": [USER], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
    ]
    for row in rows:
        assert read_pair(row, ()) == Pair(
            Chat([USER, GOOD], [False, True]), Chat([USER, BAD], [False, True])
        )
        with_tools = {**row, "tools": [TOOL]}
        if "input" in row:
            with_tools = {**row, "input": {**row["input"], "tools": [TOOL]}}
        for chat in vars(read_pair(with_tools, ())).values():
            assert chat.tools == (Tool("add", "", '{"type": "object"}'),)
    text = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5", "score": 3}
    assert read_pair(text, ["score"]) == Pair(Completion("2+2=", " 4"), Completion("2+2=", " 5"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER, GOOD]}, "which are no pair of answers: give"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected that is an empty text"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, "only some are text"),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, "only some are text"),
        ({"chosen": "b", "rejected": "c"}, "without a prompt"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "nothing to learn"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": []}, "has rejected that are list"),
        ({"chosen": [USER, GOOD], "rejected": [GOOD]}, "begin otherwise"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "nothing to learn"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "id": 3}, "unknown key 'id'"),
        (
            {"input": {"messages": [USER], "model": "a"}, "preferred_output": [GOOD]}
            | {"non_preferred_output": [BAD]},
            "unknown key 'model' in input",
        ),
        (
            {"input": [USER], "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "give an object with messages",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [TOOL]}, "tools beside text"),
    ],
)
def test_a_wrong_pair_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_pair(row, ())


def read(folder: Path, *rows: object, length: int = 8, **policies: Any) -> Dataset:
    path = folder / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return Dataset.read([Source(path)], ByteTokenizer(), length, has_pairs=True, **policies)


def pair(chosen: str, rejected: str) -> dict[str, str]:
    """A pair of 2 ids, then those of each answer and its end."""
    return {"prompt": "q", "chosen": chosen, "rejected": rejected}


def test_pairs_become_rows_of_a_batch(tmp_path: Path) -> None:
    data = read(tmp_path, pair("aa", "b"), pair("c", "ddd"), pair("e", "f"))
    assert [len(example.ids) for example in data.examples] == [5, 4, 4, 6, 4, 4]
    batches = PairedData(data.examples, 8, 2, 0, is_shuffled=False)
    assert (batches.num_rows, batches.num_steps) == (3, 2)
    assert batches.share_used == pytest.approx(27 / 48)
    chosen, rejected = batches.batch(0)
    assert (chosen.segments != 0).sum(axis=1).tolist() == [5, 4]
    assert (rejected.segments != 0).sum(axis=1).tolist() == [4, 6]
    assert chosen.weights.sum(axis=1).tolist() == [3, 2]
    assert np.array_equal(chosen.tokens[:, :2], rejected.tokens[:, :2])
    last = batches.batch(1)
    assert last.chosen.weights.sum(axis=1).tolist() == [2, 0]  # the second pair is empty
    mixed = PairedData(data.examples, 8, 2, 0)
    assert (
        sorted(mixed.rows(0) + mixed.rows(1)) == [0, 1, 2] == sorted(mixed.rows(8) + mixed.rows(9))
    )


def test_a_pair_is_kept_or_left_out_as_a_whole(tmp_path: Path) -> None:
    rows = [pair("a", "bbbbbbbb"), pair("aaaaaaaa", "aaaaaaaab"), pair("a", "b")]
    with pytest.raises(DataError, match=r"2 of 3 rows .*\n.*a\.jsonl:1 has 11 tokens"):
        read(tmp_path, *rows)
    dropped = read(tmp_path, *rows, long_rows=LongRows.DROP)
    assert (len(dropped.examples), dropped.account.dropped) == (2, 4)
    # The second pair is the same up to the length, so nothing of it is kept.
    cut = read(tmp_path, *rows, long_rows=LongRows.TRUNCATE)
    assert (len(cut.examples), cut.account.truncated, cut.account.dropped) == (4, 1, 2)
    with pytest.raises(DataError, match="the same answer twice"):
        read(tmp_path, pair("a", "a"))
