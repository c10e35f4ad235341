"""Samples: how a model that is trained answers some rows, by the plain loop with its cache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mixtral_jax.generation import SLOT, draws_of, steps_for
from mixtral_jax.model.adapter import Adapter
from mixtral_jax.model.adapter_stack import NO_SLOT, StackSizes
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.launcher import StepLauncher
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.training.example import Example

_GREEDY = replace(SamplingParams(temperature=0.0), top_logprobs=None)


class Question(NamedTuple):
    """The ids before the first answer of an example, and those of that answer."""

    prompt: list[int]
    expected: list[int]

    @classmethod
    def of(cls, example: Example) -> "Question":
        """Returns the first question of an example."""
        learnt = np.flatnonzero(example.weights)
        start = int(learnt[0])
        gaps = np.flatnonzero(np.diff(learnt) > 1)
        stop = int(learnt[gaps[0]]) + 1 if gaps.size else len(example.ids)
        return cls(example.ids[:start].tolist(), example.ids[start:stop].tolist())


class Samples:
    """Questions, and the likeliest answers that a model gives to them.

    Args:
        examples: those whose first questions are asked.
        tokenizer: that of the model.
        max_tokens: length at which answers are cut.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: Tokenizer, max_tokens: int = 64
    ) -> None:
        self.questions = [Question.of(example) for example in examples]
        self._tokenizer, self._max_tokens = tokenizer, max_tokens

    def texts(self) -> list[tuple[str, str]]:
        """Returns each question and the answer that is expected."""
        return [(self._text(prompt), self._text(expected)) for prompt, expected in self.questions]

    def answers(self, model: Transformer, adapter: Adapter | None = None) -> list[str]:
        """Returns the answer to each question.

        What is compiled is kept by the model, so that later answers compile nothing, also for
        another adapter of the same shapes.

        Args:
            model: answers alone where there is no adapter.
            adapter: with its scaling in B.
        """
        return [self._text(ids) for ids in self.answer_ids(model, adapter)]

    def answer_ids(self, model: Transformer, adapter: Adapter | None = None) -> list[list[int]]:
        """Returns the ids of each answer, up to the one that ends it."""
        if not self.questions:
            return []
        context, ends = model.config.max_context, frozenset(self._tokenizer.eos_ids)
        longest = max(len(prompt) for prompt, _ in self.questions) + self._max_tokens
        sizes = None if adapter is None else StackSizes.of_adapter(adapter, model.config)
        steps = steps_for(model, min(longest, context), adapters=sizes)
        launcher, slot = StepLauncher(model, steps), NO_SLOT
        if adapter is not None:
            slot = SLOT
            launcher.put_adapter(slot, adapter)
        answers = []
        for prompt, _ in self.questions:
            length = min(len(prompt) + self._max_tokens, context)
            draws = draws_of(launcher, [*prompt], _GREEDY, length, 0, ends, None, slot)
            ids = [draw.token_id for draw in draws]
            answers.append(ids[:-1] if ids and ids[-1] in ends else ids)
        return answers

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids).strip()
