"""Stop texts in a stream: text that may become a stop text is held back, the rest goes out."""

from collections.abc import Sequence


class StopTexts:
    """Cuts a text, which comes in pieces, before the first stop text.

    Worked example, stop "END": the pieces "a E", "N", "X EN", "D b" give "a ", "", "ENX ", "" and
    then the stream is stopped; " b" is never seen.

    Args:
        stops: The stop texts.
        included: Whether the stop text that is found is the end of the text.

    Attributes:
        found: The stop text that ended the text; None as long as none has.
    """

    def __init__(self, stops: Sequence[str], *, included: bool = False) -> None:
        if "" in stops:
            raise ValueError("a stop text is empty; leave it out")
        self._stops = tuple(stops)
        self._included = included
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """True when a stop text has ended the text."""
        return self.found is not None

    def push(self, text: str) -> str:
        """Takes the next piece and returns the certain text. Sets `stopped` at a stop text."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        self._held += text
        places = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            # Where several begin at one place, the first of the list is meant.
            at, self.found = min(places, key=lambda place: place[0])
            end = at + len(self.found) if self._included else at
            certain, self._held = self._held[:end], ""
            return certain
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self) -> str:
        """Returns the text that was held back, when no more comes."""
        certain, self._held = self._held, ""
        return certain

    def _overlap(self, stop: str) -> int:
        """Returns the length of the longest end of the held text that is a beginning of `stop`."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
