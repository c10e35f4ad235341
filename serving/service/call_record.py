"""Record of a Generate call, which becomes metrics and spans: queue, prefill, decode.

    rpc span ├─ render    the chat template, to token ids
             ├─ queue     from the engine's inbox to the first step that computes for it
             ├─ prefill   from that step to the first token
             └─ decode    from the first token to the last one

The four spans are made when the call is over, from times that were noted during it, so that a token
costs no more than a note of its time.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from serving.engine.metrics import Finished, Metrics
from serving.errors import DeadlineExceeded, EngineFailure, ServingError
from serving.observe.tracing import Span, Traces
from serving.scheduling.request import NO_LIMIT, Event, FinishReason, Request

_STEPS = "mixtral.engine.steps"


class Counts(Protocol):
    """Counts calls; serving/engine/metrics.py is one that shows what it has counted."""

    def asked(self, n: int, max_tokens: int | None) -> None:
        """Records what a request asks for; `max_tokens` None stands for no limit of its own."""

    def finished(self, reason: str, choice: Finished) -> None:
        """Records a choice that ended with the reason `stop` or `length`."""

    def given_up(self, reason: str, choices: int) -> None:
        """Records choices of one request that ended with the reason `abort` or `error`."""

    def structure_violated(self) -> None:
        """Records a choice that misses a part of its schema that is not enforced."""

    def text(self) -> bytes:
        """Returns the metrics of the service in Prometheus' text format; not on an event loop."""


class AdapterCounts(Protocol):
    """Counts what adapters answer."""

    def answered(self, adapter: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Counts a request that is over."""


class Calls:
    """Makes the records of calls.

    Args:
        metrics: counts them; None to count without serving the figures.
        traces: exports their spans; None for no spans.
        adapters: counts those that adapters answer.
    """

    def __init__(
        self,
        metrics: Counts | None = None,
        traces: Traces | None = None,
        adapters: AdapterCounts | None = None,
    ) -> None:
        self._metrics: Counts = metrics or Metrics("")
        self._traces = traces or Traces()
        self._adapters = adapters

    def metrics_text(self) -> bytes:
        """Returns the metrics in Prometheus' text format. It takes milliseconds."""
        return self._metrics.text()

    def begin(self, service: str, method: str, metadata: Mapping[str, str]) -> "Call":
        """Begins the record of a call; the names of `metadata` are in lower case."""
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        span = self._traces.begin(f"{service}/{method}", metadata, attributes)
        if "x-request-id" in metadata:
            span.set({"mixtral.request.id": metadata["x-request-id"]})
        return Call(self._metrics, span, self._adapters)


@dataclass(slots=True)
class _Choice:
    """Progress of one choice. Times are time.monotonic()'s."""

    seated: float
    first: float
    last: float
    first_steps: int  # steps of the engine to its first token
    steps: int  # steps of the engine so far
    tokens: int = 0
    has_ended: bool = False


class Call:
    """Metrics and spans of one Generate call. Call `close` exactly once, in a `finally`."""

    def __init__(self, metrics: Counts, span: Span, adapters: AdapterCounts | None = None) -> None:
        self._metrics = metrics
        self._adapters = adapters
        self._span = span
        self._begun = time.monotonic()
        self._epoch = time.time() - self._begun  # added to monotonic times for spans
        self._sent: float | None = None
        self._request: Request | None = None
        self._choices: dict[int, _Choice] = {}
        self._error: ServingError | None = None

    def submitted(self, request: Request) -> None:
        """Notes that the request goes to the engine now."""
        self._sent, self._request = time.monotonic(), request
        self._metrics.asked(
            request.n, None if request.max_tokens >= NO_LIMIT else request.max_tokens
        )

    def note(self, event: Event, now: float) -> None:
        """Notes a drawn token, or the end of a choice that draws none, and its time."""
        choice = self._choices.get(event.choice)
        if choice is None:
            choice = self._choices[event.choice] = _Choice(
                event.seated, now, now, event.steps, event.steps
            )
        choice.last, choice.steps = now, event.steps
        choice.tokens += event.drawn is not None

    def ended(self, index: int, reason: FinishReason) -> None:
        """Notes that a choice has ended by itself: STOP or LENGTH."""
        assert self._sent is not None and self._request is not None
        choice = self._choices[index]
        choice.has_ended = True
        self._metrics.finished(
            reason.value,
            Finished(
                sent=self._sent,
                seated=choice.seated,
                first=choice.first,
                last=choice.last,
                prompt_tokens=len(self._request.prompt_ids),
                tokens=choice.tokens,
            ),
        )

    def violated(self) -> None:
        """Notes that a choice that has ended misses a part of its schema that is not enforced."""
        self._metrics.structure_violated()

    def fail(self, error: ServingError) -> None:
        """Notes that the call ends with an error."""
        self._error = error

    def close(self) -> None:
        """Ends the record: the call is over, or its caller has gone."""
        ended = sum(choice.has_ended for choice in self._choices.values())
        missing = self._request.n - ended if self._request else 0
        if self._error is None or isinstance(self._error, DeadlineExceeded):
            self._metrics.given_up("abort", missing)
        elif isinstance(self._error, EngineFailure):
            self._metrics.given_up("error", missing)
        if self._request is not None and self._request.adapter:
            self._count_adapter(self._request)
        if self._span.is_recording:
            self._add_spans()
        if self._error is not None:
            self._span.fail(type(self._error).__name__)
        elif missing or self._request is None:
            self._span.fail("cancelled")
        self._span.end()

    def _count_adapter(self, request: Request) -> None:
        self._span.set({"mixtral.adapter": request.adapter})
        if self._adapters is not None:
            prompt = len(request.prompt_ids) if self._choices else 0
            tokens = sum(choice.tokens for choice in self._choices.values())
            self._adapters.answered(request.adapter, prompt, tokens)

    def _add_spans(self) -> None:
        if self._sent is None or self._request is None:
            return
        self._add_span("render", self._begun, self._sent)
        if not self._choices:
            self._add_span("queue", self._sent, time.monotonic())
            return
        choices = self._choices.values()
        first = min(choices, key=lambda choice: choice.first)
        last = max(choice.last for choice in choices)
        # A choice that was forked from the first one had no part in the prompt's steps.
        steps = max(choice.steps - first.first_steps * (choice is first) for choice in choices)
        prompt = len(self._request.prompt_ids)
        answer = sum(choice.tokens for choice in choices)
        self._add_span("queue", self._sent, first.seated)
        self._add_span("prefill", first.seated, first.first, first.first_steps)
        self._add_span("decode", first.first, last, steps)
        self._span.set({"gen_ai.usage.input_tokens": prompt, "gen_ai.usage.output_tokens": answer})

    def _add_span(self, name: str, start: float, end: float, steps: int | None = None) -> None:
        attributes = {} if steps is None else {_STEPS: steps}
        span = self._span.child(name, attributes, start=start + self._epoch)
        span.end(max(start, end) + self._epoch)
