"""Samples: greedy answers of the model as it is trained now, without a cache of keys and values.

Each token takes a whole forward pass over all prompts at once, which is right for a few short
answers in the middle of a run: nothing is compiled but one program, and nothing is copied.
"""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.training.example import Example
from mixtral_jax.training.step.trainee import Trained, Trainee


def question_of(example: Example) -> tuple[list[int], list[int]]:
    """Returns the ids before the first answer of an example, and those of that answer."""
    learnt = np.flatnonzero(example.weights)
    start = int(learnt[0])
    gaps = np.flatnonzero(np.diff(learnt) > 1)
    stop = int(learnt[gaps[0]]) + 1 if gaps.size else len(example.ids)
    return example.ids[:start].tolist(), example.ids[start:stop].tolist()


def greedy_answers(
    trainee: Trainee,
    trained: Trained,
    frozen: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    eos_ids: Collection[int],
) -> list[list[int]]:
    """Returns the likeliest next ids of each prompt, one after the other, until one ends it.

    Args:
        trainee: makes the model of arrays.
        trained: arrays as they are now.
        frozen: the model's other arrays.
        prompts: ids of the prompts.
        max_tokens: length at which answers are cut.
        eos_ids: ids that end an answer, which are not part of what is returned.
    """
    if not prompts:
        return []
    layout = trainee.layout
    groups = 1 if layout is None else layout.num_sequence_groups
    rows = -(-len(prompts) // groups) * groups
    length = max(map(len, prompts)) + max_tokens
    length = -(-length // 32) * 32
    tokens = np.zeros((rows, length), np.int32)
    sizes = np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        sizes[row] = len(prompt)

    @jax.jit
    def next_ids(trained: Trained, frozen: Any, tokens: jax.Array, sizes: jax.Array) -> jax.Array:
        model, adapter = trainee.assemble(trained, frozen)
        segments = (jnp.arange(length)[None] < sizes[:, None]).astype(jnp.int32)
        hidden = model.hidden(tokens, segments=segments, adapter=adapter)
        last = jnp.take_along_axis(hidden, (sizes - 1)[:, None, None], axis=1)
        return jnp.argmax(model.logits(last)[:, 0], axis=-1)

    answers: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    for _ in range(max_tokens):
        chosen = np.asarray(next_ids(trained, frozen, jnp.asarray(tokens), jnp.asarray(sizes)))
        for row, answer in enumerate(answers):
            if not is_open[row]:
                continue
            token = int(chosen[row])
            if token in eos_ids:
                is_open[row] = False
                continue
            answer.append(token)
            tokens[row, sizes[row]] = token
            sizes[row] += 1
        if not any(is_open):
            break
    return answers
