"""A follower: a process that launches what the leader says, on its share of the devices.

It serves no requests and reads no results. It ends when it learns that the leader is gone; its
supervisor starts it again, and it then waits for the leader to come back.
"""

import hmac
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from types import FrameType
from typing import Any

import grpc

from mixtral_jax.checkpoint.pretrained import Pretrained
from mixtral_jax.compilation import keep_programs
from serving.cluster.codec import layer_of, limits_message, limits_of, masks_of, plans_of
from serving.cluster.leader import JOIN, GroupError, connect
from serving.cluster.plan_check import PlanCheck
from serving.cluster.proof import NONCE, PROOF, new_nonce, proof_of
from serving.cluster.rank import Rank
from serving.engine.build import prepare
from serving.engine.config import EngineConfig
from serving.engine.runner import Runner
from serving.parent import beat, end_process, tell_parent
from serving.proto import group_pb2 as pb
from serving.scheduling.step_plan import Limits

_CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    # A machine that is gone closes no connection: pings find out, as in the leader.
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Each attempt to join is a new channel; one channel must not remember another's failures.
    ("grpc.use_local_subchannel_pool", 1),
)
_RETRY_SECONDS = 0.5
_GRACE_SECONDS = 60.0  # beyond the timeout, in which the leader gives up by itself
_FINAL_REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED)


def follow(
    config: EngineConfig,
    rank: Rank,
    facts: Mapping[str, str],
    pretrained: Pretrained,
    say: Callable[[str], None],
) -> None:
    """Joins the leader and launches its steps until it announces the end.

    Raises GroupError if the leader refuses this process, and UserError if the model cannot be
    loaded. If the leader is lost, the process ends with status 1.
    """

    is_ending = threading.Lock()

    def lost() -> None:
        is_ending.acquire()  # never released, so that a second thread waits for the end
        leader = f"process 0 of {rank.num_processes} at {rank.coordinator}"
        say(f"{leader} was lost; the group starts again")
        end_process(1)

    membership = Membership(rank, facts, say, lost)
    membership.join()

    def leave(number: int, frame: FrameType | None) -> None:
        membership.leave()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    connect(rank)
    keep_programs()
    prepared = prepare(config, pretrained, say, membership.agree)
    runner = Runner(prepared.model, prepared.steps)
    membership.ready()
    say(f"process {rank.process_id} of {rank.num_processes} is ready, as one of {rank.coordinator}")
    tell_parent()
    threading.Thread(target=_beat, name="beat", daemon=True).start()
    model = prepared.model
    stacks = prepared.steps.adapters
    bounds = PlanCheck(
        prepared.limits,
        model.placement.num_sequence_groups,
        model.config.vocab_size,
        num_layers=model.config.num_layers,
        num_slots=0 if stacks is None else stacks.sizes.slots,
    )
    for order in membership.orders():
        if order.HasField("put_layer"):
            put = layer_of(order.put_layer)
            bounds.check_layer(put)
            runner.put_layer(put)
        else:
            _launch(order.step, membership, runner, bounds)
    say(f"{membership.reason}; the group has ended")


def _launch(step: pb.Step, membership: "Membership", runner: Runner, bounds: PlanCheck) -> None:
    """Launches a step; where its rows have masks, draws when these have come."""
    plans = plans_of(step)
    bounds.check(plans)
    if not step.has_masks:
        runner.launch(plans)
        return
    walked = runner.walk(plans)
    message = membership.masks()
    bounds.check_masks(message, plans)
    runner.draw(walked, masks_of(message, plans))


def _beat() -> None:
    """Tells the parent every second that this process is not stopped. A step may take its time:
    the leader watches how long."""
    while True:
        beat()
        time.sleep(1.0)


class _GoneError(Exception):
    """The leader ended regularly, but before its Start."""


class Membership:
    """The follower's end of the channel to the leader.

    Args:
        rank: Rank of this process.
        facts: Settings that must be the same in all processes, by name.
        say: Called with a line for each event.
        on_loss: Called, from another thread, when the leader is gone after its Start.
    """

    def __init__(
        self,
        rank: Rank,
        facts: Mapping[str, str],
        say: Callable[[str], None],
        on_loss: Callable[[], None],
    ) -> None:
        self._rank, self._say, self._on_loss = rank, say, on_loss
        self._patience = rank.coordinator_timeout + _GRACE_SECONDS
        self._hello = pb.Hello(
            process_id=rank.process_id,
            num_processes=rank.num_processes,
            host=socket.gethostname(),
            facts=facts,
        )
        self._reports: SimpleQueue[pb.Report | None] = SimpleQueue()
        self._orders: Iterator[pb.Order] = iter(())
        self.reason = ""  # why the group has ended

    def join(self) -> None:
        """Waits for the leader and for its Start. Raises GroupError if they do not come in time."""
        rank = self._rank
        self._say(f"process {rank.process_id} of {rank.num_processes} joins {rank.target}")
        deadline = time.monotonic() + self._rank.coordinator_timeout
        printed = ""
        while True:
            channel = self._channel()
            began = time.monotonic()
            try:
                self._open(channel)
                return
            except grpc.RpcError as error:
                channel.close()
                if error.code() in _FINAL_REFUSALS:
                    raise GroupError(f"process 0 refuses this one: {error.details()}") from None
                reason = str(error.details())
            except _GoneError:
                channel.close()
                reason = "it ended before all had come"
            if time.monotonic() - began > 2 * _RETRY_SECONDS:  # it was there, and is gone
                deadline = time.monotonic() + self._rank.coordinator_timeout
            if time.monotonic() >= deadline:
                raise GroupError(
                    f"process 0 of {self._rank.num_processes} did not take this one in at "
                    f"{rank.target} within {rank.coordinator_timeout:g} s ({reason}); start it, or "
                    "give --coordinator-timeout"
                )
            if not printed:
                printed = reason
                self._say(f"waiting for process 0 of {self._rank.num_processes} ({reason})")
            time.sleep(_RETRY_SECONDS)

    def agree(self, limits: Limits) -> Limits:
        """Tells the leader the limits of this process; returns those of all processes.

        The leader itself waits for the slowest no longer than the timeout. Where it does not
        answer much longer, the process ends as if the leader were lost.
        """
        self._reports.put(pb.Report(room=limits_message(limits)))
        impatience = threading.Timer(self._patience, self._on_loss)
        impatience.daemon = True
        impatience.start()
        try:
            return limits_of(self._next().limits)
        finally:
            impatience.cancel()

    def ready(self) -> None:
        """Tells the leader that this process has loaded and compiled."""
        self._reports.put(pb.Report(ready=pb.Ready()))

    def leave(self) -> None:
        """Asks for the end of the group, which comes when running answers are complete."""
        self._reports.put(pb.Report(leaving=pb.Leaving()))

    def orders(self) -> Iterator[pb.Order]:
        """Yields each step, and each layer of an adapter, until the end.

        A step that has masks is followed by a call of `masks`.
        """
        while not (order := self._next()).HasField("end"):
            yield order
        self.reason = order.end.reason

    def masks(self) -> pb.Masks:
        """Waits for the masks of the last step and returns them."""
        return self._next().masks

    def close(self) -> None:
        """Ends the stream of reports."""
        self._reports.put(None)

    def _next(self) -> pb.Order:
        try:
            return next(self._orders)
        except (grpc.RpcError, StopIteration):
            self._on_loss()
            raise GroupError("process 0 was lost") from None

    def _channel(self) -> grpc.Channel:
        target, tls = self._rank.target, self._rank.tls()
        if tls is None:
            return grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        return grpc.secure_channel(target, tls.client_credentials(), options=_CHANNEL_OPTIONS)

    def _open(self, channel: grpc.Channel) -> None:
        """Says hello to a leader that has the key and waits for Start; raises grpc.RpcError."""
        reports = self._reports = SimpleQueue()
        nonce = new_nonce()
        join = channel.stream_stream(
            JOIN, pb.Report.SerializeToString, response_deserializer=pb.Order.FromString
        )
        call = join(iter(reports.get, None), metadata=((NONCE, nonce),))
        # The leader starts the group, or gives up, in this time.
        impatience = threading.Timer(self._patience, call.cancel)
        impatience.daemon = True
        impatience.start()
        try:
            self._orders = iter(call)
            self._greet(call, nonce)
            start = next(self._orders, None)
        finally:
            impatience.cancel()
        if start is None or not start.HasField("start"):
            raise _GoneError

        def closed() -> None:
            if call.code() is not grpc.StatusCode.OK:
                self._on_loss()

        if not call.add_callback(closed):
            closed()

    def _greet(self, call: Any, nonce: str) -> None:
        """Sends Hello to a leader that proves to have the key; raises GroupError for another."""
        metadata = dict(call.initial_metadata() or ())
        if NONCE not in metadata:
            next(self._orders, None)  # raises the reason if there is nobody
        key, theirs = self._rank.key, str(metadata.get(NONCE, ""))
        proof = proof_of(key, "leader", theirs, nonce).hex()
        if not hmac.compare_digest(str(metadata.get(PROOF, "")).encode(), proof.encode()):
            call.cancel()
            raise GroupError(
                f"what listens at {self._rank.target} does not have the key of this group; set "
                "MIXTRAL_JAX_GROUP_KEY to the same in all processes, or stop what runs there"
            )
        self._hello.proof = proof_of(key, "follower", theirs, nonce)
        self._reports.put(pb.Report(hello=self._hello))
