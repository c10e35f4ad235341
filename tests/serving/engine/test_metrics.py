"""The figures of a real engine under real requests, as Prometheus reads them."""

import asyncio
import random
import re
import time
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import mixtral_jax
from mixtral_jax.compilation import CompilationCount
from mixtral_jax.sampling_params import SamplingParams
from serving.engine.build import compile_steps, engine_of
from serving.engine.metrics import FINISHED, Finished, Metrics
from serving.engine.worker import EngineWorker
from serving.observe.metrics_port import serve_metrics
from serving.scheduling.request import Request
from serving.scheduling.step_plan import Limits

ROOT = Path(__file__).parents[3]
LIMITS = Limits(
    num_pages=24, page_size=4, max_sequences=4, max_step_tokens=32, max_context=64, max_waiting=99
)


class Running:
    """A started engine whose metrics are served."""

    def __init__(self) -> None:
        model, _ = mixtral_jax.load("tiny-random", mesh=None)
        self.engine = engine_of(model, LIMITS, compile_steps(model, LIMITS))
        self.compilations = CompilationCount()
        metrics = Metrics("tiny-random")
        self.engine.on_step = metrics.stepped
        metrics.watch(self.engine.scheduler, lambda: self.compilations.value)
        self.url = serve_metrics(metrics.registry, "127.0.0.1", 0)
        self.worker = EngineWorker(self.engine, metrics)
        self.worker.start()

    def figures(self) -> dict[str, float]:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(self.url, timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return {
                sample.name: sample.value
                for family in families
                for sample in family.samples
                if sample.labels in ({}, {"model_name": "tiny-random"})
            }

    async def answer(self, request: Request) -> int:
        async with aclosing(self.worker.submit(request)) as events:
            return sum([event.drawn is not None async for event in events])


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.worker.stop()


def requests_of_many_shapes() -> list[Request]:
    """Prompts of all lengths, and everything that can be asked of sampling."""
    dice = random.Random(6)
    shared = tuple(dice.randrange(261) for _ in range(20))
    return [
        Request(
            id=str(number),
            prompt_ids=shared[: dice.choice([0, 20])]
            + tuple(dice.randrange(261) for _ in range(dice.randint(1, 30))),
            sampling=SamplingParams(
                temperature=dice.choice([0.0, 1.0]),
                top_p=dice.choice([1.0, 0.5]),
                top_k=dice.choice([0, 3]),
                min_p=dice.choice([0.0, 0.1]),
                presence_penalty=dice.choice([0.0, 1.0]),
                frequency_penalty=dice.choice([0.0, 1.0]),
                repetition_penalty=dice.choice([1.0, 1.2]),
                logit_bias={i: 1.0 for i in range(dice.choice([0, 5]))},
                top_logprobs=dice.choice([None, 0, 5]),
                seed=number,
            ),
            max_tokens=dice.randint(1, 12),
            eos_ids=frozenset({1}),
            min_tokens=dice.choice([0, 1]),
            n=dice.choice([1, 1, 3]),
        )
        for number in range(40)
    ]


def test_nothing_compiles_once_the_engine_is_ready(running: Running) -> None:
    async def run() -> int:
        requests = requests_of_many_shapes()
        return sum(await asyncio.gather(*map(running.answer, requests)))

    tokens = asyncio.run(run())
    # A step is counted right after its tokens are told.
    deadline = time.monotonic() + 10
    while (figures := running.figures())["vllm:generation_tokens_total"] < tokens:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert figures["mixtral_compilations_total"] == 0
    scheduler = running.engine.scheduler
    assert figures["vllm:generation_tokens_total"] == tokens
    assert figures["vllm:prompt_tokens_total"] == scheduler.prompt_tokens > 0
    assert figures["vllm:prefix_cache_hits_total"] == scheduler.prefix_hit_tokens > 0
    assert figures["vllm:num_preemptions_total"] == scheduler.preemptions
    assert figures["mixtral_pages"] == figures["mixtral_free_pages"] == LIMITS.num_pages
    assert figures["vllm:prefix_cache_queries_total"] == scheduler.prompt_tokens
    assert figures["vllm:kv_cache_usage_perc"] == 0
    # Of each prompt, but for what was found in the cache, and of each answer, but for its last
    # token; prompts and answers that were put back are computed again.
    choices = sum(request.n for request in requests_of_many_shapes())
    least = scheduler.prompt_tokens - scheduler.prefix_hit_tokens + tokens - choices
    assert figures["vllm:iteration_tokens_total_sum"] >= least
    assert 0 < figures["vllm:iteration_tokens_total_count"] <= least
    assert figures["mixtral_cached_pages"] > 0
    assert figures["vllm:num_requests_running"] == figures["vllm:num_requests_waiting"] == 0
    choices = sum(request.n for request in requests_of_many_shapes())
    assert figures["vllm:time_to_first_token_seconds_count"] == choices
    assert figures["vllm:inter_token_latency_seconds_count"] == tokens - choices


def test_a_compilation_would_be_counted(running: Running) -> None:
    """One that the persistent cache spares too: the shape is the same in every run."""
    before = running.compilations.value
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(61)).block_until_ready()
    after = running.compilations.value
    assert after > before
    assert running.figures()["mixtral_compilations_total"] == after


def test_a_choice_that_ended_in_figures() -> None:
    metrics = Metrics("m")
    ended = Finished(sent=10, seated=10.5, first=12, last=18, prompt_tokens=7, tokens=4)
    metrics.finished("stop", ended)
    metrics.given_up("abort", 2)
    metrics.asked(3, 20)
    metrics.asked(1, None)
    metrics.stepped(33)
    text = generate_latest(metrics.registry).decode()
    figures = {
        (sample.name, sample.labels.get("finished_reason")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels["model_name"] == "m" and "le" not in sample.labels
    }
    expected = {
        "e2e_request_latency_seconds": 8,
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 1.5,
        "request_decode_time_seconds": 6,
        "request_inference_time_seconds": 7.5,
        "iteration_tokens_total": 33,
        "request_params_max_tokens": 20,
        "request_time_per_output_token_seconds": 2,  # three times 2 seconds
        "request_prompt_tokens": 7,
        "request_generation_tokens": 4,
    }
    assert {name: figures[f"vllm:{name}_sum", None] for name in expected} == expected
    assert {name: figures[f"vllm:{name}_count", None] for name in expected} == dict.fromkeys(
        expected, 1
    )
    assert figures["vllm:request_params_n_sum", None] == 4
    assert figures["vllm:request_params_n_count", None] == 2
    reasons = {reason: figures["vllm:request_success_total", reason] for reason in FINISHED}
    assert reasons == {"stop": 1, "length": 0, "abort": 2, "error": 0}


def test_the_form_of_the_kernels_is_a_label() -> None:
    metrics = Metrics("m")
    metrics.tell_kernels("avx2")
    assert b'mixtral_cpu_kernels_info{isa="avx2",model_name="m"} 1.0\n' in metrics.text()


def test_every_metric_is_documented(running: Running) -> None:
    documented = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    families = {
        re.sub("_(count|sum)$", "", name)
        for name in running.figures()
        if not name.endswith("_created")
    }
    families |= {"vllm:request_success_total"}
    # These have labels of their own.
    families |= {"vllm:cache_config_info", "mixtral_cpu_kernels_info"}
    assert len(families) == 34
    assert not {name for name in families if f"`{name}`" not in documented}
