"""Whatever is preempted, reused, forked, withdrawn or lost: answers are those of a plain loop."""

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtral_jax.sampling_params import SamplingParams
from serving.errors import ContextTooLong
from serving.scheduling import preemption, queue, sequence
from serving.scheduling.request import FinishReason, Priority, Request
from serving.scheduling.scheduler import Scheduler
from serving.scheduling.step_plan import Limits
from tests.serving.scheduling.plain_device import END, VOCABULARY, Device, drive, limits


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    """Prompts that often begin like others."""
    kind, shared, own = (draw(st.integers(0, top)) for top in (1, 14, 6))
    head = tuple(100 * (kind + 1) + i for i in range(shared))
    return (*head, *draw(st.lists(st.integers(10, 11), min_size=own or 1, max_size=own or 1)))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Limits, list[Request], Random]:
    window = draw(st.sampled_from([None, None, 1, 3, 5, 9]))
    size = limits(
        num_pages=draw(st.integers(4, 14)),
        page_size=draw(st.sampled_from([1, 2, 4])),
        max_sequences=draw(st.integers(1, 4)),
        max_step_tokens=draw(st.integers(4, 20)),
        max_waiting=1000,
        window=window,
        prefix_reuse=draw(st.booleans()),
    )
    requests = [
        Request(
            id=str(number),
            prompt_ids=draw(prompts()),
            sampling=SamplingParams(
                seed=draw(st.integers(0, 3)),
                repetition_penalty=draw(st.sampled_from([1.0, 1.1])),
            ),
            max_tokens=draw(st.integers(1, 20)),
            min_tokens=draw(st.sampled_from([0, 0, 4])),
            eos_ids=frozenset(draw(st.sampled_from([(), (END,), (END, 1)]))),
            n=draw(st.sampled_from([1, 1, 2, 3])),
            deadline=draw(st.sampled_from([None, None, None, 5.0, 30.0])),
            caller=draw(st.sampled_from("AAB")),
            salt=draw(st.sampled_from([b"", b"", b"x"])),
            priority=draw(st.sampled_from([Priority.INTERACTIVE] * 3 + [Priority.BATCH])),
        )
        for number in range(draw(st.integers(1, 8)))
    ]
    return size, requests, Random(draw(st.integers(0, 2**32)))


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers take turns so often that these short answers show it."""
    monkeypatch.setattr(preemption, "LEAD", 3)
    monkeypatch.setattr(sequence, "SLICE", 2)
    monkeypatch.setattr(queue, "CREDIT", 4)
    monkeypatch.setattr(queue, "BATCH_TURN", 3)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    worlds(),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.0, 0.05]),
    st.sampled_from([0.0, 0.0, 0.05, 0.2]),
)
def test_every_answer_is_that_of_the_plain_loop(
    world: tuple[Limits, list[Request], Random],
    pipelining: float,
    cancelling: float,
    failing: float,
) -> None:
    """Whatever is preempted, reused, forked, cut into chunks or planned ahead: each token sees all
    of its own history and nothing else, every answer is whole, and no page is lost."""
    size, requests, coin = world
    scheduler, left, cancelled = Scheduler(size), list(requests), set[str]()
    device = Device(size, requests, chosen(requests, coin, failing))
    refused = {one.id for one in requests if len(one.prompt_ids) >= size.room}

    def between() -> None:
        # First, so that there is work for as long as any request is left.
        if coin.random() < cancelling:
            name = coin.choice(requests).id
            cancelled.add(name)
            scheduler.cancel(name)
        while left and (coin.random() < 0.3 or not scheduler.has_work):
            one = left.pop()
            if one.id in refused:
                with pytest.raises(ContextTooLong):
                    scheduler.add(one)
            else:
                scheduler.add(one)

    def trouble() -> str | None:
        return coin.choice(["unstarted", "lost"]) if coin.random() < failing else None

    def without() -> tuple[str, ...]:
        return tuple(one.id for one in requests if coin.random() < failing)

    between()
    goes_on = lambda: coin.random() < pipelining  # noqa: E731
    events = drive(scheduler, device, goes_on, between, trouble, without)
    computed: dict[str, int] = {}
    answers: dict[tuple[str, int], tuple[int, ...]] = {}
    reasons: dict[tuple[str, int], FinishReason] = {}
    for event in events:
        key = event.request_id, event.choice
        assert key not in reasons, "something happened after the end"
        prompt = len(requests[int(event.request_id)].prompt_ids)
        assert 0 <= event.cached < prompt
        if event.drawn is not None:
            assert event.computed == prompt
            answers[key] = (*answers.get(key, ()), event.drawn.token_id)
        elif event.finish_reason is None:  # a part of the prompt
            assert key not in answers and event.cached < event.computed < prompt
            assert event.computed > computed.get(event.request_id, 0)
            computed[event.request_id] = event.computed
        if event.finish_reason is not None:
            reasons[key] = event.finish_reason
    for one in requests:
        for choice in range(one.n):
            key = one.id, choice
            whole = device.full[key][len(one.prompt_ids) :]
            answer, reason = answers.get(key, ()), reasons.get(key)
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert answer == whole
                assert (reason is FinishReason.STOP) == (whole[-1] in one.eos_ids)
            else:
                assert answer == whole[: len(answer)]
                assert one.id in cancelled | refused or reason is FinishReason.DEADLINE
    for plan in device.plans:
        assert plan.num_tokens <= size.max_step_tokens
        assert len(plan.chunks) <= size.max_sequences
        singles = [len(chunk.token_ids) == 1 for chunk in plan.chunks]
        assert singles == sorted(singles, reverse=True)
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.num_free_pages == size.num_pages
    assert_known_pages_are_what_they_say(scheduler, device)


def chosen(requests: list[Request], coin: Random, share: float) -> dict[tuple[str, int, int], int]:
    """Tokens that are forced, at a share of all places, and half of the places behind such."""
    tokens: dict[tuple[str, int, int], int] = {}
    for one in requests:
        for choice in range(one.n):
            is_forced = False
            for i in range(one.max_tokens):
                is_forced = coin.random() < (0.5 if is_forced else share)
                if is_forced and not (i < one.min_tokens and 1 in one.eos_ids):
                    place = one.id, choice, len(one.prompt_ids) + i
                    tokens[place] = coin.randrange(1, VOCABULARY)
    return tokens


def assert_known_pages_are_what_they_say(scheduler: Scheduler, device: Device) -> None:
    for (name, _), full in device.full.items():
        salt = device.salts[name]
        pages, _ = scheduler._pool.match(full, salt)
        for i, page in enumerate(pages):
            for place in range(scheduler.limits.page_size):
                position = i * scheduler.limits.page_size + place
                assert device.pages[page][place] == (salt, full[: position + 1])
