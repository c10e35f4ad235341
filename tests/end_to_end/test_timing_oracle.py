"""The time to a first token tells nobody what another caller has asked."""

import statistics
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.bystander import ATTACKER, BYSTANDER, Endpoint, endpoint

pytestmark = pytest.mark.soak
TRIES = 200
WORDS = 450  # of a document, whose prompt has 3,000 tokens or so


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with endpoint(tmp_path_factory.mktemp("oracle"), "--max-sequences", "4") as server:
        yield server


def document(number: int) -> str:
    """A text that differs from all others from its first word on."""
    return " ".join(f"{number * 7919 % 10007}-{place}" for place in range(WORDS))


def seconds(client: httpx.Client, text: str) -> float:
    """Returns the seconds to the end of an answer of one token."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "ignore_eos": True}
    began = time.monotonic()
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return time.monotonic() - began


def test_what_another_has_asked_takes_as_long_as_what_nobody_has(server: Endpoint) -> None:
    """The 95 % interval of the mean difference lies within 3 % of the mean."""
    differences, unseen, own = [], [], []
    with server.client(ATTACKER) as alice, server.client(BYSTANDER) as bob:
        for number in range(TRIES):
            hers, nobodys = document(2 * number), document(2 * number + 1)
            seconds(alice, hers)
            times = {}
            # In turn, so that neither is always the later one.
            for text in (hers, nobodys) if number % 2 else (nobodys, hers):
                times[text] = seconds(bob, text)
            differences.append(times[hers] - times[nobodys])
            unseen.append(times[nobodys])
            own.append(seconds(bob, hers))
    mean = statistics.fmean(unseen)
    middle = statistics.fmean(differences)
    margin = 1.96 * statistics.stdev(differences) / TRIES**0.5
    print(
        f"unseen {mean:.4f} s; another's {(middle - margin) / mean:+.2%} to "
        f"{(middle + margin) / mean:+.2%}; one's own {statistics.fmean(own) / mean:.3f}"
    )
    assert abs(middle) + margin <= 0.03 * mean
    assert statistics.fmean(own) < 0.3 * mean
