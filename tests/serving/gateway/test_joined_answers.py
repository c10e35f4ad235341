"""Many prompts answered as one: how many are under way, who waits, and what ends them all."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from serving.accounting.answer_tokens import AnswerTokens
from serving.errors import ContextTooLong, InvalidRequest, Overloaded, ServingError, Unavailable
from serving.gateway import joined_answers
from serving.gateway.joined_answers import JoinedAnswers, num_under_way
from serving.proto import inference_pb2 as pb


class Answer:
    """An answer that says its place: a chunk when it is queued, a token, and one that ends it."""

    weakened = ""
    has_begun = True

    def __init__(self, service: "Service", place: int) -> None:
        self.tokens: Sequence[AnswerTokens] = ()
        self._service, self._place = service, place
        self._chunks = [
            pb.GenerateChunk(prompt_tokens=2),
            pb.GenerateChunk(token_ids=[7]),
            pb.GenerateChunk(
                text=str(place),
                finish_reason=pb.FINISH_REASON_STOP,
                usage=pb.Usage(prompt_tokens=2, completion_tokens=3),
            ),
        ]

    async def has_news(self, seconds: float | None = None) -> bool:
        return True

    async def read_all(self) -> list[pb.GenerateChunk]:
        await asyncio.sleep(0)
        if error := self._service.refusal(self._place):
            raise error
        while not self._service.lets(len(self._chunks)):
            if self._place not in self._service.under_way:
                raise Unavailable("the answer was given up")
            await asyncio.sleep(0.001)
        return [self._chunks.pop(0)] if self._chunks else []

    def cancel(self) -> None:
        self._service.under_way.discard(self._place)


class Service:
    """Starts answers, and notes which are under way."""

    def __init__(self, refusal: Callable[[int], ServingError | None] = lambda place: None) -> None:
        self.refusal = refusal
        self.may_answer, self.may_end = True, asyncio.Event()
        self.started: list[int] = []
        self.under_way: set[int] = set()
        self.most = 0

    def start(self, place: int) -> Answer:
        self.started.append(place)
        self.under_way.add(place)
        self.most = max(self.most, len(self.under_way))
        return Answer(self, place)

    def lets(self, remaining: int) -> bool:
        """Whether an answer with so many chunks to come may send the next one."""
        return self.may_end.is_set() or remaining == 3 or (remaining == 2 and self.may_answer)

    def joined(self, prompts: int, choices: int = 1) -> JoinedAnswers:
        counts = [AnswerTokens() for _ in range(prompts)]
        return JoinedAnswers(self.start, counts, choices, num_under_way(prompts, choices))


async def read(joined: JoinedAnswers) -> list[pb.GenerateChunk]:
    chunks = []
    while more := await joined.read_all():
        chunks += more
    return chunks


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 10))


@pytest.mark.parametrize(
    ("prompts", "choices", "most"), [(3, 1, 3), (2048, 1, 128), (128, 16, 16), (1000, 2, 64)]
)
def test_so_many_prompts_are_under_way_and_all_are_answered(
    prompts: int, choices: int, most: int
) -> None:
    async def work() -> None:
        service = Service()
        joined = service.joined(prompts, choices)
        chunks: list[pb.GenerateChunk] = []
        while service.most < most:
            chunks += await joined.read_all()
        service.may_end.set()
        chunks += await read(joined)
        assert service.most == most == num_under_way(prompts, choices)
        assert service.started == list(range(prompts)) and not service.under_way
        said = {chunk.choice: chunk.text for chunk in chunks if chunk.text}
        assert said == {place * choices: str(place) for place in range(prompts)}
        (last,) = (chunk for chunk in chunks if chunk.HasField("usage"))
        assert last is chunks[-1]
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
            2 * prompts,
            3 * prompts,
        )

    run(work)


@pytest.mark.parametrize(
    ("limit", "most"), [(None, 128), (1000, 128), (64, 64), (16, 16), (15, 16), (1, 16)]
)
def test_no_more_are_under_way_than_the_caller_may_have(limit: int | None, most: int) -> None:
    """But for 16, which are refused where the caller may have fewer."""
    assert num_under_way(2048, 1, limit) == most
    assert num_under_way(3, 1, limit) == 3


def test_it_has_begun_when_the_first_prompts_are_queued() -> None:
    async def work() -> None:
        service = Service()
        service.may_answer = False
        joined = service.joined(200)
        assert not joined.has_begun
        while not joined.has_begun:
            await joined.read_all()
        assert service.started == list(range(32)) and len(service.under_way) == 32
        service.may_answer = True
        while len(service.started) < 128:
            await joined.read_all()
        await asyncio.sleep(0.01)
        assert service.started == list(range(128)) and len(service.under_way) == 128
        joined.cancel()

    run(work)


def test_a_prompt_without_room_waits_until_others_have_ended() -> None:
    """A service that holds five: the others are refused, sent again, and all are answered."""

    async def work() -> None:
        held: set[int] = set()

        def refusal(place: int) -> ServingError | None:
            held.intersection_update(service.under_way)
            if place not in held and len(held) == 5:
                return Overloaded("full")
            held.add(place)
            return None

        service = Service(refusal)
        joined = service.joined(40)
        while not joined.has_begun:
            await joined.read_all()
        assert len(held) == 5
        service.may_end.set()
        await read(joined)
        assert set(service.started) == set(range(40)) and not service.under_way
        # Each end makes way for one that may be refused, and not for all that wait.
        assert len(service.started) < 40 + 32 + 3 * 40

    run(work)


def test_a_prompt_that_waits_alone_is_sent_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_answers, "_RETRY_SECONDS", 0.001)

    async def work() -> None:
        refused = 0

        def refusal(place: int) -> ServingError | None:
            nonlocal refused
            if place == 1 and refused < 30:
                refused += 1
                return Overloaded("full")
            return None

        service = Service(refusal)
        joined = service.joined(2)
        service.may_end.set()
        assert {chunk.choice for chunk in await read(joined)} == {0, 1}
        assert refused == 30

    run(work)


def test_it_has_not_begun_when_a_first_prompt_fails_beside_one_that_is_queued() -> None:
    """So that the failure is a status, however close the two come."""

    async def work() -> None:
        service = Service(lambda place: InvalidRequest("it is empty") if place == 1 else None)
        joined = service.joined(2)
        await asyncio.sleep(0.01)
        assert await joined.read_all() and not joined.has_begun
        with pytest.raises(InvalidRequest, match=r"^prompt\[1\]"):
            await read(joined)

    run(work)


@pytest.mark.parametrize("refused", [{0}, set(range(50))])
def test_without_room_for_the_first_there_is_none(refused: set[int]) -> None:
    async def work() -> None:
        service = Service(lambda place: Overloaded("full") if place in refused else None)
        joined = service.joined(50)
        with pytest.raises(Overloaded, match="full"):
            await read(joined)
        assert not service.under_way and not joined.has_begun

    run(work)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InvalidRequest("it is empty"), r"^prompt\[130\]: it is empty$"),
        (
            ContextTooLong.of(5, "it has 6"),
            r"maximum context length is 5 .* It is prompt\[130\]\.$",
        ),
    ],
)
def test_a_prompt_that_is_refused_in_the_middle_is_named_and_ends_all(
    error: ServingError, told: str
) -> None:
    async def work() -> None:
        service = Service(lambda place: error if place == 130 else None)
        joined = service.joined(1000)
        service.may_end.set()
        with pytest.raises(type(error), match=told) as caught:
            await read(joined)
        assert not service.under_way and len(service.started) < 130 + 2 * 128
        assert getattr(caught.value, "parameter", "prompt[130]") == "prompt[130]"

    run(work)


def test_who_leaves_frees_all_and_has_no_more_asked() -> None:
    async def work() -> None:
        service = Service()
        joined = service.joined(1000)
        while len(service.started) < 128:
            await joined.read_all()
        joined.cancel()
        service.may_end.set()
        await asyncio.sleep(0.01)
        assert not service.under_way and len(service.started) == 128

    run(work)
