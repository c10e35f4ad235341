"""What is trained on is what is served: ids and targets of random chats against Tokenize.

The bodies go through the gateway's reader and a real gRPC server; the answers of them all, in
order, say what each example must hold. Nothing of the training's own rendering is used here.
"""

import asyncio
import json
import random
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest

from mixtral_jax.tokenization.tokenizer import Tokenizer, load
from mixtral_jax.training.example import Example
from mixtral_jax.training.rendering import examples_of
from mixtral_jax.training.rows import Row, read_content, rows_of
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.engine.worker import EngineWorker
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.service.service import InferenceService, create_server
from tests.mixtral_jax.tokenization.test_tool_template import BLOCKS, LIST
from tests.support.chats import DROP, asked
from tests.support.random_chats import random_row
from tests.support.tokenizers import INST, MISTRAL_FILES, SPECS, later_tekken, write

KEY = (("authorization", "Bearer secret"),)
NAMES = ("v1", "v2", "v3", "chatml", "blocks", "list", "inst")
LARGE = ("v7", "tekken-v3", "tekken-v13")  # take seconds to load


def tokenizer_of(name: str, folder: Path) -> Tokenizer:
    """A tokenizer of Mistral's by its version, or one with a Jinja template by its kind."""
    if name == "tekken-v13":
        later_tekken(folder, "v13")
        return load(folder)
    if name in MISTRAL_FILES:
        (folder / MISTRAL_FILES[name].name).symlink_to(MISTRAL_FILES[name])
        return load(folder)
    if name == "inst":
        return load(write(folder / name, SPECS["sentencepiece"], INST))
    templates = {"blocks": BLOCKS, "list": LIST}
    return load(
        write(folder / name, SPECS["byte-level"], templates[name])
        if name in templates
        else write(folder / name)
    )


class Served:
    """A tokenizer's endpoint, asked over gRPC."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = rpc.InferenceStub(channel)

    async def ids(self, row: dict[str, Any], messages: list[dict[str, Any]]) -> list[int]:
        """The ids of the messages, asked as the client of the row's chat would ask."""
        request = asked(DROP, **{**row, "messages": messages})
        reply = await self._stub.Tokenize(pb.TokenizeRequest(chat=request.chat), metadata=KEY)
        return list(reply.ids)


async def spans(served: Served, row: dict[str, Any], ends: frozenset[int]) -> list[list[int]]:
    """For each learnt answer, the ids before it and those with it, its end included."""
    expected = []
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in row["messages"]]
    for place, message in enumerate(row["messages"]):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        before = await served.ids(row, messages[:place])
        if message.get("tool_calls"):  # the next question, that of the results, holds the calls
            results = messages[place + 1 : place + 1 + len(message["tool_calls"])]
            after = await served.ids(row, messages[: place + 1] + results)
            stop = next(i for i in range(len(before), len(after)) if after[i] in ends) + 1
            expected.append([len(before), *after[:stop]])
        else:
            prefix = {**message, "prefix": True}
            prefix.pop("weight", None)
            after = await served.ids(row, [*messages[:place], prefix])
            (end,) = ends
            expected.append([len(before), *after, end])
        assert expected[-1][1 : 1 + len(before)] == before
    return expected


def matches(examples: list[Example], expected: list[list[int]]) -> bool:
    """Whether each span is the target of an example, in order, and nothing else is one."""
    rest = list(expected)
    for example in examples:
        weights = np.zeros(len(example.ids))
        while rest and list(example.ids[: len(rest[0]) - 1]) == rest[0][1:]:
            start, *ids = rest.pop(0)
            weights[start : len(ids)] = 1
        if not np.array_equal(weights, example.weights) or not weights[-1]:
            return False
    return not rest


def single_calls(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a message for each call, as a format must write it that calls once a turn."""
    messages: list[dict[str, Any]] = []
    for message in row["messages"]:
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            messages.append(message)
            continue
        messages += [{**message, "tool_calls": [call]} for call in calls]
    ordered: list[dict[str, Any]] = []
    results = {m["tool_call_id"]: m for m in messages if m["role"] == "tool"}
    for message in messages:
        if message["role"] != "tool":
            ordered.append(message)
        ordered += [results[call["id"]] for call in message.get("tool_calls", ())]
    return {**row, "messages": ordered}


async def differences(tokenizer: Tokenizer, file: Path, count: int, seed: int) -> int:
    """The number of chats whose examples are not what the endpoint says."""
    draw = random.Random(seed)
    chats = [random_row(draw) for _ in range(count)]
    file.write_text("".join(f"{json.dumps(chat)}\n" for chat in chats), encoding="utf-8")
    info = pb.ModelInfo(name="toy", max_context=8192, vocab_size=tokenizer.vocab_size)
    service = InferenceService(cast(EngineWorker, None), tokenizer, info)
    access = Access(Keyring({"default": "secret"}))
    server, port, _ = await create_server("127.0.0.1:0", service, access)
    wrong = 0
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for read, chat in zip(rows_of(file, read_content), chats, strict=True):
                assert isinstance(read, Row), read
                asked_so = single_calls(chat) if tokenizer.tool_form.at_most_one else chat
                expected = await spans(Served(channel), asked_so, tokenizer.eos_ids)
                wrong += not matches(examples_of(read.content, tokenizer), expected)
    finally:
        await server.stop(0)
    return wrong


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_chats_are_what_the_endpoint_says(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name, tmp_path)
    assert asyncio.run(differences(tokenizer, tmp_path / "rows.jsonl", 15, seed=7)) == 0


@pytest.mark.soak
@pytest.mark.parametrize("name", [*NAMES, *LARGE])
def test_a_thousand_chats_are_what_the_endpoint_says(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name, tmp_path)
    assert asyncio.run(differences(tokenizer, tmp_path / "rows.jsonl", 1000, seed=11)) == 0
