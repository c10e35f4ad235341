"""Inputs of a step, filled in by hand for a few sequences."""

import numpy as np
import pytest

from mixtral_jax.sampling_params import MAX_BIASES, SamplingParams
from mixtral_jax.step.inputs import GroupInputs, StepInputs, StepSizes
from mixtral_jax.step.sampling import NO_ID

SIZES = StepSizes(num_pages=8, page_size=4, max_sequences=4, max_context=10)


def test_two_sequences_in_one_row_of_tokens() -> None:
    """A token after five that are cached, and three tokens of a new prompt."""
    inputs = StepInputs.blank(6, 3, SIZES, groups=None)
    group = GroupInputs(inputs, 0, SIZES.max_sequences)
    assert group.add([0], start=5, pages=(7, 2), follows=1) == 0
    assert group.add([11, 12, 13], start=0, pages=(4,)) == 1
    batch = inputs.batch
    assert batch.tokens.tolist() == [0, 11, 12, 13, 0, 0]
    assert batch.positions.tolist() == [5, 0, 1, 2, 0, 0]
    assert batch.lengths.tolist() == [6, 3, 0]
    assert batch.query_starts.tolist() == [0, 1, 4, 0]
    assert batch.page_table.tolist() == [[7, 2, 0], [4, 0, 0], [0, 0, 0]]
    assert (int(batch.num_decodes), int(batch.num_sequences)) == (1, 2)
    assert inputs.follows.tolist() == [1, -1, -1, -1, -1, -1]
    assert inputs.last.tolist() == [0, 3, 0]
    assert (inputs.num_groups, inputs.num_tokens, inputs.num_rows) == (1, 6, 3)


def test_groups_stand_one_behind_the_other() -> None:
    """The second group's row 1 of the last step stands behind the four rows of the first group."""
    inputs = StepInputs.blank(2, 2, SIZES, groups=2)
    first, second = (GroupInputs(inputs, group, SIZES.max_sequences) for group in range(2))
    first.add([5, 6], start=0, pages=(1,))
    second.add([0], start=3, pages=(2,), follows=1)
    row = second.add([9], start=8, pages=(0, 0, 3))
    second.sample(row, SamplingParams(temperature=1.5), seed=3, position=9, prompt_length=4)
    batch = inputs.batch
    assert batch.tokens.tolist() == [5, 6, 0, 9]
    assert batch.query_starts.tolist() == [0, 2, 0, 0, 1, 2]
    assert batch.num_decodes.tolist() == [0, 2]
    assert batch.num_sequences.tolist() == [1, 2]
    assert inputs.follows.tolist() == [-1, -1, 5, -1]
    assert inputs.last.tolist() == [1, 0, 0, 1]
    assert inputs.sampling.temperature.tolist() == [0, 0, 0, 1.5]
    assert inputs.sampling.position.tolist() == [0, 0, 0, 9]
    assert (inputs.num_groups, inputs.num_tokens, inputs.num_rows) == (2, 2, 2)


def test_the_first_rows_of_each_group_draw() -> None:
    """Of three rows a group has, its first draws; the batch has all of them."""
    inputs = StepInputs.blank(4, 3, SIZES, groups=2, drawn=1)
    second = GroupInputs(inputs, 1, SIZES.max_sequences)
    row = second.add([5, 6], start=0, pages=(1,))
    second.sample(row, SamplingParams(temperature=1.5), seed=3, position=2, prompt_length=2)
    assert inputs.batch.lengths.tolist() == [0, 0, 0, 2, 0, 0]
    assert inputs.last.tolist() == [0, 1]
    assert inputs.sampling.temperature.tolist() == [0, 1.5]
    assert (inputs.num_rows, inputs.num_drawn) == (3, 1)


def test_parameters_of_a_row() -> None:
    inputs = StepInputs.blank(4, 2, SIZES, groups=None, with_history=True, with_biases=True)
    group = GroupInputs(inputs, 0, SIZES.max_sequences)
    row = group.add([3, 4], start=2, pages=(0,))
    params = SamplingParams(
        temperature=0.5,
        top_p=0.75,
        top_k=7,
        min_p=0.25,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=2.0,
        logit_bias={5: 1.5, 9: 2.5},
        top_logprobs=3,
    )
    group.sample(
        row, params, seed=8, position=4, prompt_length=3, history=(1, 2, 3), forbidden={9, 2}
    )
    arrays = inputs.sampling
    values = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 7,
        "min_p": 0.25,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 2,
        "seed": 8,
        "position": 4,
        "top_logprobs": 3,
    }
    blank = dict.fromkeys(values, 0) | {
        "top_p": 1,
        "repetition_penalty": 1,
        "top_logprobs": -1,
    }
    for name in values:
        assert getattr(arrays, name).tolist() == [values[name], blank[name]], name
    assert arrays.history.tokens.tolist() == [[1, 2, 3, *[NO_ID] * 7], [NO_ID] * 10]
    assert arrays.history.prompt_length.tolist() == [3, 0]
    # Token 9 is biased and forbidden: it is forbidden.
    biases = dict(zip(arrays.biases.ids[0].tolist(), arrays.biases.values[0].tolist(), strict=True))
    assert biases == {5: 1.5, 9: -np.inf, 2: -np.inf, NO_ID: 0.0}
    assert (arrays.biases.ids[1] == NO_ID).all()
    assert arrays.biases.ids.shape == (2, MAX_BIASES)


def test_a_history_that_no_row_needs_takes_no_memory_and_cannot_be_written() -> None:
    wide = StepSizes(num_pages=1, page_size=4, max_sequences=1, max_context=1 << 30)
    inputs = StepInputs.blank(1, 1, wide, groups=None)
    assert inputs.sampling.history.tokens.shape == (1, 1 << 30)
    assert not inputs.has_history
    group = GroupInputs(inputs, 0, 1)
    group.add([1], start=0, pages=())
    with pytest.raises(ValueError, match="read-only"):
        group.sample(0, SamplingParams(), seed=0, position=1, prompt_length=1, history=(1,))
    assert StepInputs.blank(1, 1, SIZES, groups=None, with_history=True).has_history
