"""The shares of limits that one process of several has."""

from serving.gateway.http.body import LIMIT
from serving.gateway.http.body_room import ROOM
from serving.gateway.http.limits import HttpLimits
from serving.gateway.processes.member import Member, http_share, room_share


def test_connections_are_divided_and_rounded_up() -> None:
    limits = HttpLimits(max_connections=10, max_connections_per_address=4)
    assert http_share(limits, 1) == limits
    share = http_share(limits, 3)
    assert (share.max_connections, share.max_connections_per_address) == (4, 2)


def test_room_for_bodies_is_divided_as_long_as_one_has_half_of_it() -> None:
    assert room_share(1) == ROOM
    assert room_share(2) == ROOM // 2
    assert room_share(64) == 2 * LIMIT


def test_a_process_is_a_member_by_its_parents_variable() -> None:
    assert Member.is_this({"MIXTRAL_JAX_LISTENER_FD": "3"})
    assert not Member.is_this({})
