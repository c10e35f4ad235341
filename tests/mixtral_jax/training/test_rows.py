"""Lines of JSONL become rows, and a wrong one is named by file and line."""

import json
from pathlib import Path

import pytest

from mixtral_jax.tokenization.messages import Tool
from mixtral_jax.training.rows import (
    Chat,
    Completion,
    DataError,
    Refused,
    Row,
    read_content,
    rows_of,
)

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}


def calling(arguments: str) -> object:
    call = {"id": "x", "function": {"name": "add", "arguments": arguments}}
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}


def read(folder: Path, *lines: object) -> list[Row | Refused]:
    file = folder / "a.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_bytes("\n".join(texts).encode("utf-8", "surrogateescape"))
    return list(rows_of(file, read_content))


def test_the_four_forms(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    first, *others = read(
        tmp_path,
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "tools": [tool]},
        "",
        {"prompt": "2+2=", "completion": " 4"},
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        {"text": "Once", "prompt": None},
    )
    assert first == Row(
        f"{tmp_path}/a.jsonl:1",
        Chat(
            [USER, ANSWER, USER, ANSWER],
            [False, False, False, True],
            (Tool("add", "", '{"type": "object"}'),),
        ),
    )
    assert others == [
        Row(f"{tmp_path}/a.jsonl:3", Completion("2+2=", " 4")),
        Row(
            f"{tmp_path}/a.jsonl:4",
            Chat([USER, ANSWER, USER, ANSWER], [False, False, False, True]),
        ),
        Row(f"{tmp_path}/a.jsonl:5", Completion("", "Once")),
    ]


def test_parts_developers_calls_and_results(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    function = {"name": "add", "arguments": {"a": "é"}}
    calling = {"role": "assistant", "tool_calls": [{"id": "x", "function": function}]}
    result = {"role": "tool", "tool_call_id": "x", "content": "1", "name": "add"}
    developer = {"role": "developer", "content": parts}
    (row,) = read(tmp_path, {"messages": [developer, USER, calling, result, ANSWER]})
    assert isinstance(row, Row) and isinstance(row.content, Chat)
    assert row.content.messages == [
        {"role": "system", "content": "a\nb"},
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "x", "name": "add", "arguments": '{"a": "é"}'}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "x"},
        ANSWER,
    ]
    assert row.content.is_learnt == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is no JSON"),
        ("\udcff", "is not UTF-8 at byte 0"),
        ("[" * 100_000, "is no JSON that can be read"),
        ([], "is a JSON list"),
        ({}, "has the keys none: give"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "several forms"),
        ({"text": "a", "id": 3}, "unknown key 'id'"),
        ({"text": ""}, "an empty text"),
        ({"prompt": "a", "completion": [ANSWER]}, "only one is text"),
        ({"messages": []}, "give a list of messages"),
        ({"messages": [USER]}, "has nothing to learn"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "has nothing to learn"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"weight 0.5 in messages\[1\]"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "weight True"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "only messages of an assistant"),
        ({"messages": [{**USER, "role": "human"}, ANSWER]}, r"role 'human' in messages\[0\]"),
        ({"messages": [{**USER, "nmae": "a"}, ANSWER]}, r"key 'nmae' in messages\[0\]"),
        ({"messages": [{**USER, "name": "a"}, ANSWER]}, "which the model never reads"),
        ({"messages": [USER, {**ANSWER, "content": ""}]}, "neither text nor calls"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}, ANSWER]}, "not of type text"),
        ({"messages": [{**USER, "tool_calls": [{}]}, ANSWER]}, "only an assistant calls"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "without a function"),
        ({"messages": [USER, ANSWER], "tools": [{}]}, r"tools\[0\] that is no function"),
        (calling("[1]"), r"messages\[1\], tool_calls\[0\], that are a JSON list"),
        (calling('{"a": NaN}'), "that are no JSON"),
        (calling("add"), "that are no JSON"),
        (calling(""), "that are empty"),
        ('[\n{"text": "a"}]', "a row is one line"),
        ("\udcff\udcfea", "is UTF-16"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: object, reason: str) -> None:
    row, refused, *_ = read(tmp_path, {"text": "right"}, line)
    assert isinstance(row, Row)
    assert isinstance(refused, Refused)
    assert refused.place == f"{tmp_path}/a.jsonl:2"
    with pytest.raises(DataError, match=reason):
        raise DataError(refused.reason)


def test_a_key_may_be_ignored_by_name(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a", "id": 3}\n')
    assert list(rows_of(file, read_content, ["id"])) == [Row(f"{file}:1", Completion("", "a"))]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the data set .*gone.jsonl: No such file"):
        list(rows_of(tmp_path / "gone.jsonl", read_content))


def test_calls_that_are_only_read_may_be_broken(tmp_path: Path) -> None:
    call = {"id": "x", "function": {"name": "add", "arguments": "{"}}
    history = {"role": "assistant", "tool_calls": [call], "weight": 0}
    (row,) = read(tmp_path, {"messages": [USER, history, USER, ANSWER]})
    assert isinstance(row, Row)


def test_marks_and_line_ends_of_other_systems_are_no_part_of_a_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    rows = list(rows_of(file, read_content))
    assert rows == [Row(f"{file}:1", Completion("", "a")), Row(f"{file}:3", Completion("", "b"))]
