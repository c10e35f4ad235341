"""Engine: continues requests, a step at a time. The scheduler decides, a device computes.

It knows token ids only. This is the one loop, whatever the steps are made of:

    plan ──> walk ──> (masks) ──> draw ──> commit

Steps overlap: the next one is planned and walked before the tokens of the previous one are read. A
drawn token goes from one step to the next on the device; the host reads it a step later. Where rows
have masks, these follow from the tokens of the step before, which are read between walk and draw; a
row whose mask is not ready then draws nothing, and draws in a later step. Where no row has one,
walk and draw are one call. A row whose next tokens are guessed computes several at once, and is
planned again when it is known how many were right.

A step may fail. Before it has touched the pages, its plan is withdrawn, and nothing else is lost.
After that, all pages are made anew, and every sequence is computed again from its tokens; with the
same seeds at the same positions it goes on with the tokens that it would have had. Either way the
request that is the reason is found and ends (recovery.py), and the others go on. With several hosts
a step that fails ends the engine, and so the group, which starts again as a whole.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mixtral_jax.checkpoint.adapter import StoredAdapter
from mixtral_jax.step.draws import NO_TOKEN
from serving.engine.adapters import AdapterSlots
from serving.engine.device import Device, Launched, Masks, MaskSource, Order, PutLayer, Walk
from serving.engine.recovery import Suspects
from serving.errors import ModelNotFound
from serving.scheduling.guesses.drafts import Drafter
from serving.scheduling.guesses.guesser import Proposer
from serving.scheduling.partitions import Partitions
from serving.scheduling.request import Drawn, Event, FinishReason, Request, RowDraws, Scored
from serving.scheduling.rhythm import Rhythm
from serving.scheduling.step_plan import Limits, StepPlan

_log = logging.getLogger(__name__)
_NOT_FINITE = (
    "the model's values are not finite (NaN or infinity), so that no token follows from them; the "
    "weights of the model, or of its adapter, are the reason"
)


@dataclass
class _Step:
    """A step that is planned, and then launched."""

    plans: tuple[StepPlan, ...]
    began: float  # time.monotonic()
    launched: Launched | None = None
    masks: Masks | None = None
    is_alone: bool = True  # on the devices, so that its time is its own

    def drawn(self) -> Sequence[Sequence[RowDraws]]:
        """Waits for the step; returns what its chunks drew."""
        assert self.launched is not None
        rows = self.launched.drawn()
        if self.masks is None:
            return rows
        drawn = [list(row) for row in rows]
        for plan, chunk in self.masks.late:
            row = drawn[plan][chunk]
            drawn[plan][chunk] = replace(row, drawn=None) if isinstance(row, Scored) else None
        return drawn


@dataclass
class _Fault:
    """An exception that a step met."""

    step: _Step
    error: Exception


class Engine:
    """Continues requests, a step at a time. Used by one thread, but for `has_room`.

    Args:
        device: computes the steps.
        limits: sizes of the cache and of a step; of one partition, where there are several.
        broadcast: called with each step before it is launched; for several hosts.
        masks: says what rows may draw; None where every row may draw anything.
        proposer: makes what guesses the next tokens of answers; None for no guesses.
        adapters: which the engine has; None for an engine without any.
        put_layer: writes a layer of an adapter into the devices' stacks.
        rhythm: bounds the prompts beside answers, and learns from the times of steps; None for as
            many as a step has room for.
        drafter: guesses the next tokens of answers in place of a proposer; the device has one
            partition then.

    Attributes:
        on_step: called with the number of tokens of each step before it is launched.
    """

    def __init__(
        self,
        device: Device,
        limits: Limits,
        broadcast: Callable[[Order], None] | None = None,
        masks: MaskSource | None = None,
        proposer: Proposer | None = None,
        adapters: AdapterSlots | None = None,
        put_layer: Callable[[PutLayer], None] | None = None,
        rhythm: Rhythm | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.scheduler = Partitions(limits, device.num_partitions, proposer, rhythm, drafter)
        self._drafter = drafter
        self._device = device
        self._broadcast = broadcast
        self._masks = masks
        self.adapters, self._put_layer = adapters, put_layer
        self._open: _Step | None = None  # launched, and not committed
        self._last_drawn = 0.0  # time.monotonic() when the tokens of the last step were there
        self._last_events: list[Event] = []  # of the turn before
        self._suspects = Suspects()
        self.on_step: Callable[[int], None] = lambda num_tokens: None

    @property
    def num_failures(self) -> int:
        """Number of steps that have failed."""
        return self._suspects.num_failures

    def add(self, request: Request) -> None:
        """Queues a request; raises the errors of `Scheduler.add`.

        Raises ModelNotFound if its adapter is not loaded.
        """
        if request.adapter:
            if self.adapters is None:
                raise ModelNotFound(f"The adapter '{request.adapter[:100]}' is not loaded")
            request = self.adapters.seated(request)
        if self._masks is None:
            self.scheduler.add(request)
            return
        request = self._masks.add(request)
        try:
            self.scheduler.add(request)
        except Exception:
            self._masks.forget(request.id)
            raise

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Forgets a request, or one choice of it, and frees its pages; see `Scheduler.cancel`."""
        self.scheduler.cancel(request_id, choice)
        self._suspects.forget(request_id, choice)
        if self._masks is not None:
            self._masks.forget(request_id, choice)

    def load_adapter(self, name: str, stored: StoredAdapter) -> None:
        """Loads an adapter between two steps; see `AdapterSlots.load`."""
        assert self.adapters is not None and self._put_layer is not None, "it has no stacks"
        self.adapters.load(name, stored, self.scheduler.uses_slot, self._put)

    def _put(self, put: PutLayer) -> None:
        if self._broadcast is not None:
            self._broadcast(put)
        assert self._put_layer is not None
        self._put_layer(put)

    def has_room(self, n: int, caller: str) -> bool:
        """Returns True if a request of n choices would be queued now; see `Scheduler.has_room`."""
        return self.scheduler.has_room(n, caller)

    @property
    def has_work(self) -> bool:
        """True if a step would compute something, or events are still to come."""
        return self.scheduler.has_work

    def step(self, now: float = 0.0) -> list[Event]:
        """Launches one step, records the previous one and returns the events of that.

        `now` is time.monotonic(): requests whose deadline is before it end. Raises what a step met
        that cannot be healed.
        """
        events = self.scheduler.expire(now)
        before, self._open = self._open, None
        step = self._plan(before)
        fault: _Fault | None = None
        walked = None
        lost: list[Event] = []
        if step is not None:
            self.on_step(sum(plan.num_tokens for plan in step.plans))
            has_masks = self._masks is not None and self._masks.has_rows(step.plans)
            if self._broadcast is not None:
                self._broadcast(Walk(step.plans) if has_masks else step.plans)
            try:
                if has_masks:
                    walked = self._device.walk(step.plans)
                else:
                    step.launched = self._device.launch(step.plans)
            except Exception as error:
                fault = _Fault(step, error)
        if before is not None:
            try:
                drawn = before.drawn()
            except Exception as error:  # the older step is the reason, also where both have failed
                fault = _Fault(before, error)
            else:
                self._measure(before)
                lost = self._without_tokens(before.plans, drawn)
                events += self.scheduler.commit(before.plans, drawn)
                trusted = self._suspects.passed(before.plans)
                if trusted:
                    self.scheduler.trust(trusted)
        if self._masks is not None:
            self._masks.advance(events)
        events += lost
        if step is not None and fault is None and step.launched is None:
            fault = self._draw(step, walked, events)
        if fault is not None:
            return events + self._recover(fault, step, events)
        self._open, self._last_events = step, events
        return events

    def _plan(self, before: _Step | None) -> _Step | None:
        """Returns the next step, or None if there is nothing to compute now."""
        drafts = 0 if self._drafter is None else self._drafter.num_drafts
        plans = self.scheduler.plan()
        if before is not None and self._drafter is not None:
            before.is_alone = self._drafter.num_drafts == drafts
        return _Step(plans, time.monotonic()) if any(plan.chunks for plan in plans) else None

    def _measure(self, step: _Step) -> None:
        """Tells the scheduler how long a step took that has just ended: no two run at a time."""
        now = time.monotonic()
        if step.is_alone:
            self.scheduler.learn(step.plans, now - max(step.began, self._last_drawn))
        self._last_drawn = now

    def _without_tokens(
        self, plans: Sequence[StepPlan], drawn: Sequence[Sequence[RowDraws]]
    ) -> list[Event]:
        """Ends the requests whose values are not finite; returns their events.

        No token follows from such values, and an adapter with huge ones gives them.
        """
        lost = {
            chunk.request_id
            for plan, draws in zip(plans, drawn, strict=True)
            for chunk, draw in zip(plan.chunks, draws, strict=True)
            if _is_lost(draw)
            if self.scheduler.has(chunk.request_id)  # else it has ended since the plan
        }
        for request_id in sorted(lost):
            _log.error("request %s ends: %s", request_id, _NOT_FINITE)
            self.cancel(request_id)
        return [_failed(request_id, _NOT_FINITE) for request_id in sorted(lost)]

    def _draw(self, step: _Step, walked: object, events: list[Event]) -> _Fault | None:
        """Launches the second part of a step whose rows have masks.

        Adds the events of tokens that are forced, and of requests that cannot go on.
        """
        assert self._masks is not None
        try:
            step.masks = masks = self._masks.masks(step.plans)
            if self._broadcast is not None:
                self._broadcast(masks)
            step.launched = self._device.draw(walked, masks)
        except Exception as error:
            return _Fault(step, error)
        forced = self.scheduler.force(masks.forced)
        self._masks.advance(forced)
        events += forced
        for request_id, problem in masks.failed.items():
            _log.error("request %s ends: %s", request_id, problem)
            self.cancel(request_id)
            events.append(_failed(request_id, problem))
        for request_id, problem in masks.refused.items():
            self.cancel(request_id)
            events.append(replace(_failed(request_id, problem), is_refused=True))
        return None

    def _recover(self, fault: _Fault, newest: _Step | None, events: list[Event]) -> list[Event]:
        """Makes the engine work again after a fault.

        Returns the event of the request that has failed alone. Raises the fault if there is no
        hope.

        Args:
            fault: What has happened.
            newest: The step of this turn, if there is one.
            events: Events of this turn.
        """
        if self._broadcast is not None:
            raise fault.error
        plans = fault.step.plans
        ended = _ended(self._last_events) | _ended(events)
        culprit, suspects = self._suspects.failed(plans, self.scheduler.suspects, ended)
        if self._suspects.is_hopeless:
            raise fault.error
        self.scheduler.suspect(suspects)
        self._suspects.keep(self.scheduler.suspects)  # some have ended since they were planned
        is_unharmed = fault.step is newest and self._device.is_intact()
        num_requests = len({chunk.request_id for plan in plans for chunk in plan.chunks})
        _log.error(
            "a step with %d requests failed%s; %s",
            num_requests,
            "" if is_unharmed else ", and the keys and values of all others are computed again",
            "the others go on" if culprit is None else f"request {culprit} ends, the others go on",
            exc_info=fault.error,
        )
        if is_unharmed:
            self.scheduler.withdraw(plans)
        else:
            self.scheduler.requeue_all()
            self._device.reset()
        if culprit is None:
            return []
        self.cancel(culprit)
        return [_failed(culprit)]


def _is_lost(row: RowDraws) -> bool:
    """Returns True if the values of a row are not finite, which its token or its scores tell."""
    if isinstance(row, Scored):
        return not row.is_finite or _is_lost(row.drawn)
    if isinstance(row, Drawn):
        return row.token_id == NO_TOKEN
    return row is not None and any(draw.token_id == NO_TOKEN for draw in row)


def _failed(request_id: str, problem: str = "") -> Event:
    """Returns the event of a request that has failed alone."""
    return Event(
        request_id=request_id,
        choice=0,
        drawn=None,
        finish_reason=FinishReason.FAILED,
        problem=problem,
    )


def _ended(events: list[Event]) -> set[tuple[str, int]]:
    """Returns the choices, by request and number, that have ended."""
    return {(event.request_id, event.choice) for event in events if event.finish_reason is not None}
