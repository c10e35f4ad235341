"""One ledger for several processes: its limits hold for their sum, and a dead one's are settled."""

import asyncio
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving.access.caller import Caller, CallerLimits
from serving.accounting import ledger_client
from serving.accounting.accounts import Accounts
from serving.accounting.admission import Admission, Lease
from serving.accounting.answer_tokens import AnswerTokens
from serving.accounting.ledger import Usage, UsageLedger
from serving.accounting.ledger_client import SharedAccounts
from serving.accounting.ledger_server import LedgerServer
from serving.accounting.rate_limits import RateLimits
from serving.errors import InvalidRequest, Overloaded, SetupError, Unavailable
from serving.proto import inference_pb2 as pb

ME = Caller("me")
FREE = Caller("free")


class House:
    """Accounts, their server, and processes that use them."""

    def __init__(self) -> None:
        # What is limited is limited by the caller's key.
        self.accounts = Accounts(RateLimits(clock=lambda: 1000.0), UsageLedger())
        self.server = LedgerServer(self.accounts)
        self.processes: list[SharedAccounts] = []

    def process(self, charge: float = 1.0) -> Admission:
        accounts = SharedAccounts(self.server.address, RateLimits())
        self.processes.append(accounts)
        return Admission(accounts, 100, charge)

    def used(self, caller: str = "me") -> list[tuple[int, int, int, int]]:
        rows = asyncio.run(self.processes[-1].report(caller))
        return [
            (row.requests, row.prompt_tokens, row.completion_tokens, row.cached_tokens)
            for row in rows
        ]


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    # An answer must not be late because the machine is busy.
    monkeypatch.setattr(ledger_client, "_SECONDS", 20.0)
    made = House()
    yield made
    for process in made.processes:
        process.close()
    made.server.close()
    made.accounts.close()


def key(
    requests: int | None = None, tokens: int | None = None, running: int | None = None
) -> Caller:
    return Caller("me", limits=CallerLimits(requests, tokens, running))


def soon(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def asked(max_tokens: int, n: int = 1) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 10), max_tokens=max_tokens, n=n)


def answer(lease: Lease, tokens: int, cached: int = 0) -> AnswerTokens:
    """Counts an answer of so many tokens to a prompt of ten."""
    counts = AnswerTokens()
    lease.follow([counts])
    counts.add(pb.GenerateChunk(prompt_tokens=10, cached_tokens=cached))
    for _ in range(tokens):
        counts.add(pb.GenerateChunk(token_ids=[1]))
    return counts


def test_a_limit_of_requests_is_exact_over_processes(house: House) -> None:
    caller = key(requests=5)
    one, two = house.process(), house.process()
    for admission in (one, two, one, two, two):
        admission.begin(caller).settle()
    for admission in (one, two):
        with pytest.raises(Overloaded, match="5 requests a minute") as refused:
            admission.begin(caller)
        assert refused.value.retry_after == 12
        assert admission.headers(caller)["x-ratelimit-remaining-requests"] == "0"


def test_requests_at_a_time_and_tokens_are_shared(house: House) -> None:
    caller = key(tokens=100, running=2)
    one, two = house.process(), house.process()
    first, second = one.begin(caller), two.begin(caller)
    with pytest.raises(Overloaded, match="2 requests at a time"):
        two.begin(caller)
    first.reserve([asked(50)], 1000)
    with pytest.raises(Overloaded, match="100 tokens a minute"):
        second.reserve([asked(50)], 1000)
    assert two.headers(caller)["x-ratelimit-remaining-tokens"] == "40"
    second.settle()
    with pytest.raises(InvalidRequest, match="200 tokens, and"):
        two.begin(caller).reserve([asked(190)], 1000)

    async def run() -> None:  # a task passes the counts on
        first.settle([answer(first, 7)])

    asyncio.run(run())
    soon(lambda: one.headers(caller)["x-ratelimit-remaining-tokens"] == "83")
    assert house.used() == [(1, 10, 7, 0)]


def test_a_dead_process_is_settled_as_far_as_it_has_answered(house: House) -> None:
    caller = key(tokens=1000, running=2)
    dying, other = house.process(charge=0.5), house.process()

    async def run() -> None:
        begun, idle = dying.begin(caller), dying.begin(caller)
        begun.reserve([asked(500)], 1000)
        idle.reserve([asked(20)], 1000)
        answer(begun, 3, cached=4)
        await asyncio.sleep(0)  # a token is told before a task sends it on
        with pytest.raises(Overloaded, match="2 requests at a time"):
            other.begin(caller)
        house.processes[0]._connection.close()  # type: ignore[union-attr]

    asyncio.run(run())

    def is_free() -> bool:
        try:
            other.begin(caller).settle()
        except Overloaded:
            return False
        return True

    soon(is_free)
    assert house.used() == [(1, 10, 3, 4)]
    # 10 of the prompt, of which 4 count half, and 3 of the answer.
    assert other.headers(caller)["x-ratelimit-remaining-tokens"] == str(1000 - 11)


def test_callers_without_limits_are_written_down_by_whoever_answers(house: House) -> None:
    one, two = house.process(), house.process()

    async def run() -> None:
        for admission, tokens in ((one, 2), (two, 3)):
            lease = admission.begin(FREE)
            lease.reserve([asked(9), asked(9)], 1000)
            lease.settle(_two(lease, tokens))

    asyncio.run(run())
    soon(lambda: house.used("free") == [(2, 40, 10, 0)])
    assert one.headers(FREE) == {}
    everybody = asyncio.run(house.processes[0].report(None))
    assert [type(row) for row in everybody] == [Usage]


def _two(lease: Lease, tokens: int) -> list[AnswerTokens]:
    counts = [AnswerTokens(), AnswerTokens()]
    lease.follow(counts)
    for each in counts:
        each.add(pb.GenerateChunk(prompt_tokens=10))
        for _ in range(tokens):
            each.add(pb.GenerateChunk(token_ids=[1]))
    return counts


def test_without_the_ledger_everybody_is_refused(house: House) -> None:
    one, two = house.process(), house.process()
    lease = one.begin(ME)
    house.server.close()
    for caller in (FREE, key(requests=5)):
        with pytest.raises(Unavailable, match="ledger is gone"):
            for _ in range(2):  # the first message may still go into the socket
                two.begin(caller)
    lease.settle()
    assert two.headers(key(requests=5)) == {}
    with pytest.raises(Unavailable):
        asyncio.run(house.processes[0].report(None))
    with pytest.raises(SetupError, match="cannot be reached"):
        house.process()
    house.server = LedgerServer(house.accounts)


def test_only_the_user_reaches_the_socket(house: House) -> None:
    folder = Path(house.server.address).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_nonsense_ends_one_process_alone(house: House) -> None:
    good, bad = house.process(), house.process()
    house.processes[1].tell("what is this")
    with pytest.raises(Unavailable):
        bad.begin(key(requests=5))
    good.begin(key(requests=5)).settle()
