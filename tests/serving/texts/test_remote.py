"""A service's worker behind a pipe: the same answers, and what follows when either end is lost.

Both ends run in one process, over a real socket, with the engine's real thread and a plain engine.
"""

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

import pytest

from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.specification import Kind, Specification
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.engine.metrics import Finished, Metrics
from serving.engine.worker import EngineWorker
from serving.errors import EngineFailure, Overloaded, Unavailable
from serving.proto import texts_pb2 as pb
from serving.scheduling.request import Drawn, Event, FinishReason, Request
from serving.texts.hub import Hub, Parts
from serving.texts.remote import RemoteCounts, RemoteEngine

PATIENCE = 10.0


class Counting:
    """Says 0, 1, 2 ... as every answer, one token a step, while it may."""

    def __init__(self) -> None:
        self.asked: dict[str, Request] = {}
        self.said: dict[str, int] = {}
        self.cancelled: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.may_step = threading.Event()
        self.may_step.set()
        self.room = 99

    @property
    def has_work(self) -> bool:
        return bool(self.said)

    def has_room(self, n: int, caller: str) -> bool:
        return n <= self.room

    def add(self, request: Request) -> None:
        if request.caller == "refused":
            raise Overloaded("too many", 3.5)
        self.asked[request.id] = request
        self.said[request.id] = 0

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        if self.said.pop(request_id, None) is not None:
            self.cancelled.put(request_id)

    def step(self, now: float) -> list[Event]:
        self.may_step.wait(PATIENCE)
        time.sleep(1e-4)  # as a device does: nobody reads as fast as this counts
        events = []
        for name in list(self.said):
            count, request = self.said[name], self.asked[name]
            is_last = count + 1 == request.max_tokens
            self.said[name] += 1
            if is_last:
                del self.said[name]
            reason = FinishReason.LENGTH if is_last else None
            token = Drawn(token_id=count)
            events.append(
                Event(
                    request_id=name,
                    choice=0,
                    drawn=token,
                    finish_reason=reason,
                    computed=len(request.prompt_ids),
                )
            )
        return events


class Ends:
    """An engine's end, and text processes' ends of its pipes."""

    def __init__(self) -> None:
        self.engine = Counting()
        self.metrics = Metrics("toy")
        self.worker = EngineWorker(self.engine, self.metrics)
        self.lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.tokenizer = ByteTokenizer()
        self.compiler = Compiler(self.tokenizer, self.tokenizer.vocab_size, processes=0)
        self.num_waiting = 0
        self.remotes: list[RemoteEngine] = []
        self.hub = Hub(
            Parts(
                engine=self.worker,
                metrics=self.metrics,
                adapters=None,
                compiler=self.compiler,
                prepare_scores=self._prepare,
                num_waiting=lambda: self.num_waiting,
            )
        )
        self.worker.start()

    async def connect(self, index: int) -> RemoteEngine:
        welcome = pb.Welcome(width=261, adapters=pb.Adapters())
        welcome.adapters.loaded.add(name="mine", digest="ab")
        descriptor = self.hub.connect(index, welcome, self.lost.put)
        remote = RemoteEngine()
        self.remotes.append(remote)
        loop = asyncio.get_running_loop()
        pipe = socket.socket(fileno=descriptor)
        await loop.create_unix_connection(lambda: remote, sock=pipe)
        assert (await remote.welcome).width == 261
        return remote

    def close(self) -> None:
        self.engine.may_step.set()
        self.worker.stop()
        self.hub.close()
        self.compiler.close()

    def _prepare(self) -> "Future[None]":
        done: Future[None] = Future()
        done.set_exception(RuntimeError("no compiler"))
        return done


def run(work: Callable[[Ends], Awaitable[None]]) -> None:
    ends = Ends()

    async def bounded() -> None:
        try:
            await asyncio.wait_for(work(ends), 3 * PATIENCE)
        finally:
            for remote in ends.remotes:
                remote.close()
            await asyncio.sleep(0)

    try:
        asyncio.run(bounded())
    finally:
        ends.close()


def request(name: str, max_tokens: int = 5, **fields: object) -> Request:
    return Request(
        id=name,
        prompt_ids=(1, 2, 3),
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        eos_ids=frozenset(),
        **fields,  # type: ignore[arg-type]
    )


async def tokens(remote: RemoteEngine, asked: Request) -> list[int]:
    got = []
    async for event in remote.submit(asked):
        assert event.request_id == asked.id
        if event.drawn is not None:
            got.append(event.drawn.token_id)
    return got


async def until_left(ends: Ends) -> None:
    """Waits until the engine's end has read that no request is under way any more."""
    while ends.hub.num_under_way:
        await asyncio.sleep(0.01)


def test_answers_of_two_processes_come_to_whom_they_belong() -> None:
    async def work(ends: Ends) -> None:
        first, second = await ends.connect(0), await ends.connect(1)
        assert first.digests() == {"mine": "ab"}
        asked = [(first, 5), (second, 7), (first, 1), (second, 300)]
        answers = [tokens(to, request(f"r{size}", size)) for to, size in asked]
        assert await asyncio.gather(*answers) == [list(range(size)) for _, size in asked]
        assert first.num_under_way == second.num_under_way == 0
        await until_left(ends)

    run(work)


def test_a_refusal_keeps_its_kind_and_is_its_requests_alone() -> None:
    async def work(ends: Ends) -> None:
        remote = await ends.connect(0)
        with pytest.raises(Overloaded, match="too many") as caught:
            await tokens(remote, request("no", caller="refused"))
        assert caught.value.retry_after_ms == 3500
        assert await tokens(remote, request("yes")) == [0, 1, 2, 3, 4]

    run(work)


def test_leaving_an_answer_cancels_it_in_the_engine() -> None:
    async def work(ends: Ends) -> None:
        remote = await ends.connect(0)
        answer = remote.submit(request("long", 10**6))
        await anext(aiter(answer))
        await answer.aclose()
        cancelled = await asyncio.to_thread(ends.engine.cancelled.get, True, PATIENCE)
        assert cancelled == "long"
        assert await tokens(remote, request("next")) == [0, 1, 2, 3, 4]

    run(work)


def test_a_lost_process_ends_its_requests_alone() -> None:
    async def work(ends: Ends) -> None:
        lost, kept = await ends.connect(0), await ends.connect(1)
        answer = lost.submit(request("gone", 10**6))
        for _ in range(3):
            await anext(answer)
        going_on = asyncio.create_task(tokens(kept, request("stays", 2000)))
        assert lost._transport is not None
        lost._transport.abort()  # as the end of its process does
        assert await asyncio.to_thread(ends.lost.get, True, PATIENCE) == "it has gone"
        assert await asyncio.to_thread(ends.engine.cancelled.get, True, PATIENCE) == "gone"
        with pytest.raises(Unavailable):
            while True:
                await anext(answer)
        assert await going_on == list(range(2000))
        await until_left(ends)
        again = await ends.connect(0)
        assert await tokens(again, request("new")) == [0, 1, 2, 3, 4]
        assert b'finished_reason="abort",model_name="toy"} 1.0' in ends.metrics.text()

    run(work)


def test_an_engine_that_fails_ends_the_requests_of_all_processes() -> None:
    async def work(ends: Ends) -> None:
        remotes = [await ends.connect(0), await ends.connect(1)]
        answers = [r.submit(request(f"r{i}", 10**6)) for i, r in enumerate(remotes)]
        for answer in answers:
            await anext(answer)
        ends.worker.abandon(EngineFailure("broken"))
        for answer in answers:
            with pytest.raises(EngineFailure, match="broken"):
                while True:
                    await anext(answer)

    run(work)


def test_when_the_engines_process_has_gone_everything_ends() -> None:
    async def work(ends: Ends) -> None:
        remote = await ends.connect(0)
        answer = remote.submit(request("r", 10**6))
        await anext(answer)
        ends.hub.close()
        with pytest.raises(Unavailable, match="lost"):
            while True:
                await anext(answer)
        with pytest.raises(Unavailable, match="lost"):
            await tokens(remote, request("later"))
        assert remote.ending.cancelled()
        with pytest.raises(Unavailable):
            await asyncio.wrap_future(remote.ask(pb.Ask(metrics=pb.Nothing())))

    run(work)


def test_room_is_asked_for_where_somebody_waits() -> None:
    async def work(ends: Ends) -> None:
        remote = await ends.connect(0)
        ends.engine.room = 2
        assert await remote.admits(3, "bob")  # nobody is known to wait
        ends.num_waiting = 1
        await tokens(remote, request("r"))
        assert not await remote.admits(3, "bob") and await remote.admits(2, "bob")

    run(work)


def test_figures_and_questions_reach_the_engines_process() -> None:
    async def work(ends: Ends) -> None:
        remote = await ends.connect(0)
        counts = RemoteCounts(remote)
        counts.asked(2, None)
        times = Finished(sent=1.0, seated=2.0, first=3.0, last=5.0, prompt_tokens=4, tokens=2)
        counts.finished("stop", times)
        counts.given_up("abort", 1)
        counts.structure_violated()
        shown = (await asyncio.to_thread(counts.text)).decode()
        for line in (
            'vllm:request_success_total{finished_reason="stop",model_name="toy"} 1.0',
            'vllm:request_success_total{finished_reason="abort",model_name="toy"} 1.0',
            'mixtral_structure_violations_total{model_name="toy"} 1.0',
            'vllm:request_params_n_sum{model_name="toy"} 2.0',
            'vllm:e2e_request_latency_seconds_sum{model_name="toy"} 4.0',
        ):
            assert line in shown
        with pytest.raises(EngineFailure, match="logprobs of prompts"):
            await asyncio.wrap_future(remote.prepare_scores())
        told = asyncio.Event()
        loop = asyncio.get_running_loop()

        def drain() -> None:
            loop.call_soon_threadsafe(told.set)

        ends.hub.on_drain = drain
        assert await remote.begin_drain() == 0
        await told.wait()

    run(work)


def test_a_grammar_is_compiled_again_where_the_engine_is() -> None:
    async def work(ends: Ends) -> None:
        remote = await ends.connect(0)
        wanted = Specification(Kind.CHOICE, choices=("yes", "no"))
        form = ends.compiler.compile(wanted, continues=True, salt=b"here")
        await tokens(remote, request("r", form=form, salt=b"there"))
        arrived = ends.engine.asked["r"].form
        assert isinstance(arrived, Form) and arrived is not form
        assert arrived.grammar == form.grammar

    run(work)


def test_the_end_of_the_service_is_told_to_all() -> None:
    async def work(ends: Ends) -> None:
        remote = await ends.connect(0)
        ends.hub.tell_adapters({"other": "cd"})
        ends.hub.tell(pb.ToText(leaving=pb.Leaving()))
        await remote.leaving.wait()
        assert remote.digests() == {"other": "cd"}
        ends.hub.tell(pb.ToText(ending=pb.Ending(seconds=1.5)))
        assert await remote.ending == 1.5
        remote.drain()
        with pytest.raises(Unavailable, match="shutting down"):
            await tokens(remote, request("late"))

    run(work)
