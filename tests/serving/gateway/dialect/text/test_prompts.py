"""Echoed prompts and vLLM's prompt_logprobs, at once and as a stream."""

import json
from typing import Any

import pytest

from serving.errors import InvalidParameter, UnsupportedParameter
from serving.gateway.dialect import parsing
from serving.gateway.dialect.chat.request import ChatRequest
from serving.gateway.dialect.chat.response import ChatAnswer, ChatCompletion
from serving.gateway.dialect.chunks import Chunks, Identity
from serving.gateway.dialect.fields import StreamUsage
from serving.gateway.dialect.openai import check_unknown
from serving.gateway.dialect.text.prompts import Repeated
from serving.gateway.dialect.text.request import CompletionRequest
from serving.gateway.dialect.text.response import TextAnswer, TextCompletion
from serving.gateway.dialect.text.stream import TextEvents
from serving.proto import inference_pb2 as pb

IDENTITY = Identity(id="0" * 32, created=7, model="m")
PIECES = [b"", b"na\xc3", b"\xafve", b" so"]  # the first one opens the text and is none of it


def logprob(token: bytes, value: float, *top: tuple[bytes, float], **more: int) -> pb.TokenLogprob:
    likely = [
        pb.TokenLogprob(token=name, logprob=at, token_id=50 + i) for i, (name, at) in enumerate(top)
    ]
    return pb.TokenLogprob(token=token, logprob=value, top=likely, **more)  # type: ignore[arg-type]


def chunks(choices: int = 1) -> list[pb.GenerateChunk]:
    """Two chunks of a prompt's logprobs, and an answer of one token for each choice."""
    told: list[pb.GenerateChunk] = [
        pb.GenerateChunk(prompt_tokens=4, prompt_pieces=PIECES),
        pb.GenerateChunk(
            prompt_logprobs=[
                logprob(PIECES[1], -1, (b"a", -0.5), token_id=7, rank=2),
                logprob(PIECES[2], -2, (PIECES[2], -2.0), token_id=50, rank=1),
            ]
        ),
        pb.GenerateChunk(prompt_logprobs=[logprob(PIECES[3], -3, (b"b", -1), token_id=9, rank=4)]),
    ]
    for choice in range(choices):
        told.append(
            pb.GenerateChunk(
                choice=choice,
                text="!",
                token_ids=[3],
                logprobs=[logprob(b"!", -0.25, (b"!", -0.25))],
                finish_reason=pb.FINISH_REASON_LENGTH,
            )
        )
    told[-1].usage.CopyFrom(pb.Usage(prompt_tokens=4, completion_tokens=choices))
    return told


def whole(repeated: Repeated, told: Chunks) -> dict[str, Any]:
    answer = TextAnswer(IDENTITY, repeated)
    for chunk in told:
        answer.add([chunk])
    text = b"".join(answer.pieces())
    found: dict[str, Any] = json.loads(text)
    assert TextCompletion.model_validate(found)
    return found


def streamed(repeated: Repeated, told: Chunks) -> list[dict[str, Any]]:
    events = TextEvents(IDENTITY, StreamUsage.LAST, repeated)
    text = b"".join(events.write([chunk]) for chunk in told).decode()
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]


COLUMNS = {
    "tokens": ["", "bytes:\\x6e\\x61\\xc3", "bytes:\\xaf\\x76\\x65", " so", "!"],
    "token_logprobs": [None, -1, -2, -3, -0.25],
    "top_logprobs": [
        None,
        {"a": -0.5, "bytes:\\x6e\\x61\\xc3": -1},
        {"bytes:\\xaf\\x76\\x65": -2},
        {"b": -1, " so": -3},
        {"!": -0.25},
    ],
    "text_offset": [0, 0, 2, 5, 8],
}


def test_an_echo_begins_with_the_prompt_and_its_logprobs() -> None:
    repeated = Repeated(["naïve so"], 2, is_echoed=True, logprobs=1)
    first, second = whole(repeated, chunks(2))["choices"]
    assert first["text"] == second["text"] == "naïve so!"
    assert first["logprobs"] == second["logprobs"] == COLUMNS


def test_a_stream_of_it_is_the_same_in_pieces() -> None:
    repeated = Repeated(["naïve so"], 2, is_echoed=True, logprobs=1)
    for index in (0, 1):
        events = [
            choice
            for event in streamed(repeated, chunks(2))
            for choice in event["choices"]
            if choice["index"] == index
        ]
        assert "".join(choice["text"] for choice in events) == "naïve so!"
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for choice in events:
            for name, values in (choice["logprobs"] or {}).items():
                columns[name] += values
        assert columns == COLUMNS


@pytest.mark.parametrize("text", ["naïve so", None], ids=["text", "ids"])
def test_an_echo_without_logprobs_is_the_text_alone(text: str | None) -> None:
    repeated = Repeated([text], 1, is_echoed=True)
    told = [chunks()[0], pb.GenerateChunk(finish_reason=pb.FINISH_REASON_LENGTH)]
    told[-1].usage.CopyFrom(pb.Usage(prompt_tokens=4))
    (choice,) = whole(repeated, told)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("naïve so", None)
    texts = [c["text"] for event in streamed(repeated, told) for c in event["choices"]]
    assert "".join(texts) == "naïve so"


def test_each_prompt_is_repeated_by_its_own_choices() -> None:
    told = [
        pb.GenerateChunk(choice=2, prompt_pieces=[b"second"]),
        pb.GenerateChunk(choice=0, prompt_pieces=[b"first"]),
        *(pb.GenerateChunk(choice=i, finish_reason=pb.FINISH_REASON_LENGTH) for i in range(4)),
    ]
    told[-1].usage.CopyFrom(pb.Usage(prompt_tokens=2))
    answer = whole(Repeated([None, None], 2, is_echoed=True), told)
    assert [choice["text"] for choice in answer["choices"]] == ["first"] * 2 + ["second"] * 2


ENTRIES = [
    None,
    {
        "7": {"logprob": -1, "rank": 2, "decoded_token": "na\ufffd"},
        "50": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
    },
    {"50": {"logprob": -2, "rank": 1, "decoded_token": "\ufffdve"}},
    {
        "9": {"logprob": -3, "rank": 4, "decoded_token": " so"},
        "50": {"logprob": -1, "rank": 1, "decoded_token": "b"},
    },
]


def test_prompt_logprobs_have_vllms_form() -> None:
    (choice,) = whole(Repeated(["x"], prompt_logprobs=1), chunks())["choices"]
    assert choice["prompt_logprobs"] == ENTRIES
    assert choice["text"] == "!"
    (bare,) = whole(Repeated(["x"], prompt_logprobs=0), chunks())["choices"]
    assert [len(entry) for entry in bare["prompt_logprobs"][1:]] == [1, 1, 1]
    chat = ChatAnswer(IDENTITY, 1)
    chat.add(chunks())
    found = json.loads(b"".join(chat.pieces()))
    assert found["prompt_logprobs"] == ENTRIES
    assert ChatCompletion.model_validate(found)


def asked(kind: type[Any], **fields: Any) -> pb.GenerateRequest:
    values = (
        {"messages": [{"role": "user", "content": "a"}]} if kind is ChatRequest else {"prompt": "a"}
    )
    body = json.dumps({**values, **fields}).encode()
    call: pb.GenerateRequest = parsing.read(body, kind, check_unknown).protos()[0]
    return call


def test_a_call_asks_for_what_is_repeated() -> None:
    call = asked(CompletionRequest, echo=True, logprobs=2, prompt_logprobs=5, max_tokens=0)
    assert (call.prompt_logprobs, call.top_logprobs, call.return_prompt_pieces) == (5, 2, True)
    assert call.max_tokens == 0 and call.HasField("max_tokens")
    for fields in ({"logprobs": 2}, {"echo": True}, {"echo": False, "logprobs": 2}):
        assert not asked(CompletionRequest, **fields).HasField("prompt_logprobs")
    assert asked(ChatRequest, prompt_logprobs=0).HasField("prompt_logprobs")
    assert not asked(ChatRequest, prompt_logprobs=False).HasField("prompt_logprobs")


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_prompt_logprobs_that_are_not_given_are_refused(kind: type[Any]) -> None:
    with pytest.raises(UnsupportedParameter, match="with stream"):
        asked(kind, prompt_logprobs=1, stream=True)
    with pytest.raises(UnsupportedParameter, match="as true"):
        asked(kind, prompt_logprobs=True)
    for wrong in (-1, 21):
        with pytest.raises(InvalidParameter):
            asked(kind, prompt_logprobs=wrong)
