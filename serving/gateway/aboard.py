"""Memory of the requests that a service was answering when it died, so that none kills it again.

Nobody knows which of the requests that a dead service was answering has killed it. The gateway
remembers all of them for some minutes, as digests:

    deaths   when it comes again
    1        it is sent as a suspect, which the engine computes in steps of its own
    2        it is sent as the only suspect; others that come meanwhile are to come again later
    3        it is refused

A death counts once for a request, however often it was aboard. One with a single suspect aboard
counts as the third, because that suspect has caused it. A request that ends in any other way than
by a death is no longer a suspect, and so those that were aboard by chance are cleared as soon as
they are answered.

The digest holds the caller: nobody is told by a refusal what another has asked. Several gateways
before one service do not know one another's suspects.
"""

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

from serving.errors import EngineFailure, Unavailable
from serving.proto.inference_pb2 import GenerateRequest

REMEMBERED_SECONDS = 600.0
"""Seconds after its latest death in which a request is remembered."""
MAX_REMEMBERED = 4096
"""Maximum number of requests that are remembered; the oldest are forgotten first."""
_REFUSED_AT = 3
# Fields that change without another prompt, which a client could vary to be taken for another.
_NOISE = ("cache_salt", "priority", "suspect")

logger = logging.getLogger(__name__)


class Aboard:
    """Remembers the requests that were aboard at a death, and decides about their return.

    Args:
        clock: Time in seconds that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By digest; the oldest come first.
        self._deaths: OrderedDict[bytes, _Deaths] = OrderedDict()
        self._moments = count()  # numbers what is sent, and deaths
        self._suspects: list[Sent] = []
        self._is_exclusive = False  # the only suspect is to stay alone

    def send(self, request: GenerateRequest) -> "Sent":
        """Sets `suspect` of a request that is about to be sent, and returns its record.

        Raises:
            EngineFailure: It has caused a death.
            Unavailable: It can be tried when other suspects have ended.
        """
        self._forget()
        # Without deaths the digest is not computed: it costs 2 ms for 4 MB.
        noted = self._deaths.get(digest_of(request)) if self._deaths else None
        deaths = 0 if noted is None else noted.times
        sent = Sent(self, request, next(self._moments))
        if deaths == 0:
            return sent
        if deaths >= _REFUSED_AT:
            raise EngineFailure(
                "the model server died when it answered this request, more than once; the request "
                f"is not tried again within {REMEMBERED_SECONDS / 60:g} minutes. Change it"
            )
        wants_to_be_alone = deaths == _REFUSED_AT - 1
        if self._is_exclusive or (wants_to_be_alone and self._suspects):
            raise Unavailable(
                "the model server died when it answered this request among others, which are "
                "tried again one after the other; try again shortly"
            )
        self._is_exclusive = wants_to_be_alone
        self._suspects.append(sent)
        for suspect in self._suspects:
            suspect.has_company = len(self._suspects) > 1
        request.suspect = True
        return sent

    def ended(self, sent: "Sent", *, is_whole: bool) -> None:
        """Notes that a request has ended otherwise than by a death; a whole answer clears it."""
        if sent in self._suspects:
            self._remove(sent)
            if len(self._suspects) == 1:
                self._suspects[0].has_company = False
        if is_whole and self._deaths:
            self._deaths.pop(digest_of(sent.request), None)

    def died(self, sent: "Sent") -> None:
        """Notes that the service has died while it answered a request."""
        digest, is_suspect = digest_of(sent.request), sent in self._suspects
        noted = self._deaths.pop(digest, _Deaths())
        # A request that was sent before the last noted death was aboard at that same one.
        deaths = noted.times + (sent.moment > noted.moment)
        if is_suspect:
            # Those that died with it stay its company, although they have left before it.
            self._remove(sent)
            if not sent.has_company:
                deaths = _REFUSED_AT
        if deaths >= _REFUSED_AT:
            logger.error(
                "a request of %s has killed the model service; it is refused from now on "
                "(digest %s)",
                sent.request.caller or "a caller",
                digest.hex()[:16],
            )
        self._deaths[digest] = _Deaths(deaths, self._clock(), next(self._moments))
        self._forget()

    def _remove(self, sent: "Sent") -> None:
        self._suspects.remove(sent)
        self._is_exclusive = self._is_exclusive and bool(self._suspects)

    def _forget(self) -> None:
        """Forgets what is too old, and what is too much."""
        oldest = self._clock() - REMEMBERED_SECONDS
        while self._deaths:
            digest, noted = next(iter(self._deaths.items()))
            if noted.at > oldest and len(self._deaths) <= MAX_REMEMBERED:
                return
            del self._deaths[digest]


class _Deaths(NamedTuple):
    """The deaths at which a request was aboard."""

    times: int = 0
    at: float = 0.0  # time of the latest
    moment: int = -1  # its number


class Sent:
    """A request that was sent, until it ends. The first of its two methods counts.

    Args:
        aboard: What remembers it.
        request: The request.
        moment: Number that tells what was sent before a death and what after it.
    """

    def __init__(self, aboard: Aboard, request: GenerateRequest, moment: int) -> None:
        self.request, self.moment = request, moment
        self.has_company = False
        """Whether other suspects run, or died with it."""
        self._aboard: Aboard | None = aboard

    def end(self, *, is_whole: bool) -> None:
        """Notes its end otherwise than by a death of the service."""
        if self._aboard is not None:
            self._aboard.ended(self, is_whole=is_whole)
            self._aboard = None

    def die(self) -> None:
        """Notes that the service has died while it answered the request."""
        if self._aboard is not None:
            self._aboard.died(self)
            self._aboard = None


def digest_of(request: GenerateRequest) -> bytes:
    """Returns the SHA-256 of what a request asks and who asks it, without seed and salt."""
    asked = GenerateRequest()
    asked.CopyFrom(request)
    for field in _NOISE:
        asked.ClearField(field)
    asked.sampling.ClearField("seed")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).digest()
