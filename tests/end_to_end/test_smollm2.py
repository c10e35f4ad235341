"""The real weights: SmolLM2-135M-Instruct from its GGUF file, against transformers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixtral_jax
from convert.convert import convert
from mixtral_jax.checkpoint import restore
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from serving.engine.build import compile_steps, engine_of
from serving.scheduling.request import Request
from serving.scheduling.step_plan import Limits

pytestmark = pytest.mark.slow

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "How many languages are in the world?",
    "Explain photosynthesis to a child.",
    "def fibonacci(n):",
    "Translate 'good morning' to French.",
    "List three prime numbers above 100.",
    "Why is the sky blue? Answer in one sentence.",
]
LENGTH = 64


@pytest.fixture(scope="module")
def answers(smollm2: Path) -> list[tuple[list[int], list[int]]]:
    """Prompt and greedy answer of every prompt, from the engine, all together."""
    model, tokenizer = mixtral_jax.load(smollm2, mesh=None)
    limits = Limits(
        num_pages=128,
        page_size=16,
        max_sequences=8,
        max_step_tokens=128,
        max_context=1024,
        max_waiting=8,
    )
    engine = engine_of(model, limits, compile_steps(model, limits, has_masks=False))
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in PROMPTS]
    for i, ids in enumerate(prompts):
        engine.add(
            Request(
                id=str(i),
                prompt_ids=tuple(ids),
                sampling=SamplingParams(temperature=0.0),
                max_tokens=LENGTH,
                eos_ids=frozenset(),  # go on to the full length
            )
        )
    out: list[list[int]] = [[] for _ in PROMPTS]
    while engine.has_work:
        for event in engine.step():
            if event.drawn is not None:
                out[int(event.request_id)].append(event.drawn.token_id)
    print([tokenizer.decode(ids) for ids in out])
    return list(zip(prompts, out, strict=True))


def test_greedy_tokens_equal_transformers(
    smollm2_gguf: Path, answers: list[tuple[list[int], list[int]]]
) -> None:
    """Each token is the one that transformers finds likeliest after all tokens before it.

    By induction that is its greedy answer. The weights are those that it dequantises itself.
    """
    torch = pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
    for prompt, answer in answers:
        assert len(answer) == LENGTH
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + answer])).logits[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer


@pytest.mark.soak  # on small models tests/convert shows it too
def test_upcycled_tokens_equal_dense(
    smollm2_gguf: Path, answers: list[tuple[list[int], list[int]]], tmp_path: Path
) -> None:
    """Four copies of each feed-forward: any two of them add up to the original."""
    folder = tmp_path / "upcycled"
    convert(smollm2_gguf, folder, dtype="float32", upcycle_experts=4)
    model, _ = restore.load(folder)
    assert model.config.num_experts == 4

    @jax.jit
    def likeliest(model: Transformer, tokens: jax.Array) -> jax.Array:
        return jnp.argmax(model(tokens), axis=-1)

    longest = max(len(prompt) for prompt, _ in answers) + LENGTH
    for prompt, answer in answers:
        ids = np.array([prompt + answer + [0] * (longest - len(prompt) - LENGTH)])
        tokens = np.asarray(likeliest(model, jnp.asarray(ids)))[0]
        assert tokens[len(prompt) - 1 : len(prompt) - 1 + LENGTH].tolist() == answer


def test_what_it_says_makes_sense(smollm2: Path) -> None:
    model, tokenizer = mixtral_jax.load(smollm2, mesh=None)
    question = [{"role": "user", "content": PROMPTS[0]}]
    text = "".join(mixtral_jax.generate(model, tokenizer, question, max_tokens=16, temperature=0.0))
    assert "Paris" in text
