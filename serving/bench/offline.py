"""The bare engine under the load of serving/bench/load.py, without text and sockets.

The engine always holds as many requests as there are clients; the next request enters when one has
ended. Prompts are random token ids, answers are greedy and exactly as long as asked.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.compilation import keep_programs
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement
from mixtral_jax.roofline.settings import GivenSettings, chip_under, settings_by_chip
from mixtral_jax.sampling_params import SamplingParams
from serving.bench.load import Answer, BenchError, Level, Progress, summary
from serving.engine.build import compile_steps, engine_of
from serving.scheduling.request import Request
from serving.scheduling.step_plan import Limits


@dataclass
class _Running:
    sent: float
    arrivals: list[float] = field(default_factory=list)  # the end of each step that brought tokens
    tokens: int = 0


class OfflineEngine:
    """An engine, compiled and ready, with room for `concurrency` requests of the given lengths."""

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        load: Callable[[], Transformer],
        *,
        concurrency: int,
        prompt_tokens: int,
        answer_tokens: int,
        max_step_tokens: int | None = None,
        shared_prefix: int = 0,
    ) -> None:
        """Runs one request first, so that the counted ones find everything ready.

        `load` is called once the programs are compiled and returns the parameters.
        """
        keep_programs()
        longest = prompt_tokens + answer_tokens
        if longest > config.max_context:
            raise BenchError(
                f"{prompt_tokens} + {answer_tokens} tokens are more than the model's "
                f"{config.max_context}; ask for fewer"
            )
        given = GivenSettings(max_sequences=concurrency, max_step_tokens=max_step_tokens)
        settings = settings_by_chip(config, placement, chip_under(placement), given)
        limits = Limits(
            num_pages=concurrency * -(-longest // settings.page_size),
            page_size=settings.page_size,
            max_sequences=concurrency,
            max_step_tokens=max(settings.max_step_tokens, concurrency),
            max_context=longest,
            max_waiting=concurrency,
            window=config.sliding_window,
        )
        abstract = Transformer(config, placement, rngs=None)
        steps = compile_steps(abstract, limits, kv_dtype=settings.kv_dtype, has_masks=False)
        self._engine = engine_of(load(), limits, steps)
        self._vocabulary = config.vocab_size
        self._lengths = prompt_tokens, answer_tokens
        self._shared = min(shared_prefix, prompt_tokens)
        self.measure(1, 1, seed=-1)

    @classmethod
    def of_checkpoint(cls, folder: str, dtype: str | None, **load: Any) -> "OfflineEngine":
        """The engine of a checkpoint's model; `load` are the arguments of the constructor.

        Raises ConfigError (a ValueError) where `folder` is no checkpoint.
        """
        pretrained = open_pretrained(folder)
        placement = pretrained.placement(dtype, mesh=None)
        return cls(pretrained.card.model, placement, lambda: pretrained.load(placement), **load)

    def measure(
        self, requests: int, concurrency: int, seed: int, progress: Progress | None = None
    ) -> Level:
        """Runs requests to their end, `concurrency` of them at a time."""
        waiting = [self._request(number, seed) for number in range(requests)]
        running: dict[str, _Running] = {}
        answers: list[Answer] = []
        while waiting or running:
            while waiting and len(running) < concurrency:
                request = waiting.pop(0)
                running[request.id] = _Running(time.perf_counter())
                self._engine.add(request)
            events = self._engine.step()
            now = time.perf_counter()
            for event in events:
                if event.drawn is None:
                    continue
                request_state = running[event.request_id]
                request_state.tokens += 1
                if request_state.arrivals[-1:] != [now]:
                    request_state.arrivals.append(now)
                if event.finish_reason is not None:
                    del running[event.request_id]
                    answers.append(self._answer(request_state))
                    if progress is not None:
                        progress(len(answers), requests)
        return summary(concurrency, answers)

    def _request(self, number: int, seed: int) -> Request:
        prompt_tokens, answer_tokens = self._lengths
        ids = random.Random("shared").choices(range(self._vocabulary), k=self._shared)
        own = random.Random(f"{seed} {number}")
        ids += own.choices(range(self._vocabulary), k=prompt_tokens - self._shared)
        return Request(
            id=f"{seed}-{number}",
            prompt_ids=tuple(ids),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=answer_tokens,
            eos_ids=frozenset(),
        )

    def _answer(self, ended: _Running) -> Answer:
        return Answer(
            sent=ended.sent,
            ended=ended.arrivals[-1],
            arrivals=tuple(ended.arrivals),
            tokens=ended.tokens,
            prompt_tokens=self._lengths[0],
        )
