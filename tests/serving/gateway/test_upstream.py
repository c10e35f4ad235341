"""The gateway's side of gRPC before scripted services, of which some fail and some are killed."""

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from serving.channel import INFERENCE, options_for, target_of
from serving.errors import WEAKENED_METADATA, EngineFailure, Overloaded, ServingError, Unavailable
from serving.gateway.answer import READ_AHEAD, Answer
from serving.gateway.joined_answers import JoinedAnswers
from serving.gateway.upstream import ModelService
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from tests.support.fakes import KEY, SERVER_OPTIONS, ScriptedInference

PATIENCE = 20.0


class Refusing(ScriptedInference):
    """Says nothing but an error, after so many words."""

    def __init__(self, status: grpc.StatusCode, words: int = 0) -> None:
        super().__init__()
        self._status, self._words = status, words

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        for _ in range(self._words):
            yield pb.GenerateChunk(text="word")
        await context.abort(self._status, "no")


class Replica:
    """A service and its health in this event loop."""

    def __init__(self, service: ScriptedInference, address: str = "127.0.0.1:0") -> None:
        self.service = service
        self.health = HealthServicer()
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        rpc.add_InferenceServicer_to_server(service, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.target = f"127.0.0.1:{self.server.add_insecure_port(address)}"

    @property
    def asked(self) -> int:
        return len(self.service.requests)

    async def set_serving(self, is_serving: bool) -> None:
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if is_serving else states.NOT_SERVING
        for name in ("", INFERENCE):
            await self.health.set(name, state)


@asynccontextmanager
async def model_service(targets: list[str]) -> AsyncIterator[ModelService]:
    target = target_of(targets)
    async with grpc.aio.insecure_channel(target, options=options_for(target)) as channel:
        yield ModelService(channel, KEY)


@asynccontextmanager
async def replicas(*services: ScriptedInference) -> AsyncIterator[tuple[ModelService, Any]]:
    """What the gateway has, and the replicas behind it, which all serve."""
    behind = [Replica(service) for service in services]
    for one in behind:
        await one.server.start()
        await one.set_serving(True)
    async with model_service([one.target for one in behind]) as service:
        yield service, behind
    for one in behind:
        await one.server.stop(0)


def asking(words: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=words)]))


async def text_of(answer: Answer) -> str:
    try:
        text = ""
        while (chunk := await answer.read()) is not None:
            text += chunk.text
        return text
    finally:
        answer.cancel()


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await condition():
            await asyncio.sleep(0.02)


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work(), 3 * PATIENCE))


async def connected(service: ModelService, behind: list[Replica]) -> None:
    """Waits until each has answered: while a channel looks for more it uses what it has.

    Each try has a text of its own, because a text that has failed twice is suspected.
    """
    numbers = itertools.count()

    async def all_asked() -> bool:
        with suppress(ServingError):
            await text_of(service.generate(asking(f"x{next(numbers)}")))
        return all(one.asked for one in behind)

    await until(all_asked)
    for one in behind:
        one.service.requests.clear()


def test_calls_go_round() -> None:
    async def work() -> None:
        async with replicas(*(ScriptedInference() for _ in range(3))) as (service, behind):
            await connected(service, behind)
            for _ in range(9):
                assert await text_of(service.generate(asking("one two"))) == "one two"
            assert [one.asked for one in behind] == [3, 3, 3]

    run(work)


def test_who_does_not_serve_is_passed_over_until_it_does() -> None:
    async def work() -> None:
        async with replicas(ScriptedInference(), ScriptedInference()) as (service, behind):
            await connected(service, behind)
            first, second = behind
            await first.set_serving(False)

            async def has_left() -> bool:
                first.service.requests.clear()
                for _ in range(4):
                    await text_of(service.generate(asking("x")))
                return first.asked == 0

            async def is_ready() -> bool:
                try:
                    await service.check_ready()
                except Unavailable:
                    return False
                return True

            async def is_refused() -> bool:
                try:
                    await text_of(service.generate(asking("x")))
                except Unavailable as error:
                    assert "cannot be reached" in str(error)
                    return True
                return False

            await until(has_left)
            await until(is_ready)
            await second.set_serving(False)
            # Until the channel hears of it, the second one itself says that it is not ready.
            await until(is_refused)
            assert not await is_ready()
            await first.set_serving(True)
            await until(is_ready)
            assert await text_of(service.generate(asking("x"))) == "x"

    run(work)


@pytest.mark.parametrize("status", ["UNAVAILABLE", "RESOURCE_EXHAUSTED"])
def test_what_one_refuses_another_answers(status: str) -> None:
    async def work() -> None:
        refusing = Refusing(grpc.StatusCode[status])
        async with replicas(refusing, ScriptedInference()) as (service, behind):
            await connected(service, behind)
            for _ in range(4):
                assert await text_of(service.generate(asking("one"))) == "one"
            assert behind[0].asked >= 1 and behind[1].asked == 4

    run(work)


def test_if_all_are_full_that_is_what_is_said() -> None:
    async def work() -> None:
        full = [Refusing(grpc.StatusCode.RESOURCE_EXHAUSTED) for _ in range(2)]
        async with replicas(*full) as (service, behind):
            await connected(service, behind)
            with pytest.raises(Overloaded):
                await text_of(service.generate(asking("one")))
            assert sum(one.asked for one in behind) == 3

    run(work)


@pytest.mark.parametrize(
    ("status", "words", "leaf"),
    [("UNAVAILABLE", 1, Unavailable), ("INTERNAL", 0, EngineFailure)],
)
def test_after_a_word_and_for_other_errors_nothing_is_repeated(
    status: str, words: int, leaf: type[ServingError]
) -> None:
    async def work() -> None:
        failing = [Refusing(grpc.StatusCode[status], words) for _ in range(2)]
        async with replicas(*failing) as (service, behind):
            await connected(service, behind)
            with pytest.raises(leaf):
                await text_of(service.generate(asking("one")))
            assert sum(one.asked for one in behind) == 1

    run(work)


def test_metadata_goes_with_the_call() -> None:
    class Listening(ScriptedInference):
        async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
            seen.update(dict(context.invocation_metadata()))
            async for chunk in super().Generate(request, context):
                yield chunk

    seen: dict[str, str] = {}

    async def work() -> None:
        async with replicas(Listening()) as (service, _):
            await text_of(service.generate(asking("x"), [("x-request-id", "abc")]))
        assert seen["x-request-id"] == "abc" and seen["authorization"] == f"Bearer {KEY}"

    run(work)


def test_what_a_schema_is_not_held_to_is_known_with_the_first_chunk() -> None:
    class Weakening(ScriptedInference):
        async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
            if request.HasField("response_format"):
                await context.send_initial_metadata(((WEAKENED_METADATA, "uniqueItems at /a"),))
            async for chunk in super().Generate(request, context):
                yield chunk

    async def work() -> None:
        async with replicas(Weakening()) as (service, _):
            plain, held = asking("!open one"), asking("!open one !wait")
            held.response_format.json_schema = "{}"
            answer = service.generate(held)
            assert answer.weakened == ""
            await answer.read()
            assert answer.weakened == "uniqueItems at /a"
            both = [service.generate(plain), service.generate(held)]
            counts = [tokens for answer in both for tokens in answer.tokens]
            joined = JoinedAnswers(both.__getitem__, counts, 1, 2)
            while "uniqueItems" not in joined.weakened:
                await joined.read_all()
            joined.cancel()
            answer.cancel()
            answer = service.generate(plain)
            await text_of(answer)
            assert answer.weakened == ""

    run(work)


class Renamed(ScriptedInference):
    """Serves a model whose name the test changes."""

    name = "first"
    num_told = 0

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.ModelInfo:
        self.num_told += 1
        return pb.ModelInfo(name=self.name)


def test_the_model_is_remembered_for_a_minute() -> None:
    async def work() -> None:
        async with replicas(renamed := Renamed()) as (_, behind):
            target, now = behind[0].target, 100.0
            async with grpc.aio.insecure_channel(target, options=options_for(target)) as channel:
                service = ModelService(channel, KEY, clock=lambda: now)
                assert (await service.model()).name == "first"
                renamed.name, now = "second", 159.9
                assert (await service.model()).name == "first"
                now = 160.0
                assert (await service.model()).name == "second"
                assert renamed.num_told == 2

    run(work)


def test_the_model_of_a_service_that_is_gone_is_forgotten() -> None:
    async def work() -> None:
        async with replicas(renamed := Renamed()) as (service, behind):
            assert (await service.model()).name == "first"
            answer = service.generate(asking("one !wait"))
            assert await answer.has_news(PATIENCE)
            renamed.name = "second"
            await behind[0].server.stop(0)
            with pytest.raises(Unavailable):
                await text_of(answer)
            with pytest.raises(Unavailable):
                await service.model()
            again = Replica(renamed, behind[0].target)  # as a service that was restarted
            await again.server.start()
            await again.set_serving(True)

            async def is_known() -> bool:
                try:
                    return (await service.model()).name == "second"
                except Unavailable:
                    return False

            await until(is_known)
            await again.server.stop(0)

    run(work)


def test_a_slow_reader_has_no_more_than_so_many_chunks_in_memory() -> None:
    async def work() -> None:
        async with replicas(ScriptedInference()) as (service, _):
            answer = service.generate(asking("x " * 1000))
            assert not await answer.has_news(0.0)

            async def is_full() -> bool:
                return len(answer._arrived) == READ_AHEAD

            await until(is_full)
            await asyncio.sleep(0.05)
            assert len(answer._arrived) == READ_AHEAD
            chunks = await answer.read_all()
            assert len(chunks) == READ_AHEAD
            while more := await answer.read_all():
                chunks += more
            assert len(chunks) == 1001 and chunks[-1].HasField("usage")
            assert await answer.read() is None
            answer.cancel()

    run(work)


class Newer(ScriptedInference):
    """Ends its answer for a reason that this gateway does not know."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[Any]:
        yield pb.GenerateChunk(text="word", token_ids=[1], finish_reason=99)  # type: ignore[arg-type]


def test_an_answer_that_cannot_be_read_is_no_whole_answer() -> None:
    async def work() -> None:
        async with replicas(Newer()) as (service, _):
            with pytest.raises(EngineFailure, match="could not be read"):
                await text_of(service.generate(asking("one")))

    run(work)


def test_patience_and_cancelling() -> None:
    async def work() -> None:
        scripted = ScriptedInference()
        async with replicas(scripted) as (service, _):
            answer = service.generate(asking("one !wait two"))
            first = await answer.read()
            assert first is not None and first.text == "one"
            assert not await answer.has_news(0.02)
            scripted.release()
            assert await answer.has_news(PATIENCE)
            assert await text_of(answer) == " two"
            scripted.reset()
            answer = service.generate(asking("one !wait two"))
            assert await answer.read() is not None
            answer.cancel()
            assert await asyncio.to_thread(scripted.cancelled.wait, PATIENCE)
            with pytest.raises(Unavailable, match="given up"):
                await answer.read()
            answer = service.generate(asking("one !vanish"))
            with pytest.raises(EngineFailure, match="without a reason to finish"):
                await text_of(answer)

    run(work)


# A replica that can be killed. It prints its target, and its process id before each answer.
PROCESS = """
import asyncio, os
from tests.serving.gateway.test_upstream import Replica, ScriptedInference, pb

class Named(ScriptedInference):
    async def Generate(self, request, context):
        yield pb.GenerateChunk(text=f"{os.getpid()} ")
        async for chunk in super().Generate(request, context):
            yield chunk

async def run():
    replica = Replica(Named())
    await replica.server.start()
    await replica.set_serving(True)
    print(replica.target, flush=True)
    await replica.server.wait_for_termination()

asyncio.run(run())
"""


@contextmanager
def processes(count: int) -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """Replicas in processes of their own, by their targets."""
    root = Path(__file__).parents[3]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        for _ in range(count)
    ]
    try:
        yield {one.stdout.readline().strip(): one for one in started if one.stdout}
    finally:
        for one in started:
            one.kill()
            one.wait()
            if one.stdout:
                one.stdout.close()


def test_a_killed_replica_costs_its_own_streams_alone() -> None:
    async def work(running: dict[str, "subprocess.Popen[str]"]) -> None:
        async with model_service(list(running)) as service:
            streams: dict[str, list[Answer]] = {}
            while len(streams) < 2 or min(map(len, streams.values())) < 4:
                answer = service.generate(asking("one !wait"))
                first = await answer.read()
                assert first is not None
                streams.setdefault(first.text, []).append(answer)
                second = await answer.read()
                assert second is not None and second.text == "one"
            victim, other = running.values()
            victim.kill()
            killed = time.monotonic()
            for answer in streams[f"{victim.pid} "]:
                with pytest.raises(Unavailable, match="cannot be reached"):
                    await answer.read()
            # Pings would notice it after 10 seconds at the soonest.
            assert time.monotonic() - killed < 9
            for _ in range(4):  # new ones go to the other
                name = f"{other.pid} "
                assert await text_of(service.generate(asking("one two"))) == f"{name}one two"
            await service.check_ready()
            for answer in streams[name]:
                assert not await answer.has_news(0.0)
                answer.cancel()

    with processes(2) as running:
        asyncio.run(asyncio.wait_for(work(running), 3 * PATIENCE))


def test_what_was_aboard_when_a_service_was_killed_comes_back_as_a_suspect() -> None:
    async def work(running: dict[str, "subprocess.Popen[str]"]) -> None:
        async with model_service(list(running)) as service:
            (victim,) = running.values()
            aboard = service.generate(asking("one !wait"))
            for _ in range(2):
                assert await aboard.read() is not None
            victim.kill()
            with pytest.raises(Unavailable):
                await aboard.read()
            # The channel hears of the death a moment after the call: a request between the two
            # would be a suspect too, as it may have been aboard.
            while service._channel.get_state() is grpc.ChannelConnectivity.READY:
                await asyncio.sleep(0.01)
            # This one finds nobody, and so it was aboard nowhere.
            for _ in range(2):
                late = asking("two")
                with pytest.raises(Unavailable):
                    await text_of(service.generate(late))
                assert not late.suspect
            again = asking("one !wait")
            answer = service.generate(again)
            assert again.suspect
            answer.cancel()

    with processes(1) as running:
        asyncio.run(asyncio.wait_for(work(running), 3 * PATIENCE))
