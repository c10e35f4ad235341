"""Callers beside each other on the real scheduler: nobody waits for another's whole answers."""

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from mixtral_jax.sampling_params import SamplingParams
from serving.scheduling.request import Drawn, Priority, Request
from serving.scheduling.scheduler import Scheduler
from serving.scheduling.step_plan import Limits, StepPlan
from tests.serving.scheduling.plain_device import check_counts, with_rows

TOKEN = Drawn(token_id=7)


def limits(**changes: int) -> Limits:
    sizes = dict(
        num_pages=4000,
        page_size=16,
        max_sequences=32,
        max_step_tokens=512,
        max_context=4096,
        max_waiting=100_000,
    )
    return Limits(**{**sizes, **changes})  # type: ignore[arg-type]


def ask(
    name: str,
    caller: str,
    prompt: int,
    max_tokens: int,
    n: int = 1,
    priority: Priority = Priority.INTERACTIVE,
) -> Request:
    ids = Random(name).choices(range(30_000), k=prompt)
    return Request(
        id=name,
        caller=caller,
        salt=caller.encode(),
        prompt_ids=tuple(ids),
        sampling=SamplingParams(seed=1),
        max_tokens=max_tokens,
        n=n,
        eos_ids=frozenset(),
        priority=priority,
    )


class Served:
    """Steps a scheduler as the engine does, the next plan before the commit, and counts."""

    def __init__(self, **changes: int) -> None:
        self.scheduler = Scheduler(limits(**changes))
        self.steps = 0
        self.first = dict[str, int]()  # the step in which a request's first token was drawn
        self.tokens = Counter[str]()  # computed, by caller
        self._callers = dict[str, str]()
        self._open: StepPlan | None = None

    def add(self, *requests: Request) -> None:
        for request in requests:
            self._callers[request.id] = request.caller
            self.scheduler.add(request)

    def step(self, times: int = 1) -> StepPlan:
        plan = StepPlan(chunks=())
        for _ in range(times):
            self.steps += 1
            plan = self.scheduler.plan()
            for chunk in plan.chunks:
                self.tokens[self._callers[chunk.request_id]] += len(chunk.token_ids)
                if chunk.samples:
                    self.first.setdefault(chunk.request_id, self.steps)
            if self._open is not None:
                drawn = [TOKEN if chunk.samples else None for chunk in self._open.chunks]
                self.scheduler.commit(self._open, drawn)
                check_counts(self.scheduler)
            self._open = plan if plan.chunks else None
        return plan

    def steps_to_first(self, name: str) -> int:
        begin = self.steps
        while name not in self.first:
            self.step()
        return self.first[name] - begin


@pytest.mark.parametrize("steps", [0, 1, 7, 200])
@pytest.mark.parametrize("pages", [4000, 300])
@pytest.mark.parametrize(("theirs", "own"), [(100, 20), (1000, 20), (1000, 1000)])
def test_a_caller_beside_one_with_512_choices(
    theirs: int, own: int, pages: int, steps: int
) -> None:
    alone, beside = Served(num_pages=pages), Served(num_pages=pages)
    alone.add(ask("bob", "bob", own, 5))
    beside.add(*(ask(f"alice{i}", "alice", theirs, 400, n=16) for i in range(32)))
    beside.step(steps)
    beside.add(ask("bob", "bob", own, 5))
    assert beside.steps_to_first("bob") <= alone.steps_to_first("bob") + 4


def same(caller: int, dice: Random) -> tuple[int, int, int]:
    return 100, 100, 1


def mixed(caller: int, dice: Random) -> tuple[int, int, int]:
    return dice.randrange(10, 400), dice.randrange(5, 300), 1


def by_caller(caller: int, dice: Random) -> tuple[int, int, int]:
    """Half the callers send long prompts for short answers, the others the other way round."""
    return (400, 20, 1) if caller % 2 else (20, 400, 1)


def choices(caller: int, dice: Random) -> tuple[int, int, int]:
    return dice.randrange(10, 200), dice.randrange(5, 100), (1, 4, 16)[caller % 3]


@pytest.mark.parametrize("shape", [same, mixed, by_caller, choices])
def test_8_callers_are_served_alike(shape: Callable[[int, Random], tuple[int, int, int]]) -> None:
    """Over 1,000 steps, however many requests wait and however long they are."""
    served, dice = Served(), Random(5)
    for caller in range(8):
        for number in range(200 + 30 * caller):
            prompt, max_tokens, n = shape(caller, dice)
            served.add(ask(f"{caller}-{number}", str(caller), prompt, max_tokens, n))
    served.step(1000)
    tokens = served.tokens.values()
    assert len(tokens) == 8 and max(tokens) <= 1.1 * min(tokens)


def test_more_callers_than_rows_go_on_in_turns() -> None:
    """40 callers with one endless answer each on 8 rows: no row is one caller's until its end."""
    served = Served(max_sequences=8, max_step_tokens=64)
    served.add(*(ask(str(i), str(i), 10, 3000) for i in range(40)))
    served.step(2000)
    assert len(served.first) == 40
    assert max(served.tokens.values()) - min(served.tokens.values()) < 2000 * 8 / 40 / 2


def test_a_long_prompt_delays_no_answer() -> None:
    """Each step still draws a token for each answer, and computes no more than it may."""
    served = Served(max_sequences=8, max_step_tokens=32)
    served.add(*(ask(f"bob{i}", "bob", 4, 500) for i in range(4)))
    served.step(3)
    served.add(*(ask(f"alice{i}", "alice", 3000, 1) for i in range(2)))
    for _ in range(100):
        plan = served.step()
        assert sum(c.request_id.startswith("bob") for c in plan.chunks if c.samples) == 4
        assert plan.num_tokens <= 32


def test_prompts_of_two_callers_share_a_step() -> None:
    served = Served(max_step_tokens=64)
    served.add(*(ask(f"alice{i}", "alice", 1000, 1) for i in range(9)), ask("b", "bob", 1000, 1))
    served.step(10)
    assert served.tokens == {"alice": 320, "bob": 320}


def test_interactive_goes_before_batch() -> None:
    """Whether it waits or has a row; of one caller, too."""
    served = Served(max_sequences=2)
    served.add(*(ask(f"b{i}", "bob", 10, 500, priority=Priority.BATCH) for i in range(3)))
    served.step(5)
    served.add(*(ask(f"i{i}", "bob", 10, 500) for i in range(2)))
    served.step()
    assert with_rows(served.scheduler) == ["i0", "i1"]
    assert served.scheduler.preemptions == 2


def test_interactive_goes_before_the_batch_of_its_own_caller() -> None:
    served = Served(max_sequences=2)
    served.add(*(ask(f"b{i}", "bob", 10, 500, priority=Priority.BATCH) for i in range(2)))
    served.step(5)
    served.add(ask("i", "bob", 10, 500))
    served.step()
    assert with_rows(served.scheduler) == ["b0", "i"]


def test_batch_never_waits_for_ever() -> None:
    """One in 32 rows is given to it, and it keeps the row for a slice at least."""
    served = Served(max_sequences=1)
    served.add(ask("batch", "bob", 10, 40, priority=Priority.BATCH))
    served.add(*(ask(str(i), "alice", 10, 2) for i in range(1000)))
    served.step(3 * 32)
    assert served.first.keys() - {str(i) for i in range(31)} == {"batch"}


def test_a_prefix_is_found_under_its_salt_only() -> None:
    scheduler = Scheduler(limits())
    prompt = tuple(range(100))

    def hits(salt: bytes) -> int:
        before = scheduler.prefix_hit_tokens
        scheduler.add(
            Request(
                id="x",
                prompt_ids=prompt,
                sampling=SamplingParams(),
                max_tokens=1,
                eos_ids=frozenset(),
                salt=salt,
            )
        )
        plan = scheduler.plan()
        (event,) = scheduler.commit(plan, [TOKEN])
        assert event.cached == scheduler.prefix_hit_tokens - before
        assert event.computed == 100
        return event.cached

    assert [hits(salt) for salt in (b"", b"a", b"b", b"", b"a", b"b")] == [0, 0, 0, 96, 96, 96]


def test_what_waits_for_pages_asks_again_when_there_are_more() -> None:
    """B needs 5 pages of the 8: it is looked for in the cache once, not in each plan."""
    scheduler = Scheduler(limits(num_pages=8, max_context=128))
    scheduler.add(ask("A", "a", 60, 20))
    plan = scheduler.plan()
    scheduler.add(ask("B", "a", 70, 1))
    lookups = 0
    lookup = scheduler._pool.lookup

    def counted(tokens: list[int], salt: bytes) -> tuple[list[int], list[int]]:
        nonlocal lookups
        lookups += 1
        return lookup(tokens, salt)

    scheduler._pool.lookup = counted  # type: ignore[method-assign, assignment]
    for _ in range(19):
        scheduler.commit(plan, [TOKEN])
        plan = scheduler.plan()
    assert (scheduler.num_waiting, lookups) == (1, 1)
    scheduler.commit(plan, [TOKEN])
    assert [chunk.request_id for chunk in scheduler.plan().chunks] == ["B"]
    assert lookups == 2
