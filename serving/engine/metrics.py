"""Metrics of an engine process for Prometheus: its scheduler, its tokens and their times.

Where the meaning is the same, names and the label `model_name` are vLLM's, so that dashboards made
for it work; the others are called mixtral_*. A request of vLLM's metrics is one choice of a request
here, as it is there.

`python -m serving --metrics-port` serves them (serving/observe/metrics_port.py); without it they
are counted as well, but not served.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from serving.scheduling.partitions import Partitions

# Seconds. A first token takes from milliseconds to the minutes of a full queue.
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (*_FIRST, 300, 600, 1800)
_TOKENS = tuple(2**i for i in range(16))
_CHOICES = (1, 2, 5, 10, 16)
_LABEL = "model_name"
FINISHED = ("stop", "length", "abort", "error")  # reasons; abort: the caller left, or its time


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Times and sizes of a choice that has ended. Times are time.monotonic()'s."""

    sent: float  # to the engine
    seated: float  # when the engine first computed for it
    first: float  # token
    last: float
    prompt_tokens: int
    tokens: int


class Metrics:
    """Counts and times tokens and choices; `watch` adds the engine's own figures.

    Args:
        model_name: The served one.
    """

    def __init__(self, model_name: str) -> None:
        # Its own registry, so that two engines in one process, as in tests, have their own series.
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._generated = Counter(
            "vllm:generation_tokens", "Tokens generated.", [_LABEL], registry=self.registry
        ).labels(model_name)
        ended = Counter(
            "vllm:request_success",
            "Choices that have ended; aborted ones too.",
            [_LABEL, "finished_reason"],
            registry=self.registry,
        )
        self._ended = {reason: ended.labels(model_name, reason) for reason in FINISHED}
        self._violations = Counter(
            "mixtral_structure_violations",
            "Choices that have ended and miss a part of their schema that is not enforced.",
            [_LABEL],
            registry=self.registry,
        ).labels(model_name)
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to the first token of each of its choices.",
            _FIRST,
        )
        self._next = _Intervals(
            "vllm:inter_token_latency_seconds", "Between two tokens of one choice.", model_name
        )
        self.registry.register(self._next)
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to a choice's last token.", _WHOLE
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step for it.", _FIRST
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "From that step to its first token.", _FIRST
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "From its first token to its last one.", _WHOLE
        )
        self._mean_next = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Between two tokens of one choice, its mean.",
            _NEXT,
        )
        self._prompt = self._histogram(
            "vllm:request_prompt_tokens", "Tokens of its prompt.", _TOKENS
        )
        self._answer = self._histogram(
            "vllm:request_generation_tokens", "Tokens of a choice.", _TOKENS
        )

        self._inference = self._histogram(
            "vllm:request_inference_time_seconds",
            "From the first step for a choice to its last token.",
            _WHOLE,
        )
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens of a step of the engine.", _TOKENS
        )
        self._n = self._histogram(
            "vllm:request_params_n", "Choices that a request asks for.", _CHOICES
        )
        self._max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "Its max_tokens, where it gives one.", _TOKENS
        )

    def stepped(self, num_tokens: int) -> None:
        """Records a step of the engine."""
        self._step_tokens.observe(num_tokens)

    def asked(self, n: int, max_tokens: int | None) -> None:
        """Records what a request asks for; `max_tokens` None stands for no limit of its own."""
        self._n.observe(n)
        if max_tokens is not None:
            self._max_tokens.observe(max_tokens)

    def time_steps(self, seconds: Callable[[], float]) -> None:
        """Shows the time of the engine's last step, which `seconds` returns to any thread.

        To be called once.
        """
        Gauge(
            "mixtral_last_step_seconds",
            "The engine's last step, or the present one if it already takes longer.",
            registry=self.registry,
        ).set_function(seconds)

    def first_token(self, seconds: float) -> None:
        """Records a choice's first token, `seconds` after its request came."""
        self._generated.inc()
        self._first.observe(seconds)

    def next_tokens(self, seconds: Mapping[float, int]) -> None:
        """Records tokens that are not the first of their choices, of one step.

        Args:
            seconds: The numbers of tokens that came so long after the previous ones.
        """
        self._generated.inc(sum(seconds.values()))
        self._next.add(seconds)

    def finished(self, reason: str, choice: Finished) -> None:
        """Records a choice that ended with the reason `stop` or `length`."""
        self._ended[reason].inc()
        self._whole.observe(choice.last - choice.sent)
        self._queue.observe(choice.seated - choice.sent)
        self._prefill.observe(choice.first - choice.seated)
        self._decode.observe(choice.last - choice.first)
        self._inference.observe(choice.last - choice.seated)
        self._prompt.observe(choice.prompt_tokens)
        self._answer.observe(choice.tokens)
        if choice.tokens > 1:
            self._mean_next.observe((choice.last - choice.first) / (choice.tokens - 1))

    def given_up(self, reason: str, choices: int) -> None:
        """Records choices of one request that ended with the reason `abort` or `error`."""
        self._ended[reason].inc(choices)

    def structure_violated(self) -> None:
        """Records a choice that misses a part of its schema that is not enforced."""
        self._violations.inc()

    def watch(
        self,
        scheduler: Partitions,
        compilations: Callable[[], int],
        failed_steps: Callable[[], int] = lambda: 0,
    ) -> None:
        """Adds the figures of an engine; to be called once, when it is ready.

        They are read one by one from another thread than the engine's: each is right, but two of
        them may be of different moments.

        Args:
            scheduler: of the engine.
            compilations: returns the number of programs compiled since the engine was ready.
            failed_steps: returns the number of steps that have failed.
        """
        self.registry.register(
            _EngineFigures(scheduler, compilations, failed_steps, self._model_name)
        )

    def tell_kernels(self, isa: str) -> None:
        """Adds the form of the CPU kernels that run; to be called once, and on CPU only."""
        Gauge(
            "mixtral_cpu_kernels_info",
            "The instruction set of the CPU kernels that run, in its label isa; always 1.",
            [_LABEL, "isa"],
            registry=self.registry,
        ).labels(self._model_name, isa).set(1)

    def text(self) -> bytes:
        """Returns all figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(name, what, [_LABEL], buckets=buckets, registry=self.registry)
        return family.labels(self._model_name)


class _Intervals(Collector):
    """A histogram that counts the equal times of a step together; one thread adds to it."""

    def __init__(self, name: str, what: str, model_name: str) -> None:
        self._name, self._what, self._model_name = name, what, model_name
        self._counts = [0] * (len(_NEXT) + 1)
        self._sum = 0.0

    def add(self, seconds: Mapping[float, int]) -> None:
        """Counts times, each as often as it says."""
        for value, count in seconds.items():
            self._counts[bisect_left(_NEXT, value)] += count
            self._sum += value * count

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(floatToGoString, _NEXT), "+Inf"]
        sums = accumulate(self._counts.copy())
        family = HistogramMetricFamily(self._name, self._what, labels=[_LABEL])
        buckets = [*zip(bounds, map(float, sums), strict=True)]
        family.add_metric([self._model_name], buckets, self._sum)
        yield family


class _EngineFigures(Collector):
    def __init__(
        self,
        scheduler: Partitions,
        compilations: Callable[[], int],
        failed_steps: Callable[[], int],
        model_name: str,
    ) -> None:
        self._scheduler = scheduler
        self._failed_steps = failed_steps
        self._compilations = compilations
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        scheduler = self._scheduler
        pages, free = scheduler.num_pages, scheduler.num_free_pages
        looked_up = scheduler.prompt_tokens if scheduler.limits.prefix_reuse else 0
        gauge, counter = self._gauge, self._counter
        yield gauge("vllm:num_requests_running", "Choices being computed.", scheduler.num_running)
        yield gauge("vllm:num_requests_waiting", "Choices in the queue.", scheduler.num_waiting)
        yield gauge(
            "vllm:kv_cache_usage_perc",
            "Part of the pages that is held: 1 is all.",
            1 - free / pages,
        )
        yield counter(
            "vllm:num_preemptions",
            "Choices put back into the queue, for want of pages or for another caller.",
            scheduler.preemptions,
        )
        yield counter("vllm:prompt_tokens", "Tokens of prompts.", scheduler.prompt_tokens)
        yield counter("vllm:prefix_cache_queries", "Of these, looked up in the cache.", looked_up)
        yield counter(
            "vllm:prefix_cache_hits", "Of these, found there.", scheduler.prefix_hit_tokens
        )
        yield counter(
            "vllm:spec_decode_num_drafts",
            "Times that a step checked guesses of an answer.",
            scheduler.checks,
        )
        yield counter(
            "vllm:spec_decode_num_draft_tokens", "Guesses that were checked.", scheduler.guesses
        )
        yield counter(
            "vllm:spec_decode_num_accepted_tokens", "Of these, right.", scheduler.accepted
        )
        limits = scheduler.limits
        cache = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Settings of the cache of keys and values, in its labels; always 1.",
            labels=[_LABEL, "block_size", "num_gpu_blocks", "enable_prefix_caching"],
        )
        cache.add_metric(
            [self._model_name, str(limits.page_size), str(pages), str(limits.prefix_reuse)], 1
        )
        yield cache
        yield GaugeMetricFamily("mixtral_pages", "For keys and values.", pages)
        yield GaugeMetricFamily("mixtral_free_pages", "Held by no request.", free)
        yield GaugeMetricFamily(
            "mixtral_cached_pages",
            "Of the free ones, kept for requests that begin alike.",
            scheduler.num_cached_pages,
        )
        yield CounterMetricFamily(
            "mixtral_compilations",
            "Programs compiled since the engine was ready: 0, or something is wrong.",
            self._compilations(),
        )
        yield CounterMetricFamily(
            "mixtral_failed_steps", "Steps that have failed.", self._failed_steps()
        )

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, what, labels=[_LABEL])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(name, what, labels=[_LABEL])
        family.add_metric([self._model_name], value)
        return family
