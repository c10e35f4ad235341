"""Requests that were aboard at a death: tried apart, then alone, then refused."""

import pytest

from serving.errors import EngineFailure, Unavailable
from serving.gateway.aboard import MAX_REMEMBERED, Aboard, digest_of
from serving.proto.inference_pb2 import GenerateRequest
from tests.support.clock import Clock


def request(text: str, caller: str = "alice", **fields: object) -> GenerateRequest:
    return GenerateRequest(text=text, caller=caller, **fields)  # type: ignore[arg-type]


def test_a_request_that_kills_the_service_alone_is_refused_at_its_second_death() -> None:
    """It was among three at the first death; the others are cleared as they are answered."""
    clock = Clock()
    aboard = Aboard(clock)
    sent = [aboard.send(request(text)) for text in ("poison", "a", "b")]
    assert not any(each.request.suspect for each in sent)
    for each in sent:
        each.die()

    for text in ("a", "b"):
        again = aboard.send(request(text))
        assert again.request.suspect
        again.end(is_whole=True)
        assert not aboard.send(request(text)).request.suspect

    again = aboard.send(request("poison"))
    assert again.request.suspect
    again.die()
    with pytest.raises(EngineFailure, match="died when it answered this request, more than once"):
        aboard.send(request("poison"))
    aboard.send(request("another"))
    clock.now += 599.0
    with pytest.raises(EngineFailure):
        aboard.send(request("poison"))
    clock.now += 2.0
    assert not aboard.send(request("poison")).request.suspect


def test_a_death_counts_once_for_a_request_that_was_aboard_several_times() -> None:
    aboard = Aboard()
    sent = [aboard.send(request("a")) for _ in range(5)]
    for each in sent[:4]:
        each.die()
    again = aboard.send(request("a"))
    assert again.request.suspect
    again.end(is_whole=False)
    sent[4].end(is_whole=True)  # by another process of the service, which goes on
    assert not aboard.send(request("a")).request.suspect


def test_equal_suspects_that_die_together_are_tried_once_more() -> None:
    aboard = Aboard()
    for _ in range(2):
        for each in [aboard.send(request("poison")) for _ in range(3)]:
            each.die()
    alone = aboard.send(request("poison"))
    with pytest.raises(Unavailable):
        aboard.send(request("poison"))
    alone.die()
    with pytest.raises(EngineFailure):
        aboard.send(request("poison"))


def test_suspects_that_die_together_are_tried_one_by_one_and_no_bystander_is_refused() -> None:
    aboard = Aboard()
    texts = ["poison", "a", "b"]
    for expected in (False, True):
        sent = [aboard.send(request(text)) for text in texts]
        assert [each.request.suspect for each in sent] == [expected] * 3
        for each in sent:
            each.die()

    alone = aboard.send(request("a"))
    for text in ("poison", "b", "a"):
        with pytest.raises(Unavailable, match="one after the other; try again shortly"):
            aboard.send(request(text))
    assert not aboard.send(request("new")).request.suspect  # others are not held up
    alone.end(is_whole=True)
    poison = aboard.send(request("poison"))
    bystander = aboard.send(request("a"))
    assert not bystander.request.suspect
    poison.die()
    bystander.die()
    with pytest.raises(EngineFailure):
        aboard.send(request("poison"))
    for text in ("a", "b"):
        tried = aboard.send(request(text))
        tried.end(is_whole=True)


def test_a_suspect_whose_company_has_ended_is_alone() -> None:
    aboard = Aboard()
    for each in [aboard.send(request(text)) for text in ("poison", "a")]:
        each.die()
    poison, other = aboard.send(request("poison")), aboard.send(request("a"))
    assert poison.has_company and other.has_company
    other.end(is_whole=True)
    poison.die()
    with pytest.raises(EngineFailure):
        aboard.send(request("poison"))


def test_a_suspect_that_is_dropped_stays_one() -> None:
    aboard = Aboard()
    aboard.send(request("x")).die()
    aboard.send(request("x")).end(is_whole=False)
    again = aboard.send(request("x"))
    assert again.request.suspect
    again.end(is_whole=True)
    again.die()  # too late: the first end counts
    assert not aboard.send(request("x")).request.suspect


def test_a_digest_is_of_the_prompt_and_the_caller() -> None:
    """Nobody learns from a refusal what another asked; a salt or a seed makes no new request."""
    one = digest_of(request("x"))
    same = [
        request("x", cache_salt=b"1"),
        request("x", suspect=True),
        request("x", sampling={"seed": 7}),
    ]
    for each in same:
        each.sampling.SetInParent()
    assert {digest_of(each) for each in same} == {digest_of(request("x", sampling={}))}
    others = [request("y"), request("x", "bob"), request("x", max_tokens=3)]
    assert one not in {digest_of(each) for each in others}


def test_memory_is_bounded() -> None:
    """The oldest of 4,098 deaths are forgotten; the others stay."""
    aboard = Aboard()
    for number in range(MAX_REMEMBERED + 2):
        aboard.send(request(str(number))).die()
    suspects = [aboard.send(request(text)).request.suspect for text in ("0", "1", "2", "4097")]
    assert suspects == [False, False, True, True]
