"""The column of gRPC in docs/wire.md: each of its cells is held against a real server's answers."""

import asyncio
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.engine.worker import EngineWorker
from serving.errors import DETAILS_METADATA, ERROR_METADATA
from serving.proto import inference_pb2 as pb
from tests.mixtral_jax.structure.test_tool_grammar import called_ids
from tests.serving.service import test_service as toys
from tests.serving.service.answer.test_choice_text import CALLS, calling

PAGE = Path(__file__).parents[3] / "docs" / "wire.md"
Parts = tuple[EngineWorker, Tokenizer]
parts = toys.parts  # the fixture, for this file


def cell(row: str) -> str:
    """Returns what the table's last column says of a row."""
    section = PAGE.read_text(encoding="utf-8").partition("## Routes")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    assert rows[0][-1] == "gRPC: `Generate`"
    return {cells[0]: cells[-1] for cells in rows}[row]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_errors(parts: Parts) -> None:
    async def work() -> None:
        async with toys.serving(parts) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await toys.collect(channel, toys.chat(n=17))
        assert caught.value.code().name in cell("errors")
        trailing: dict[str, Any] = dict(caught.value.trailing_metadata() or ())
        assert trailing[ERROR_METADATA] == "InvalidParameter" and ERROR_METADATA in cell("errors")
        (detail,) = status_pb2.Status.FromString(trailing[DETAILS_METADATA]).details
        bad = error_details_pb2.BadRequest()
        assert detail.Unpack(bad) and "google.rpc.BadRequest" in cell("errors")
        assert bad.field_violations[0].field == "n"

    run(work())


def test_a_stream_its_usage_its_end_and_a_cut(parts: Parts) -> None:
    async def work() -> None:
        async with toys.serving(parts) as channel:
            chunks = await toys.collect(channel, toys.chat(max_tokens=3, ignore_eos=True))
        *before, last = chunks
        assert cell("usage") == "`usage` in the last chunk"
        assert last.HasField("usage") and not any(chunk.HasField("usage") for chunk in before)
        # The stream has ended without an error, or `collect` would have raised it.
        assert cell("end of a stream") == "OK behind the chunk with `usage`"
        assert pb.FinishReason.Name(last.finish_reason) == cell("cut at `max_tokens`")

    run(work())


def test_progress_of_a_long_prompt_is_the_heartbeat(parts: Parts) -> None:
    assert cell("heartbeat") == "a chunk with `computed_tokens`, while the prompt is computed"

    async def work() -> None:
        long = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 200), max_tokens=1)
        async with toys.serving(parts) as channel:
            chunks = await toys.collect(channel, long)
        beats = [chunk for chunk in chunks if chunk.computed_tokens]
        assert beats and not any(chunk.text or chunk.token_ids for chunk in beats)

    run(work())


@pytest.mark.parametrize("name", CALLS)
def test_calls_come_whole(name: str) -> None:
    assert cell("calls at once") == "`tool_calls` in a chunk, FINISH_REASON_TOOL_CALLS"
    assert cell("calls in a stream") == "each whole in the chunk of the token that ends it"
    tokenizer, _ = CALLS[name]
    _, chunks = calling(tokenizer, [*called_ids(tokenizer, "Rome"), min(tokenizer.eos_ids)])
    (whole,) = [chunk for chunk in chunks if chunk.tool_calls]
    (call,) = whole.tool_calls
    assert json.loads(call.arguments) and len(call.id) == 9
    assert whole.token_ids and not whole.text
    assert chunks[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS
