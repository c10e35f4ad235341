"""Places of connections: who gets one, and who makes room."""

import logging

import pytest

from serving.gateway.http.connections import Connections, Place
from serving.gateway.http.limits import HttpError, HttpLimits
from serving.gateway.http.metrics import GatewayMetrics

ALICE, BOB, CAROL = "192.0.2.1", "192.0.2.2", "192.0.2.3"


class Places:
    """Connections, of which `ended` made room for others."""

    def __init__(self, total: int, per_address: int, *proxies: str) -> None:
        limits = HttpLimits(
            max_connections=total,
            max_connections_per_address=per_address,
            forwarded_allow_ips=proxies,
        )
        self.metrics = GatewayMetrics()
        self.connections = Connections(limits, self.metrics, limits.proxies())
        self.ended: list[str] = []

    def take(self, address: str, name: str = "", *, is_busy: bool = False) -> Place | None:
        place = self.connections.take(address, lambda: self.ended.append(name))
        if place is not None and is_busy:
            place.work()
        return place

    def counted(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"mixtral_gateway_{name}", labels)


def test_the_connection_that_waits_longest_makes_room() -> None:
    places = Places(3, 3)
    first, second = places.take(ALICE, "first"), places.take(BOB, "second")
    assert first is not None and second is not None
    first.work()
    first.wait()  # since now
    assert places.take(ALICE, "third") and places.take(CAROL, "fourth")
    assert places.ended == ["second"]
    second.leave()  # its end arrives later, and counts once
    assert len(places.connections) == 3
    assert places.take(BOB, "fifth")
    assert places.ended == ["second", "first"]
    assert places.counted("ended_idle_connections_total") == 2
    assert places.counted("open_connections") == 3


def test_busy_connections_make_no_room() -> None:
    places = Places(2, 2)
    busy = [places.take(name, is_busy=True) for name in (ALICE, BOB)]
    assert places.take(CAROL) is None
    assert places.counted("refused_connections_total", reason="total") == 1
    assert busy[0] is not None
    busy[0].wait()
    assert places.take(CAROL)


def test_an_address_has_a_limit_of_its_own() -> None:
    places = Places(100, 2)
    for name in "ab":
        assert places.take(ALICE, name)
    bob = places.take(BOB, "bob")
    assert places.take(ALICE, "c", is_busy=True) and places.take(ALICE, "d", is_busy=True)
    assert places.ended == ["a", "b"]  # its own, and not bob's, who waits as well
    assert places.take(ALICE) is None
    assert places.counted("refused_connections_total", reason="address") == 1
    assert bob is not None and len(places.connections) == 3


def test_an_address_of_one_place_takes_turns_with_itself() -> None:
    places = Places(1, 1)
    for name in "abc":
        assert places.take(ALICE, name)
        assert len(places.connections) == 1
    assert places.ended == ["a", "b"]


@pytest.mark.parametrize(
    ("first", "second", "are_one"),
    [
        ("2001:db8::1", "2001:db8:0:0:ffff::2", True),  # one network /64
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("", "", True),
    ],
)
def test_addresses_of_one_client(first: str, second: str, are_one: bool) -> None:
    places = Places(100, 1)
    assert places.take(first, is_busy=True)
    assert (places.take(second) is None) == are_one


def test_proxies_have_no_limit_of_their_own() -> None:
    places = Places(3, 1, "192.0.2.0/31")
    assert places.take(ALICE, is_busy=True) and places.take(ALICE, is_busy=True)
    assert places.take(BOB, is_busy=True)
    assert places.take(BOB) is None


def test_refusals_share_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    places = Places(1, 1)
    places.take(ALICE, is_busy=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            places.take(BOB)
    assert [record.message for record in caplog.records] == ["connections were refused"]
    assert places.counted("refused_connections_total", reason="total") == 100


@pytest.mark.parametrize(
    ("texts", "address", "is_in"),
    [
        ((), "127.0.0.1", False),
        (("*",), "127.0.0.1", True),
        (("10.0.0.0/8", "::1"), "10.1.2.3", True),
        (("10.0.0.0/8", "::1"), "::1", True),
        (("10.0.0.0/8",), "11.0.0.1", False),
        (("10.0.0.0/8",), "no address", False),
    ],
)
def test_proxies(texts: tuple[str, ...], address: str, is_in: bool) -> None:
    assert (address in HttpLimits(forwarded_allow_ips=texts).proxies()) == is_in


def test_proxies_must_be_addresses() -> None:
    with pytest.raises(HttpError, match="--forwarded-allow-ips .*proxy.example"):
        HttpLimits(forwarded_allow_ips=("proxy.example",))
