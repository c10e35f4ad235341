"""The leader of a model in several processes: it gathers them and tells them what to launch.

    follower                leader
    Hello         ──>                    refused where anything differs
                  <──       Start        when all are there; then all connect their devices
    Limits        ──>
                  <──       Limits       what all have room for; then all load and compile
    Ready         ──>
                  <──       Step ...     each before the leader launches it
                  <──       End

The devices work only together. When one process is gone, the others may wait for it for ever inside
a collective, where nothing can interrupt them. A broken stream therefore ends a process at once,
whatever its other threads do. jax.distributed has a watch of its own, which takes minutes and then
aborts; the processes have ended long before.
"""

import contextlib
import hmac
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import grpc
import jax

from serving.cluster.codec import (
    layer_message,
    limits_message,
    limits_of,
    masks_message,
    step_message,
)
from serving.cluster.proof import NONCE, PROOF, is_nonce, new_nonce, proof_of
from serving.cluster.rank import Rank
from serving.engine.device import Masks, Order, PutLayer, Walk
from serving.errors import SetupError
from serving.proto import group_pb2 as pb
from serving.scheduling.step_plan import Limits

JOIN = "/mixtral.group.v1.Group/Join"
_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 1 << 20),
    # A machine that is gone closes no connection: pings find out. gRPC answers them below Python,
    # also while the process compiles.
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # also while there are no steps
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)
_NEWS_SECONDS = 5.0  # time in which a stream breaks after a step has failed
_FAREWELL_SECONDS = 2.0
_HELLO_SECONDS = 10.0  # time in which a new stream says who it is
# All that somebody without the key is told.
_STRANGER = "the key of this process is not that of process 0; set MIXTRAL_JAX_GROUP_KEY in both"


class GroupError(SetupError):
    """A group that did not come together; the message says why."""


def connect(rank: Rank) -> None:
    """Makes the devices of all processes one set. All call it at about the same time, before they
    use any device."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # That service would handle SIGTERM itself.
    jax.config.update("jax_enable_preemption_service", False)
    # Without it the others are aborted when one is lost, before they can report it.
    jax.config.update("jax_enable_recoverability", True)
    jax.distributed.initialize(
        rank.coordinator,
        rank.num_processes,
        rank.process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(rank.coordinator_timeout)),
        # By default it listens on all interfaces.
        coordinator_bind_address=rank.coordinator,
    )


@dataclass
class _Member:
    """A follower whose stream is open."""

    id: int
    host: str
    orders: "SimpleQueue[bytes | None]" = field(default_factory=SimpleQueue)
    room: Limits | None = None
    is_ready: bool = False


class Leader:
    """The other processes, as process 0 sees them. It listens as soon as it is made.

    Args:
        rank: Rank of this process.
        facts: Settings that must be the same in all processes, by name.
        say: Called with a line for each event.
        on_loss: Called once, from a thread of its own, when a follower is gone after the start.
        on_leave: Called when a follower was told to end; `end` should come soon.

    Raises GroupError if the port is taken.
    """

    def __init__(
        self,
        rank: Rank,
        facts: Mapping[str, str],
        say: Callable[[str], None],
        on_loss: Callable[[str], None],
        on_leave: Callable[[str], object],
    ) -> None:
        self.on_loss, self.on_leave = on_loss, on_leave
        self._rank, self._facts, self._say = rank, dict(facts), say
        self._members: dict[int, _Member] = {}
        self._changed = threading.Condition()
        self._has_started = self._is_over = False
        self._lost = threading.Event()
        self._loss = self._leaving = ""
        # A thread for each stream, and some for streams that are refused.
        self._server = grpc.server(
            ThreadPoolExecutor(rank.num_processes + 8), options=_SERVER_OPTIONS
        )
        # Orders are serialised once, not once for each follower.
        join = grpc.stream_stream_rpc_method_handler(
            self._join, pb.Report.FromString, response_serializer=None
        )
        service, _, method = JOIN.removeprefix("/").partition("/")
        handler = grpc.method_handlers_generic_handler(service, {method: join})
        self._server.add_generic_rpc_handlers((handler,))
        self._listen_at(rank)
        self._server.start()

    def _listen_at(self, rank: Rank) -> None:
        """Opens the port on the interface that --coordinator names, and on no other."""
        tls = rank.tls()
        try:
            if tls is None:
                self._server.add_insecure_port(rank.target)
            else:
                self._server.add_secure_port(rank.target, tls.credentials())
        except RuntimeError:
            raise GroupError(
                f"cannot listen on {rank.target}, the port after that of --coordinator; stop what "
                "runs there or choose another port, and give an address of this host"
            ) from None

    def gather(self) -> None:
        """Waits until all have come, and starts them. Raises GroupError after the timeout."""
        deadline = time.monotonic() + self._rank.coordinator_timeout
        printed: list[int] = []
        with self._changed:
            while absent := self._without(lambda member: True):
                if absent != printed:
                    printed = absent
                    self._say(f"waiting for {self._named(absent)}")
                if not self._changed.wait(deadline - time.monotonic()):
                    raise GroupError(
                        f"{self._named(absent)} did not come to {self._rank.target} within "
                        f"{self._rank.coordinator_timeout:g} s; start them, or give "
                        "--coordinator-timeout"
                    )
            self._has_started = True
        self._say(f"all {self._rank.num_processes} processes are there")
        self._tell(pb.Order(start=pb.Start()))

    def agree(self, limits: Limits) -> Limits:
        """Returns the least of the limits of all processes, this one's among them.

        Raises GroupError if they do not come within the timeout.
        """
        self._await("tell what they have room for", lambda member: member.room is not None)
        rooms = [limits, *(member.room for member in self._members.values() if member.room)]
        least = min(rooms, key=lambda room: (room.num_pages, room.max_context))
        self._tell(pb.Order(limits=limits_message(least)))
        return least

    def await_ready(self) -> None:
        """Waits until all have loaded and compiled, as this process has.

        Raises GroupError if the others take longer by the timeout.
        """
        self._await("load the model", lambda member: member.is_ready)

    def broadcast(self, order: Order) -> None:
        """Tells all followers to launch a step or a part of one, or to take a layer of an adapter.

        It waits for none of them.
        """
        match order:
            case Masks():
                self._tell(pb.Order(masks=masks_message(order)))
            case PutLayer():
                self._tell(pb.Order(put_layer=layer_message(order)))
            case Walk(plans):
                self._tell(pb.Order(step=step_message(plans, has_masks=True)))
            case plans:
                self._tell(pb.Order(step=step_message(plans)))

    def end(self, reason: str) -> None:
        """Ends all followers regularly, and waits a short time for them."""
        with self._changed:
            self._is_over = True
        self._tell(pb.Order(end=pb.End(reason=reason)))
        for member in list(self._members.values()):
            member.orders.put(None)
        with self._changed:
            self._changed.wait_for(lambda: not self._members, _FAREWELL_SECONDS)
        self._server.stop(0)

    @property
    def loss(self) -> str | None:
        """Names the follower that was lost, for the user; None while none is."""
        return self._loss or None

    @property
    def leaving(self) -> str | None:
        """Names the follower that was told to end, for the user; None while none was."""
        return self._leaving or None

    @property
    def name(self) -> str:
        """Names this process, for the user."""
        return f"process 0 of {self._rank.num_processes} at {self._rank.coordinator}"

    def loss_soon(self) -> str | None:
        """Waits a short time for `loss`: a step may fail before the stream breaks."""
        self._lost.wait(_NEWS_SECONDS)
        return self.loss

    def _tell(self, order: pb.Order) -> None:
        written = order.SerializeToString()
        for member in list(self._members.values()):
            member.orders.put(written)

    def _await(self, what: str, is_done: Callable[[_Member], bool]) -> None:
        seconds = self._rank.coordinator_timeout
        with self._changed:
            if not self._changed.wait_for(lambda: not self._without(is_done), seconds):
                raise GroupError(
                    f"{self._named(self._without(is_done))} did not {what} within {seconds:g} s "
                    "after process 0; see their logs, or give --coordinator-timeout"
                )

    def _without(self, is_done: Callable[[_Member], bool]) -> list[int]:
        done = {member.id for member in self._members.values() if is_done(member)}
        return [i for i in range(1, self._rank.num_processes) if i not in done]

    def _named(self, ids: list[int]) -> str:
        word = "process" if len(ids) == 1 else "processes"
        return f"{word} {', '.join(map(str, ids))} of {self._rank.num_processes}"

    def _join(self, reports: Iterator[pb.Report], context: grpc.ServicerContext) -> Iterable[bytes]:
        """Serves the stream of a follower, in a thread of its own."""
        hello = self._greeted(reports, context)
        with self._changed:
            difference = self._difference(hello)
            if difference is not None:
                self._say(f"refused process {hello.process_id} at {hello.host}: {difference}")
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, difference)
            if self._has_started or self._is_over or hello.process_id in self._members:
                context.abort(
                    grpc.StatusCode.UNAVAILABLE,
                    f"there is a process {hello.process_id} already; waiting for it to go",
                )
            member = _Member(hello.process_id, hello.host)
            self._members[member.id] = member
            self._changed.notify_all()
        if not context.add_callback(lambda: self._parted(member)):
            self._parted(member)
            return
        threading.Thread(
            target=self._listen, args=(reports, member), name="follower", daemon=True
        ).start()
        yield from iter(member.orders.get, None)

    def _greeted(self, reports: Iterator[pb.Report], context: grpc.ServicerContext) -> pb.Hello:
        """Returns the Hello of a follower that has the key; aborts the stream of all others."""
        key, nonce = self._rank.key, new_nonce()
        theirs = str(dict(context.invocation_metadata()).get(NONCE, ""))
        if not is_nonce(theirs):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, _STRANGER)
        proof = proof_of(key, "leader", nonce, theirs).hex()
        context.send_initial_metadata(((NONCE, nonce), (PROOF, proof)))
        # A stream that never says Hello must not hold a thread.
        impatience = threading.Timer(_HELLO_SECONDS, context.cancel)
        impatience.daemon = True
        impatience.start()
        try:
            hello = next(reports).hello
        except StopIteration:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, _STRANGER)
        finally:
            impatience.cancel()
        if not hmac.compare_digest(hello.proof, proof_of(key, "follower", nonce, theirs)):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, _STRANGER)
        return hello

    def _difference(self, hello: pb.Hello) -> str | None:
        count = self._rank.num_processes
        if hello.num_processes != count:
            return f"--num-processes is {hello.num_processes} there and {count} in process 0"
        if not 0 < hello.process_id < count:
            return f"--process-id is {hello.process_id}; it must be one of 1 to {count - 1}"
        theirs = dict(hello.facts)
        for name in sorted(theirs | self._facts):
            own, other = self._facts.get(name, "not given"), theirs.get(name, "not given")
            if own != other:
                return f"{name} is {other} in process {hello.process_id} and {own} in process 0"
        return None

    def _listen(self, reports: Iterator[pb.Report], member: _Member) -> None:
        """Takes the reports of a follower until its stream ends."""
        with contextlib.suppress(grpc.RpcError, StopIteration):
            for report in reports:
                with self._changed:
                    match report.WhichOneof("kind"):
                        case "room":
                            member.room = limits_of(report.room)
                        case "ready":
                            member.is_ready = True
                    self._changed.notify_all()
                if report.HasField("leaving"):
                    self._leaving = f"{self._of(member)} was told to end"
                    self.on_leave(self._leaving)

    def _of(self, member: _Member) -> str:
        return f"process {member.id} of {self._rank.num_processes} at {member.host}"

    def _parted(self, member: _Member) -> None:
        member.orders.put(None)
        with self._changed:
            del self._members[member.id]
            is_loss = self._has_started and not self._is_over and not self._loss
            if is_loss:
                self._loss = f"{self._of(member)} was lost"
            self._changed.notify_all()
        if is_loss:
            self._lost.set()
            # Not in a thread of gRPC, which other streams need.
            threading.Thread(target=self.on_loss, args=(self._loss,), daemon=True).start()
