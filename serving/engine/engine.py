"""Engine: continues requests, a step at a time. The scheduler decides, the runner computes.

It knows token ids only. All programs are compiled before the first request (mixtral_jax/step);
after that they are called directly, and any other shape raises instead of compiling.

Steps overlap: the next one is launched before the tokens of the previous one are read. A drawn
token goes from one step to the next on the device; the host reads it a step later.
"""

from collections.abc import Callable

from jax.typing import DTypeLike

from mixtral_jax.model.transformer import Transformer
from mixtral_jax.step.buckets import Steps, compile_buckets
from mixtral_jax.step.inputs import StepSizes
from serving.engine.runner import Launched, Runner
from serving.scheduling.partitions import Partitions
from serving.scheduling.request import Event, Request
from serving.scheduling.step_plan import Limits, StepPlan

_FEW_ROWS = 8


def buckets(limits: Limits) -> tuple[int, ...]:
    """Returns the token counts that a step is padded to.

    They are powers of four, and the numbers that fill all rows or a whole step. Each of them takes
    a second of compiling at the start; padding takes a part of a step's time.
    """
    sizes = {1, _FEW_ROWS, limits.max_sequences, limits.max_step_tokens}
    size = _FEW_ROWS * 4
    while size < limits.max_step_tokens:
        sizes.add(size)
        size *= 4
    return tuple(sorted(size for size in sizes if size <= limits.max_step_tokens))


def rows_of(bucket: int, limits: Limits) -> int:
    """Returns the number of sequences that a step of `bucket` tokens has room for."""
    few = bucket <= _FEW_ROWS and not limits.deterministic
    return min(bucket, limits.max_sequences) if few else limits.max_sequences


def compile_steps(
    model: Transformer,
    limits: Limits,
    progress: Callable[[str], None] = lambda line: None,
    kv_dtype: DTypeLike | None = None,
) -> Steps:
    """Compiles all steps of an engine; `limits` are those of one partition."""
    sizes = StepSizes(
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        max_sequences=limits.max_sequences,
        max_context=limits.max_context,
    )
    rows = {bucket: rows_of(bucket, limits) for bucket in buckets(limits)}
    return compile_buckets(model, sizes, rows, progress, kv_dtype)


class Engine:
    """Continues requests, a step at a time. Used by one thread.

    Args:
        model: the parameters; must not be changed afterwards.
        limits: sizes of the cache and of a step; under a mesh that splits sequences, of one
            partition.
        steps: the result of `compile_steps` for the same shapes and limits.
        broadcast: called with each step's plans before it is launched; for several hosts.
    """

    def __init__(
        self,
        model: Transformer,
        limits: Limits,
        steps: Steps,
        broadcast: Callable[[tuple[StepPlan, ...]], None] | None = None,
    ) -> None:
        self.scheduler = Partitions(limits, steps.num_sequence_groups)
        self._runner = Runner(model, steps)
        self._broadcast = broadcast
        self._launched: Launched | None = None

    def add(self, request: Request) -> None:
        """Queues a request; raises the errors of `Scheduler.add`."""
        self.scheduler.add(request)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Forgets a request, or one choice of it, and frees its pages; see `Scheduler.cancel`."""
        self.scheduler.cancel(request_id, choice)

    def has_room(self, n: int, caller: str) -> bool:
        """Returns True if a request of n choices would be queued now; see `Scheduler.has_room`."""
        return self.scheduler.has_room(n, caller)

    @property
    def has_work(self) -> bool:
        """True if a step would compute something, or events are still to come."""
        return self.scheduler.has_work

    def step(self, now: float = 0.0) -> list[Event]:
        """Launches one step, records the previous one and returns the events of that.

        `now` is time.monotonic(): requests whose deadline is before it end.
        """
        events = self.scheduler.expire(now)
        plans = self.scheduler.plan()
        has_chunks = any(plan.chunks for plan in plans)
        if has_chunks and self._broadcast is not None:
            self._broadcast(plans)
        before, self._launched = self._launched, self._runner.launch(plans) if has_chunks else None
        if before is not None:
            events += self.scheduler.commit(before.plans, before.drawn())
        return events
