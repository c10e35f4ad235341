"""Parameters are checked where they are made: type, range, and the name in the message."""

import math
from dataclasses import replace
from typing import Any, get_type_hints

import jaxtyping
import numpy as np
import pytest

from mixtral_jax.errors import SamplingError, UserError
from mixtral_jax.sampling_params import SamplingFields, SamplingParams


@pytest.fixture(autouse=True)
def types_as_a_user_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations are checked in these tests alone: outside, values of any type arrive."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(temperature=2.5), "temperature is 2.5; it must be within 0 and 2"),
        (dict(temperature=math.nan), "temperature is nan; it must be within 0 and 2"),
        (dict(temperature=None), "temperature is None; give a number within 0 and 2"),
        (dict(temperature="hot"), "temperature is 'hot'; give a number within 0 and 2"),
        (dict(temperature=10**400), "temperature is inf; it must be within 0 and 2"),
        (dict(top_p=-0.1), "top_p is -0.1; it must be within 0 and 1"),
        (dict(top_p=None), "top_p is None; give a number within 0 and 1"),
        (dict(top_p=True), "top_p is True; give a number within 0 and 1"),
        (dict(min_p=1.1), "min_p is 1.1; it must be within 0 and 1"),
        (dict(presence_penalty=-3), "presence_penalty is -3; it must be within -2 and 2"),
        (dict(frequency_penalty=3), "frequency_penalty is 3; it must be within -2 and 2"),
        (dict(repetition_penalty=0), "repetition_penalty is 0; it must be within 0.01 and 100"),
        (dict(top_k=2.7), "top_k is 2.7; give a whole number"),
        (dict(top_k=True), "top_k is True; give a whole number"),
        (dict(top_k=None), "top_k is None; give a whole number"),
        (dict(top_k=-1), "top_k is -1; it must be within 0 and 2147483647"),
        (dict(top_logprobs=21), "top_logprobs is 21; it must be within 0 and 20"),
        (dict(top_logprobs=False), "top_logprobs is False; give a whole number"),
        (dict(seed=1.5), "seed is 1.5; give a whole number"),
        (dict(logit_bias=None), "logit_bias is None; give a mapping of token ids to numbers"),
        (dict(logit_bias=[(1, 2.0)]), "logit_bias is [(1, 2.0)]; give a mapping"),
        (dict(logit_bias={-1: 2.0}), "logit_bias holds -1; ids are 0 or more"),
        (dict(logit_bias={"1": 2.0}), "a token id of logit_bias is '1'; give a whole number"),
        (dict(logit_bias={1: None}), "logit_bias of 1 is None; give a number within -100 and 100"),
        (dict(logit_bias={1: 101}), "logit_bias of 1 is 101; it must be within -100 and 100"),
        (dict(logit_bias={1: math.nan}), "logit_bias of 1 is nan; it must be within -100 and 100"),
        (
            dict(logit_bias=dict.fromkeys(range(301), 0.0)),
            "logit_bias has 301 entries; give at most 300",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**fields)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, UserError)


def test_the_ends_of_the_ranges_are_taken() -> None:
    SamplingParams(
        temperature=0,
        top_p=0,
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2,
        # What 0.01 becomes as a float32 of the wire.
        repetition_penalty=float(np.float32(0.01)),
        top_k=2**31 - 1,
        top_logprobs=20,
        logit_bias={0: -100, 5: 100},
    )


def test_values_become_numbers_of_python() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        seed=np.uint32(7),
        logit_bias={np.int32(9): np.float64(1.5), 2: 1},
    )
    assert params == SamplingParams(temperature=0.5, top_k=3, seed=7, logit_bias={2: 1.0, 9: 1.5})
    assert [type(value) for value in (params.temperature, params.top_k, params.seed)] == [
        float,
        int,
        int,
    ]
    assert repr(params.logit_bias) == "{2: 1.0, 9: 1.5}"


def test_the_lower_31_bits_of_a_seed_count() -> None:
    assert SamplingParams(seed=2**31 + 5).seed == 5
    assert SamplingParams(seed=-1).seed == 2**31 - 1
    assert SamplingParams().seed is None


def test_biases_are_copied() -> None:
    biases = {1: 2.0}
    params = SamplingParams(logit_bias=biases)
    biases[1] = 3.0
    assert params.logit_bias == {1: 2.0}
    assert hash(params) == hash(SamplingParams(logit_bias={4: 1.0}))


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(SamplingError, match="top_p is 2"):
        replace(SamplingParams(), top_p=2.0)


def test_ids_of_biases_are_held_against_the_vocabulary() -> None:
    params = SamplingParams(logit_bias={60: 1.0})
    params.check_vocabulary(61)
    with pytest.raises(SamplingError, match="logit_bias holds 60; ids are below 60"):
        params.check_vocabulary(60)


def test_penalties_are_what_looks_back() -> None:
    assert not SamplingParams(temperature=1.0, top_p=0.5, logit_bias={1: 1.0}).has_penalties
    assert SamplingParams(presence_penalty=-0.5).has_penalties
    assert SamplingParams(frequency_penalty=0.5).has_penalties
    assert SamplingParams(repetition_penalty=0.5).has_penalties


def test_keywords_are_the_fields() -> None:
    assert get_type_hints(SamplingFields) == get_type_hints(SamplingParams)
