"""A step that stands still, by a clock that the test turns."""

import asyncio

from serving.engine.watchdog import until_stuck


class Turns:
    """A clock, and an engine whose turns begin at given times and go on until the next one."""

    def __init__(self, begins: dict[float, float]) -> None:
        self.now = 100.0
        self._begins = begins  # from a time on: when the present turn began
        self.beats: list[float] = []

    def standing(self, now: float) -> float:
        return now - max(begin for since, begin in self._begins.items() if since <= now)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def beat(self) -> None:
        self.beats.append(self.now)


def stuck_at(turns: Turns, seconds: float) -> float:
    watch = until_stuck(turns.standing, seconds, turns.beat, lambda: turns.now, turns.sleep)
    asyncio.run(watch)
    return turns.now


def test_a_turn_that_lasts_too_long_is_noticed_and_ends_the_beats() -> None:
    turns = Turns({100.0: 100.0, 101.0: 101.0, 102.5: 102.5})
    assert stuck_at(turns, 3.0) == 105.75  # the first look after 102.5 + 3
    assert turns.beats == [100.0, 101.0, 102.0, 103.0, 104.0, 105.0]


def test_short_turns_may_go_on_for_long() -> None:
    turns = Turns({100.0 + i: 100.0 + i for i in range(61)})
    assert stuck_at(turns, 2.0) == 162.25
