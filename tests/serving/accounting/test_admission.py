"""Admission: tokens are reserved before they are computed, and what was computed is charged."""

import asyncio
from collections.abc import Iterator

import pytest

from serving.access.caller import Caller, CallerLimits
from serving.accounting.accounts import Accounts
from serving.accounting.admission import Admission, duration, estimate, headers_of
from serving.accounting.answer_tokens import AnswerTokens
from serving.accounting.ledger import UsageLedger
from serving.accounting.rate_limits import Allowance, RateLimits
from serving.errors import InvalidRequest, Overloaded
from serving.proto import inference_pb2 as pb

ME = Caller("me")
CONTEXT = 1000


class Desk:
    """An admission with a clock that stands still, and what it has written down."""

    def __init__(
        self,
        requests: int | None = None,
        tokens: int | None = None,
        running: int | None = None,
        assumed: int = 100,
        charge: float = 1.0,
    ) -> None:
        self.rates = RateLimits(CallerLimits(requests, tokens, running), clock=lambda: 1000.0)
        self.accounts = Accounts(self.rates, UsageLedger())
        self.admission = Admission(self.accounts, assumed, charge)

    @property
    def tokens(self) -> int:
        return self.rates.allowances(ME)["tokens"].remaining

    @property
    def written(self) -> list[tuple[int, int, int, int]]:
        """Requests, and tokens of prompts, answers and caches."""
        return [
            (row.requests, row.prompt_tokens, row.completion_tokens, row.cached_tokens)
            for row in asyncio.run(self.accounts.report("me"))
        ]


@pytest.fixture
def desks() -> Iterator[list[Desk]]:
    made: list[Desk] = []
    yield made
    for desk in made:
        desk.accounts.close()


def ids(count: int, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * count), **fields)


def answered(*chunks: pb.GenerateChunk) -> AnswerTokens:
    tokens = AnswerTokens()
    for chunk in chunks:
        tokens.add(chunk)
    return tokens


def chunk(tokens: int = 0, **fields: object) -> pb.GenerateChunk:
    return pb.GenerateChunk(token_ids=[1] * tokens, **fields)


def end(prompt: int, answer: int, cached: int) -> pb.GenerateChunk:
    usage = pb.Usage(prompt_tokens=prompt, completion_tokens=answer, cached_tokens=cached)
    return pb.GenerateChunk(finish_reason=pb.FINISH_REASON_STOP, usage=usage)


def test_a_lease_reserves_all_that_it_may_become(desks: list[Desk]) -> None:
    desks.append(desk := Desk(tokens=100))
    lease = desk.admission.begin(ME)
    lease.reserve([ids(10, n=2, max_tokens=20)], CONTEXT)
    assert desk.tokens == 100 - 10 - 2 * 20
    other = desk.admission.begin(ME)
    with pytest.raises(Overloaded, match="100 tokens a minute"):
        other.reserve([ids(11, n=2, max_tokens=20)], CONTEXT)
    other.settle()
    assert desk.tokens == 50
    lease.settle([answered(chunk(3, prompt_tokens=10), chunk(4))])
    assert desk.tokens == 100 - 10 - 7
    assert desk.written == [(1, 10, 7, 0)]
    lease.settle([answered(chunk(3, prompt_tokens=10))])  # once is enough
    assert desk.written == [(1, 10, 7, 0)]


def test_the_estimate_of_a_prompt_is_corrected_by_the_opening_chunk(desks: list[Desk]) -> None:
    desks.append(desk := Desk(tokens=100))
    asked = pb.GenerateRequest(text="x" * 40, max_tokens=5)  # 11 tokens, by estimate
    assert estimate(asked) == 11
    lease = desk.admission.begin(ME)
    lease.reserve([asked], CONTEXT)
    assert desk.tokens == 100 - 11 - 5
    tokens = AnswerTokens()
    lease.follow([tokens])
    tokens.add(chunk(prompt_tokens=40))
    assert desk.tokens == 100 - 40 - 5
    tokens.add(chunk(2))
    lease.settle([tokens])
    assert desk.tokens == 100 - 40 - 2
    tokens.add(chunk(1))  # comes too late to count
    assert desk.tokens == 100 - 40 - 2


def test_estimates_grow_with_the_bytes() -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="é" * 400)])
    assert 800 // 4 < estimate(pb.GenerateRequest(chat=chat)) < 800 // 4 + 10
    assert estimate(pb.GenerateRequest(text="é" * 400)) == 201
    assert estimate(ids(7)) == 7
    assert estimate(pb.GenerateRequest()) == 1


@pytest.mark.parametrize(
    ("call", "reserved"),
    [
        (ids(10), 10 + 100),  # nothing is said: the assumed number
        (ids(950), 950 + 50),  # the context holds no more
        (ids(10, max_tokens=5000), 10 + 990),
        (ids(990, n=3), 990 + 3 * 10),
        (ids(2000, max_tokens=7), 2000 + 1),  # it will be refused
    ],
)
def test_the_context_caps_a_reservation(
    desks: list[Desk], call: pb.GenerateRequest, reserved: int
) -> None:
    desks.append(desk := Desk(tokens=10_000))
    desk.admission.begin(ME).reserve([call], CONTEXT)
    assert desk.tokens == 10_000 - reserved


def test_what_exceeds_the_whole_minute_is_refused_for_good(desks: list[Desk]) -> None:
    desks.append(desk := Desk(tokens=50))
    for calls in ([ids(10, max_tokens=41)], [ids(10, max_tokens=20)] * 2, [ids(50)]):
        with pytest.raises(InvalidRequest, match="50 tokens a minute") as refusal:
            desk.admission.begin(ME).reserve(calls, CONTEXT)
        assert refusal.value.retry_after is None
    # Who sets no max_tokens has not asked for so many: the whole minute is reserved.
    desk.admission.begin(ME).reserve([ids(10)], CONTEXT)
    assert desk.tokens == 0


def test_several_prompts_are_several_requests(desks: list[Desk]) -> None:
    desks.append(desk := Desk(requests=16, running=16))
    lease = desk.admission.begin(ME)
    lease.reserve([ids(1)] * 16, CONTEXT)
    with pytest.raises(Overloaded):
        desk.admission.begin(ME)
    assert desk.rates.allowances(ME)["requests"].remaining == 0
    lease.settle([answered(chunk(1, prompt_tokens=1))] * 16)
    assert desk.rates._running == {}
    assert desk.written == [(1, 16, 16, 0)]


def test_prompts_that_wait_are_requests_that_do_not_run(desks: list[Desk]) -> None:
    """All are counted and reserved from the first, but so many run at a time as are asked."""
    desks.append(desk := Desk(requests=100, tokens=1000, running=20))
    lease = desk.admission.begin(ME)
    lease.reserve([ids(2, max_tokens=6)] * 100, CONTEXT, 16)
    assert desk.rates.allowances(ME)["requests"].remaining == 0
    assert desk.tokens == 200 and desk.rates._running == {ME.name: 16}
    lease.settle([answered(chunk(1, prompt_tokens=2))] * 100)
    assert desk.rates._running == {} and desk.tokens == 700
    with pytest.raises(InvalidRequest, match="100 prompts, and this key may have 20 requests"):
        Desk(running=20).admission.begin(ME).reserve([ids(1)] * 100, CONTEXT, 21)


def test_thirty_two_at_once_get_one_minute_of_tokens(desks: list[Desk]) -> None:
    desks.append(desk := Desk(tokens=50))
    leases = []
    for _ in range(32):
        lease = desk.admission.begin(ME) if desk.tokens else None
        if lease is None:
            with pytest.raises(Overloaded):
                desk.admission.begin(ME)
            continue
        try:
            lease.reserve([ids(4, max_tokens=8)], CONTEXT)
            leases.append(lease)
        except Overloaded:
            lease.settle()
    assert len(leases) == 50 // 12
    for lease in leases:
        lease.settle([answered(chunk(8, prompt_tokens=4))])
    assert desk.written == [(4, 16, 32, 0)]


@pytest.mark.parametrize(
    ("chunks", "written"),
    [
        ([], []),
        ([chunk(prompt_tokens=90)], []),  # it waited in the queue
        ([chunk(prompt_tokens=90), chunk(computed_tokens=32)], [(1, 32, 0, 0)]),
        (
            [chunk(prompt_tokens=90), chunk(computed_tokens=32), chunk(computed_tokens=64)],
            [(1, 64, 0, 0)],
        ),
        ([chunk(prompt_tokens=90), chunk(computed_tokens=32), chunk(2)], [(1, 90, 2, 0)]),
        # Whoever leaves early is told of the cached tokens before the end.
        (
            [chunk(prompt_tokens=90), chunk(computed_tokens=64, cached_tokens=48)],
            [(1, 64, 0, 48)],
        ),
        ([chunk(prompt_tokens=90), chunk(2, cached_tokens=80)], [(1, 90, 2, 80)]),
        (
            [
                chunk(prompt_tokens=90),
                chunk(2),
                end(90, 3, 80),
            ],
            [(1, 90, 3, 80)],
        ),
    ],
)
def test_what_was_computed_is_charged(
    desks: list[Desk],
    chunks: list[pb.GenerateChunk],
    written: list[tuple[int, int, int, int]],
) -> None:
    desks.append(desk := Desk(tokens=1000))
    lease = desk.admission.begin(ME)
    lease.reserve([ids(90, max_tokens=10)], CONTEXT)
    lease.settle([answered(*chunks)])
    assert desk.written == written
    assert desk.tokens == 1000 - sum(prompt + answer for _, prompt, answer, _ in written)


@pytest.mark.parametrize(("charge", "taken"), [(1.0, 93), (0.5, 53), (0.0, 13)])
def test_cached_tokens_cost_what_the_operator_says(
    desks: list[Desk], charge: float, taken: int
) -> None:
    desks.append(desk := Desk(tokens=1000, charge=charge))
    lease = desk.admission.begin(ME)
    lease.reserve([ids(90, max_tokens=10)], CONTEXT)
    lease.settle([answered(chunk(3, prompt_tokens=90), end(90, 3, 80))])
    assert desk.tokens == 1000 - taken
    assert desk.written == [(1, 90, 3, 80)]


def test_headers_in_openais_words() -> None:
    allowances = {
        "requests": Allowance(limit=60, remaining=59, reset=1.0),
        "tokens": Allowance(limit=150_000, remaining=149_984, reset=0.006),
    }
    assert headers_of(allowances) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "150000",
        "x-ratelimit-remaining-tokens": "149984",
        "x-ratelimit-reset-tokens": "6ms",
    }
    times = {0: "0s", 0.12: "120ms", 1.5: "1.5s", 59.9996: "1m0s", 360: "6m0s", 61.25: "1m1.25s"}
    assert {seconds: duration(seconds) for seconds in times} == times
