"""Several answers read as one: each prompt of a text completion is a call of its own.

A bounded number of the calls is under way, and fewer of them wait for their first token, so that a
caller's other requests wait behind few prompts of one. The other prompts wait here, and go to the
service as those before them get their first tokens and end. Where the service has no room for one
it waits too, with fewer under way, and every prompt that ends makes way for one more.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from serving.accounting.answer_tokens import AnswerTokens
from serving.errors import Overloaded, ServingError
from serving.gateway.dialect.prompt_size import at_place
from serving.proto import inference_pb2

# Chunks that wait for a slow reader. More of them wait in the answers.
_MAX_WAITING = 64
# Choices of one request that are under way at a time, and prompts, however many choices they have.
_CHOICES_UNDER_WAY = 128
_LEAST_UNDER_WAY = 16
# Prompts of one request that wait for their first token at a time.
_UNANSWERED = 32
# Seconds after which a prompt is sent again for which there was no room, and no other is under way.
_RETRY_SECONDS = 1.0


class RunningAnswer(Protocol):
    """An answer of the model service that is under way: one call, or several joined."""

    @property
    def tokens(self) -> Sequence[AnswerTokens]:
        """The counts of each call, which grow while it runs."""

    @property
    def weakened(self) -> str:
        """The parts of the caller's schemas that are not enforced; known with the first chunk.

        At most 1 KB of printable ASCII, for a header; empty where all of them are enforced.
        """

    @property
    def has_begun(self) -> bool:
        """True when the prompt has been rendered and queued; of several, those that came first."""

    async def has_news(self, seconds: float | None = None) -> bool:
        """Waits until a read will return at once; returns False if `seconds` pass before."""

    async def read_all(self) -> list[inference_pb2.GenerateChunk]:
        """Returns the chunks that have arrived, at least one; [] after the last one.

        Raises:
            ServingError: The error that ended the answer.
        """

    def cancel(self) -> None:
        """Frees everything that the answer holds in the service. May be called again."""


def num_under_way(prompts: int, choices: int, limit: int | None = None) -> int:
    """Returns the number of a request's prompts that the service is asked at a time.

    Args:
        prompts: The number of prompts.
        choices: The number of choices that each of them has.
        limit: The number of requests that the caller may have at a time, if that is bounded. It
            makes the number no smaller than so many prompts as any request may send together.
    """
    width = max(_LEAST_UNDER_WAY, _CHOICES_UNDER_WAY // choices)
    if limit is not None:
        width = min(width, max(_LEAST_UNDER_WAY, limit))
    return min(prompts, width)


class JoinedAnswers:
    """Joins several answers into one RunningAnswer.

    Choice i of answer a is choice a * choices + i of the whole. The usage of all answers goes with
    the last chunk of the last one to end.

    Args:
        start: Starts the answer to a prompt, by its place. It is called again for a prompt that the
            service has refused as Overloaded, after others were let in.
        tokens: The counts of each answer, which `start` has its answers fill.
        choices: The number of choices that each of them has.
        width: The number of them that are under way at a time, at most.
    """

    def __init__(
        self,
        start: Callable[[int], RunningAnswer],
        tokens: Sequence[AnswerTokens],
        choices: int,
        width: int,
    ) -> None:
        self.tokens = tokens
        self.weakened = ""
        """The parts of the caller's schemas that are not enforced, which all calls have alike."""
        self._start = start
        self._choices = choices
        self._waiting = deque(range(len(tokens)))  # places
        self._width = width
        first = min(width, len(tokens), _UNANSWERED)
        self._awaited = set(range(first))  # places of the first prompts, till they are queued
        self._unanswered: set[int] = set()  # places under way without a token
        self._was_let_in = False  # any prompt
        self._answers: dict[int, RunningAnswer] = {}  # under way, by place
        self._usage = inference_pb2.Usage()
        self._without_usage = len(tokens)
        self._arrived: asyncio.Queue[inference_pb2.GenerateChunk] = asyncio.Queue(_MAX_WAITING)
        self._failure: Exception | None = None
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_workers = 0  # tasks that still take prompts
        for _ in range(first):
            self._add_task()

    @property
    def has_begun(self) -> bool:
        """True when the first prompts have been rendered and queued, or wait for room."""
        return not self._awaited

    async def has_news(self, seconds: float | None = None) -> bool:
        """Waits until a read will return at once; returns False if `seconds` pass before."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def read_all(self) -> list[inference_pb2.GenerateChunk]:
        """Returns the chunks that have arrived, at least one; [] after the last one.

        Raises:
            ServingError: The error that ended the first answer to fail.
        """
        chunks: list[inference_pb2.GenerateChunk] = []
        while not chunks:
            await self._news.wait()
            while not self._arrived.empty():
                chunks.append(self._arrived.get_nowait())
            if self._tasks:
                self._news.clear()  # the end of one answer is no end of the whole
            elif not chunks and self._failure is not None:
                raise self._failure
            else:
                break
        return chunks

    def cancel(self) -> None:
        """Frees everything that the answers hold in the service, and starts no more."""
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        for answer in self._answers.values():
            answer.cancel()

    def _grow(self) -> None:
        """Has one more prompt under way, if one waits and there may be more."""
        may_wait = len(self._unanswered) < _UNANSWERED
        if self._waiting and may_wait and self._num_workers < self._width:
            self._add_task()

    def _add_task(self) -> None:
        self._num_workers += 1
        task = asyncio.create_task(self._work())
        self._tasks.add(task)
        task.add_done_callback(self._end_task)

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._news.set()

    async def _work(self) -> None:
        """Has prompts answered, one after the other, as long as some wait and there is room."""
        try:
            while self._waiting and len(self._unanswered) < _UNANSWERED:
                place = self._waiting.popleft()
                try:
                    await self._answer(place)
                except Overloaded as refusal:
                    if not self._has_turned_back(place, refusal) or self._num_workers > 1:
                        return
                    await asyncio.sleep(_RETRY_SECONDS)
                except Exception as error:
                    self._fail(place, error)
                    return
                else:
                    self._grow()
        finally:
            self._num_workers -= 1

    def _has_turned_back(self, place: int, refusal: Overloaded) -> bool:
        """Has a prompt wait again for which there was no room; False if the whole fails of it."""
        # Refusals come before others are let in, but there is no room at all without the first's.
        is_hopeless = not self._was_let_in and (place == 0 or self._num_workers == 1)
        if is_hopeless or self._failure is not None or self.tokens[place].prompt_tokens:
            self._fail(place, refusal)
            return False
        self._waiting.appendleft(place)
        self._awaited.discard(place)
        return True

    async def _answer(self, place: int) -> None:
        """Passes an answer's chunks on, with the numbers that its choices have in the whole."""
        answer = self._answers[place] = self._start(place)
        self._unanswered.add(place)
        try:
            while chunks := await answer.read_all():
                self.weakened = self.weakened or answer.weakened
                for chunk in chunks:
                    self._was_let_in = True
                    self._awaited.discard(place)
                    if place in self._unanswered and (chunk.token_ids or chunk.finish_reason):
                        self._unanswered.remove(place)
                        self._grow()
                    chunk.choice += place * self._choices
                    self._sum_usage(chunk)
                    await self._arrived.put(chunk)
                    self._news.set()
        finally:
            answer.cancel()
            del self._answers[place]
            self._unanswered.discard(place)

    def _fail(self, place: int, error: Exception) -> None:
        """Ends the whole, if that is its first failure; it has never begun if it was awaited."""
        if self._failure is not None:
            return
        self._failure = at_place(error, place) if isinstance(error, ServingError) else error
        self._waiting.clear()
        # The chunks of the others are counted already, so they are still passed on.
        for other in self._answers.values():
            other.cancel()

    def _sum_usage(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Moves the usage of all answers to the last chunk of the last one."""
        if not chunk.HasField("usage"):
            return
        self._without_usage -= 1
        self._usage.prompt_tokens += chunk.usage.prompt_tokens
        self._usage.cached_tokens += chunk.usage.cached_tokens
        self._usage.completion_tokens += chunk.usage.completion_tokens
        self._usage.accepted_guesses += chunk.usage.accepted_guesses
        self._usage.rejected_guesses += chunk.usage.rejected_guesses
        if self._without_usage:
            chunk.ClearField("usage")
        else:
            chunk.usage.CopyFrom(self._usage)
