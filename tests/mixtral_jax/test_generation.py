"""The plain loop, with parameters whose effect can be worked out by hand."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.compilation import CompilationCount
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import AdapterError, ChatError, ConfigError, SamplingError, UserError
from mixtral_jax.generation import generate, generate_draws, generate_tokens, steps_for
from mixtral_jax.model.adapter import Adapter, AdapterConfig
from mixtral_jax.model.merged import merge
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support.adapters import random_adapter
from tests.support.models import model_of
from tests.support.parity import huggingface, twin

VOCAB = 61
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def flat() -> Transformer:
    """All logits are 0, so that biases decide."""
    model = model_of(ModelConfig.tiny(vocab_size=VOCAB))
    assert model.head is not None
    model.head.weight.set_value(jnp.zeros_like(model.head.weight.get_value()))
    return model


@pytest.fixture(scope="module")
def sharp() -> Transformer:
    """Weights of ten times the usual size: logits that differ."""
    graph, state = nnx.split(model_of(ModelConfig.tiny(vocab_size=VOCAB), seed=1))
    return nnx.merge(graph, jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, state))


def tokens(model: Transformer, count: int, **sampling: Any) -> list[int]:
    """After a prompt that holds 7 three times and 9 once."""
    return list(generate_tokens(model, [7, 7, 9, 7], max_tokens=count, **sampling))


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        # What the prompt holds does not count. 7 goes 10, 9, 8 as 9 goes 9.5, 8.5.
        (dict(frequency_penalty=1.0), [7, 9, 7, 9, 7]),
        # Once 7 is at 9 and 9 at 8.5, nothing changes any more.
        (dict(presence_penalty=1.0), [7, 9, 7, 7, 7]),
        (dict(frequency_penalty=-1.0), [7, 7, 7, 7, 7]),
        ({}, [7, 7, 7, 7, 7]),
    ],
)
def test_penalties(flat: Transformer, penalty: dict[str, float], expected: list[int]) -> None:
    assert tokens(flat, 5, logit_bias={7: 10.0, 9: 9.5}, **penalty) == expected


def test_no_end_before_min_tokens(flat: Transformer) -> None:
    bias = {7: 10.0, 9: 9.5, 5: 9.0}
    end = frozenset({7, 9})
    assert tokens(flat, 6, logit_bias=bias, eos_ids=end) == [7]
    assert tokens(flat, 6, logit_bias=bias, eos_ids=end, min_tokens=3) == [5, 5, 5, 7]
    assert tokens(flat, 2, logit_bias=bias, eos_ids=end, min_tokens=3) == [5, 5]
    assert tokens(flat, 2, logit_bias=bias) == [7, 7]


def test_what_is_kept(flat: Transformer) -> None:
    """Probabilities of about 0.72, 0.26 and 0.01; the other 58 tokens share a hundredth."""
    bias = {7: 10.0, 9: 9.0, 5: 6.0}
    hot = dict(logit_bias=bias, temperature=1.0, seed=4)
    assert set(tokens(flat, 12, **hot, top_k=2)) == {7, 9}
    assert set(tokens(flat, 12, **hot, top_p=0.9)) == {7, 9}
    assert set(tokens(flat, 12, **hot, min_p=0.3)) == {7, 9}
    assert set(tokens(flat, 12, **hot, min_p=0.5)) == {7}


def test_a_seed_repeats_the_answer(flat: Transformer) -> None:
    first = tokens(flat, 12, temperature=1.0, seed=1)
    assert first == tokens(flat, 12, temperature=1.0, seed=1)
    assert first != tokens(flat, 12, temperature=1.0, seed=2)
    assert tokens(flat, 12, temperature=1.0) != tokens(flat, 12, temperature=1.0)


@pytest.mark.slow
def test_logprobs_equal_the_full_form(sharp: Transformer) -> None:
    """Whatever else is asked for, they are of the model's own distribution."""
    prompt = [5, 9, 2]
    draws = list(
        generate_draws(
            sharp,
            prompt,
            max_tokens=8,
            temperature=0.7,
            seed=3,
            top_k=20,
            repetition_penalty=1.5,
            logit_bias={4: 3.0},
            top_logprobs=6,
        )
    )
    ids = prompt + [draw.token_id for draw in draws]
    logits = jax.jit(lambda model, ids: model(ids))(sharp, jnp.asarray([ids[:-1]]))
    logprobs = np.asarray(jax.nn.log_softmax(logits[0]))[2:]
    for draw, want in zip(draws, logprobs, strict=True):
        assert draw.logprob is not None
        np.testing.assert_allclose(draw.logprob, want[draw.token_id], atol=1e-4)
        assert [token for token, _ in draw.top_logprobs] == np.argsort(-want)[:6].tolist()
        np.testing.assert_allclose(
            [value for _, value in draw.top_logprobs], np.sort(want)[::-1][:6], atol=1e-4
        )
    plain = generate_draws(sharp, prompt, max_tokens=1, top_logprobs=None)
    assert next(plain)[1:] == (None, ())
    only_own = next(generate_draws(sharp, prompt, max_tokens=1))
    assert only_own.logprob is not None and only_own.top_logprobs == ()


@pytest.mark.slow
def test_greedy_with_penalties_equals_transformers() -> None:
    theirs = huggingface("llama")
    import torch

    prompt, end = [5, 9, 2, 5, 77, 31], 40
    want = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=30,
        min_new_tokens=12,
        repetition_penalty=1.2,
        sequence_bias={(end,): 50.0, (33,): 1.0},
        eos_token_id=end,
        pad_token_id=0,
    )
    ours = generate_tokens(
        twin(theirs),
        prompt,
        max_tokens=30,
        min_tokens=12,
        repetition_penalty=1.2,
        logit_bias={end: 50.0, 33: 1.0},
        eos_ids=frozenset({end}),
    )
    answer = list(ours)
    assert answer == want[0, len(prompt) :].tolist()
    assert len(answer) == 13 and answer[-1] == end and len(set(answer)) > 3


def test_biases_of_the_size_of_the_logits_and_penalties_equal_transformers() -> None:
    """Half of the biased tokens stand in the prompt, so the order of the two decides."""
    theirs = huggingface("llama")
    import torch

    model, prompt = twin(theirs), [5, 9, 2, 5, 77, 31]
    for bias in (1.0, 2.0, 3.0):
        biases = {5: bias, 9: bias, 77: -bias, 31: bias, 33: bias, 12: bias}
        want = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
            repetition_penalty=1.3,
            sequence_bias={(token,): value for token, value in biases.items()},
            eos_token_id=40,
            pad_token_id=0,
        )
        ours = generate_tokens(
            model, prompt, max_tokens=20, repetition_penalty=1.3, logit_bias=biases
        )
        assert list(ours) == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (dict(temperature=2.1), r"temperature is 2.1; it must be within 0 and 2"),
        (dict(temperature=math.nan), r"temperature is nan; it must be within 0 and 2"),
        (dict(top_p=-0.5), r"top_p is -0.5; it must be within 0 and 1"),
        (dict(top_k=-1), r"top_k is -1; it must be within 0 and 2147483647"),
        (dict(min_p=1.5), r"min_p is 1.5; it must be within 0 and 1"),
        (dict(presence_penalty=3.0), r"presence_penalty is 3; it must be within -2 and 2"),
        (dict(frequency_penalty=-3.0), r"frequency_penalty is -3; it must be within -2 and 2"),
        (dict(repetition_penalty=0.0), r"repetition_penalty is 0; it must be within 0.01 and 100"),
        (dict(min_tokens=-1), r"min_tokens is -1; it must be 0 or more"),
        (dict(logit_bias={VOCAB: 1.0}), r"logit_bias holds 61; ids are below 61"),
        (dict(logit_bias={3: 101.0}), r"logit_bias of 3 is 101; it must be within -100 and 100"),
    ],
)
def test_parameters_out_of_range(flat: Transformer, sampling: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens(flat, 1, **sampling)


def test_other_parameters(flat: Transformer) -> None:
    with pytest.raises(ValueError, match="top_logprobs is 21; it must be within 0 and 20"):
        generate_draws(flat, [1], max_tokens=1, top_logprobs=21)
    with pytest.raises(TypeError, match="there is no parameter 'top_q'"):
        tokens(flat, 1, top_q=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt_ids=[]), "the prompt is empty; give at least one token"),
        (dict(prompt_ids=[7, VOCAB]), "the prompt holds the id 61; ids are 0 or more and below 61"),
        (dict(prompt_ids=[-5]), "the prompt holds the id -5; ids are 0 or more and below 61"),
        (dict(prompt_ids=[1.0]), "an id of the prompt is 1.0; give a whole number"),
        (dict(prompt_ids=[True]), "an id of the prompt is True; give a whole number"),
        (dict(prompt_ids=[None]), "an id of the prompt is None; give a whole number"),
        (dict(prompt_ids=5), "the prompt is 5; give a list of token ids"),
        (dict(prompt_ids=np.ones((1, 2), int)), "an id of the prompt is array([1, 1]); give a"),
        (dict(prompt_ids=jnp.ones(2)), "an id of the prompt is Array(1., dtype=float32); give a"),
        (dict(prompt_ids=jnp.ones(2, bool)), "an id of the prompt is Array(True, dtype=bool)"),
        (dict(sampling={}), "sampling is a dict; give SamplingParams(temperature=0), or its"),
        (dict(sampling={"top_k": 1}), "sampling is a dict; give SamplingParams"),
        (dict(eos_ids={VOCAB}), "eos_ids holds the id 61; ids are 0 or more and below 61"),
        (dict(max_tokens=-3), "max_tokens is -3; ask for at least 1 token"),
        (dict(max_tokens=0), "max_tokens is 0; ask for at least 1 token"),
        (dict(max_tokens=2.0), "max_tokens is 2.0; give a whole number"),
        (dict(max_tokens=None), "max_tokens is None; give a whole number"),
        (dict(min_tokens=None), "min_tokens is None; give a whole number"),
        (dict(top_p=None), "top_p is None; give a number within 0 and 1"),
        (dict(top_k=2.7), "top_k is 2.7; give a whole number"),
    ],
)
@pytest.mark.parametrize("function", [generate_draws, generate_tokens])
def test_wrong_arguments_are_refused_at_the_call(
    flat: Transformer,
    function: Any,
    arguments: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The iterator is never asked for anything."""
    # Annotations are checked in tests alone: outside, values of any type arrive.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(SamplingError) as caught:
        function(flat, **{"prompt_ids": [1], "max_tokens": 1, **arguments})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_ids_in_an_array_are_ids(
    flat: Transformer, array: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ids = array([7, 7, 9, 7])
    biases = {7: 10.0}
    assert list(generate_tokens(flat, ids, max_tokens=2, logit_bias=biases)) == [7, 7]


def test_biases_and_ends_have_room_together() -> None:
    model = model_of(ModelConfig.tiny(vocab_size=400))
    biases = dict.fromkeys(range(300), 1.0)
    with pytest.raises(SamplingError, match="have 321 entries together; give at most 320"):
        generate_tokens(model, [1], max_tokens=1, logit_bias=biases, eos_ids=frozenset(range(21)))


def test_parameters_as_a_record_or_as_keywords(flat: Transformer) -> None:
    record = SamplingParams(temperature=1.0, seed=5, logit_bias={7: 4.0, 9: 4.0})
    keywords: Any = dict(temperature=1.0, seed=5, logit_bias={7: 4.0, 9: 4.0})
    prompt = [7, 7, 9, 7]
    answer = list(generate_tokens(flat, prompt, record, max_tokens=12))
    assert answer == tokens(flat, 12, **keywords)
    # A keyword changes one field of the record.
    assert list(generate_tokens(flat, prompt, record, max_tokens=12, seed=6)) != answer


def test_generate_checks_at_the_call() -> None:
    import mixtral_jax

    model, tokenizer = mixtral_jax.load("tiny-random", mesh=None)
    with pytest.raises(SamplingError, match="temperature is 3"):
        generate(model, tokenizer, "ab", temperature=3.0)
    with pytest.raises(UserError, match="role 'king'"):
        generate(model, tokenizer, [{"role": "king", "content": "x"}])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"role": "user", "content": "x"}, "the prompt is a dict; give a text, or a list of mess"),
        (["x"], "the prompt is a list that holds a str; give a text"),
        ([7, 9], "the prompt is a list that holds a int; .*; generate_tokens takes token ids"),
        (b"x", "the prompt is a bytes; give a text"),
        (None, "the prompt is a NoneType; give a text"),
    ],
)
def test_a_prompt_is_text_or_messages(
    flat: Transformer, prompt: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ChatError, match=message):
        generate(flat, ByteTokenizer(), prompt)


def test_text_needs_a_tokenizer(flat: Transformer) -> None:
    with pytest.raises(UserError, match=r"no tokenizer .*; load a checkpoint that has one, or"):
        generate(flat, None, "x")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "zzz"])
def test_keys_and_values_of_a_foreign_dtype_are_refused(flat: Transformer, dtype: str) -> None:
    possible = "float32 or fp8 or int8"
    with pytest.raises(ConfigError, match=f"values of '{dtype}' .* on cpu; use {possible}"):
        generate_draws(flat, [1], max_tokens=1, kv_dtype=dtype)


def test_a_second_answer_compiles_nothing(flat: Transformer) -> None:
    tokens(flat, 3)
    with CompilationCount() as count:
        tokens(flat, 5, temperature=1.0, presence_penalty=1.0, logit_bias={3: 1.0})
    assert count.value == 0
    # Nor what only a form would need.
    assert all(step.draw_masked is None for step in steps_for(flat, 4).buckets.values())


@pytest.mark.slow
def test_generate_passes_everything_on() -> None:
    import mixtral_jax

    model, tokenizer = mixtral_jax.load("tiny-random", mesh=None)
    end = min(tokenizer.eos_ids)
    letter = tokenizer.encode("ab")[-1]
    bias = {end: 100.0, letter: 90.0}

    def text(**sampling: Any) -> str:
        return "".join(
            generate(
                model, tokenizer, "ab", max_tokens=4, temperature=0.0, logit_bias=bias, **sampling
            )
        )

    assert text() == ""
    once = tokenizer.decode([letter])
    assert text(min_tokens=2) == once * 2
    assert text(min_tokens=9) == once * 4
    # The end's own id has no text, and does not end the answer.
    assert text(ignore_eos=True) == text(ignore_eos=True, min_tokens=3)


@pytest.mark.parametrize("experts", [0, 3], ids=["dense", "moe"])
def test_an_adapter_beside_the_model_draws_what_the_merged_model_does(experts: int) -> None:
    config = replace(
        ModelConfig.tiny(vocab_size=ByteTokenizer().vocab_size),
        num_experts=experts,
        experts_per_token=min(experts, 2),
    )
    model = model_of(config)
    settings = AdapterConfig(rank=3, targets=("q", "o", "down"))
    adapter = random_adapter(config, settings, size=0.3).folded(settings)
    prompt = [7, 7, 9, 7]
    ours = list(generate_draws(model, prompt, max_tokens=8, adapter=adapter))
    want = list(generate_draws(merge(model, adapter), prompt, max_tokens=8))
    assert [draw.token_id for draw in ours] == [draw.token_id for draw in want]
    assert [draw.logprob for draw in ours] == pytest.approx([d.logprob for d in want], abs=1e-4)
    alone = list(generate_tokens(model, prompt, max_tokens=8))
    assert alone != [draw.token_id for draw in ours]
    words = (
        "".join(generate(model, ByteTokenizer(), "hi", GREEDY, max_tokens=4, adapter=beside))
        for beside in (None, adapter)
    )
    assert len(set(words)) == 2
    short = Adapter(adapter.layers[:1])
    with pytest.raises(AdapterError, match="has 1 layers"):
        generate_tokens(model, prompt, max_tokens=1, adapter=short)
    wide = random_adapter(replace(config, num_heads=2 * config.num_heads), settings)
    with pytest.raises(AdapterError, match="layer 0, q: .* do not fit this model"):
        generate_tokens(model, prompt, max_tokens=1, adapter=wide)
