"""Several answers read as one: each prompt of a text completion is a call of its own."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from serving.accounting.answer_tokens import AnswerTokens
from serving.proto import inference_pb2

# Chunks that wait for a slow reader. More of them wait in the answers.
_MAX_WAITING = 64


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

    async def has_news(self, seconds: float | None = None) -> bool:
        """Waits until a read will return at once; returns False if `seconds` pass before."""

    async def read_all(self) -> list[inference_pb2.GenerateChunk]:
        """Returns the chunks that have arrived, at least one; [] after the last one.

        Raises:
            ServingError: The error that ended the answer.
        """

    def cancel(self) -> None:
        """Frees everything that the answer holds in the service. May be called again."""


class JoinedAnswers:
    """Joins several answers into one RunningAnswer.

    Choice i of answer a is choice a * choices + i of the whole. The usage of all answers goes with
    the last chunk of the last one.

    Args:
        answers: The answers, in the order of their prompts.
        choices: The number of choices that each of them has.
    """

    def __init__(self, answers: Sequence[RunningAnswer], choices: int) -> None:
        self._answers = answers
        self._usage = inference_pb2.Usage()
        self._arrived: asyncio.Queue[inference_pb2.GenerateChunk] = asyncio.Queue(_MAX_WAITING)
        self._failure: Exception | None = None
        self._running = self._without_usage = len(answers)
        self._news = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._follow(answer, place * choices))
            for place, answer in enumerate(answers)
        ]

    @property
    def tokens(self) -> Sequence[AnswerTokens]:
        """The counts of each call, in the order of the prompts."""
        return [tokens for answer in self._answers for tokens in answer.tokens]

    @property
    def weakened(self) -> str:
        """The parts of the caller's schemas that are not enforced, which all calls have alike."""
        return next((answer.weakened for answer in self._answers if answer.weakened), "")

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
            if self._running:
                self._news.clear()  # the end of one answer is no end of the whole
            elif not chunks and self._failure is not None:
                raise self._failure
            else:
                break
        return chunks

    def cancel(self) -> None:
        """Frees everything that the answers hold in the service."""
        for task in self._tasks:
            task.cancel()
        for answer in self._answers:
            answer.cancel()

    async def _follow(self, answer: RunningAnswer, first_choice: int) -> None:
        """Passes an answer's chunks on, with the numbers that its choices have in the whole."""
        try:
            while chunks := await answer.read_all():
                for chunk in chunks:
                    chunk.choice += first_choice
                    self._sum_usage(chunk)
                    await self._arrived.put(chunk)
                    self._news.set()
        except Exception as error:
            if self._failure is None:
                self._failure = error
                # The chunks of the others are counted already, so they are still passed on.
                for other in self._answers:
                    other.cancel()
        finally:
            self._running -= 1
            self._news.set()

    def _sum_usage(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Moves the usage of all answers to the last chunk of the last one."""
        if not chunk.HasField("usage"):
            return
        self._without_usage -= 1
        self._usage.prompt_tokens += chunk.usage.prompt_tokens
        self._usage.cached_tokens += chunk.usage.cached_tokens
        self._usage.completion_tokens += chunk.usage.completion_tokens
        if self._without_usage:
            chunk.ClearField("usage")
        else:
            chunk.usage.CopyFrom(self._usage)
