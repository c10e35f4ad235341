"""Several answers as one: a text completion may have several prompts, each a call of its own."""

import asyncio
from collections.abc import Sequence

from serving.gateway.upstream import Answer
from serving.proto import inference_pb2

# Chunks that wait for a slow reader. More of them wait in the answers.
_WAITING = 64


class Chorus:
    """Is read as an Answer is. Choice i of answer a is choice a * choices + i of the whole."""

    def __init__(self, answers: Sequence[Answer], choices: int) -> None:
        self._answers = answers
        self._usage = inference_pb2.Usage()
        self._arrived: asyncio.Queue[inference_pb2.GenerateChunk] = asyncio.Queue(_WAITING)
        self._failure: Exception | None = None
        self._singing = self._without_usage = len(answers)
        self._news = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._follow(answer, place * choices))
            for place, answer in enumerate(answers)
        ]

    async def has_news(self, patience: float | None = None) -> bool:
        """Waits until a read will return at once: True, or False after `patience` seconds."""
        try:
            async with asyncio.timeout(patience):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def read_all(self) -> list[inference_pb2.GenerateChunk]:
        """What has arrived, at least one chunk; [] after the last; raises what ended an answer."""
        chunks: list[inference_pb2.GenerateChunk] = []
        while not chunks:
            await self._news.wait()
            while not self._arrived.empty():
                chunks.append(self._arrived.get_nowait())
            if not chunks and self._failure is not None:
                raise self._failure
            if not self._singing or self._failure is not None:
                break
            self._news.clear()  # one of the answers may have ended: that alone is no end
        return chunks

    def cancel(self) -> None:
        """Frees all that the answers hold in the service."""
        for task in self._tasks:
            task.cancel()
        for answer in self._answers:
            answer.cancel()

    async def _follow(self, answer: Answer, first_choice: int) -> None:
        try:
            while chunks := await answer.read_all():
                for chunk in chunks:
                    chunk.choice += first_choice
                    self._add_up(chunk)
                    await self._arrived.put(chunk)
                    self._news.set()
        except Exception as error:
            self._failure = self._failure or error
        finally:
            self._singing -= 1
            self._news.set()

    def _add_up(self, chunk: inference_pb2.GenerateChunk) -> None:
        """The usage of all answers goes with the last chunk of the last one."""
        if not chunk.HasField("usage"):
            return
        self._without_usage -= 1
        self._usage.prompt_tokens += chunk.usage.prompt_tokens
        self._usage.completion_tokens += chunk.usage.completion_tokens
        if self._without_usage:
            chunk.ClearField("usage")
        else:
            chunk.usage.CopyFrom(self._usage)
