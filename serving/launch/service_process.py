"""`python -m serving`: one engine behind gRPC, until SIGTERM or SIGINT.

Prints one line for each stage of the start, and `ready` when it answers. Keys come from the
environment: MIXTRAL_JAX_API_KEY is one that clients present, MIXTRAL_JAX_SERVICE_KEY the gateway's,
MIXTRAL_JAX_GROUP_KEY that of a model on several hosts. There process 0 serves, and the others
follow it until it ends.
"""

import argparse
import asyncio
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from mixtral_jax.checkpoint.pretrained import Pretrained, open_pretrained
from mixtral_jax.compilation import CompilationCount, keep_programs
from serving.access.config import access_of, add_access_flags
from serving.access.credentials import Access
from serving.access.keyring import DEFAULT, GATEWAY
from serving.access.tls import ServerTls, add_certificate_flags
from serving.cluster.follower import follow
from serving.cluster.leader import GroupError, Leader, connect
from serving.cluster.rank import Place, add_place_flags, place_of
from serving.engine.build import add_engine_flags, facts, prepare
from serving.engine.engine import Engine
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.errors import ServingError, Unavailable
from serving.observe.logs import FORMATS, set_up
from serving.observe.tracing import Traces
from serving.parent import end_process, end_with_parent
from serving.proto import inference_pb2 as pb
from serving.scheduling.step_plan import Limits
from serving.service.call_record import Calls
from serving.service.service import InferenceService, create_server, set_serving

_PART_LOST = Unavailable("a part of the server was lost; it starts again")


def main() -> None:
    options = _options()
    try:
        place = place_of(options, os.environ)
    except ValueError as error:
        sys.exit(f"mixtral-jax: {error}")
    if place is None:
        _lead(options, None)
    elif place.is_leader:
        _end_after(lambda: _lead(options, place))
    else:
        _end_after(lambda: _follow(options, place))


def _end_after(work: Callable[[], None]) -> NoReturn:
    """Works in a group, then ends the process: JAX would wait for others, who may be gone."""
    status = 1
    try:
        work()
        status = 0
    except SystemExit as error:
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    end_process(status)


def _follow(options: argparse.Namespace, place: Place) -> None:
    end_with_parent()
    set_up("serving", options.log_format)
    try:
        pretrained = open_pretrained(options.model)
        follow(options, place, facts(options, pretrained), pretrained, _say)
    except (ValueError, FileNotFoundError, GroupError) as error:
        sys.exit(f"mixtral-jax: {error}")


def _lead(options: argparse.Namespace, place: Place | None) -> None:
    """Serves; with a place, at the head of its group."""
    try:
        access = access_of(options, os.environ, (DEFAULT, GATEWAY))
        tls = ServerTls.of_flags(options.tls_cert, options.tls_key, options.tls_client_ca)
    except ValueError as error:
        sys.exit(f"mixtral-jax: {error}")
    end_with_parent()
    set_up("serving", options.log_format)
    try:
        pretrained = open_pretrained(options.model)
        traces = Traces.exported(options.otlp_endpoint, "service")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"mixtral-jax: {error}")
    metrics = Metrics(pretrained.card.name)
    if options.metrics_port is not None:
        try:
            port = metrics.serve(options.metrics_port)
        except OSError as error:
            sys.exit(
                f"mixtral-jax: cannot listen on 127.0.0.1:{options.metrics_port} "
                f"({error.strerror}); stop what runs there or choose another with --metrics-port"
            )
        _say(f"metrics on http://127.0.0.1:{port}/metrics")
    try:
        leader = None if place is None else _leader(options, place, pretrained)
        worker, service = _build(options, pretrained, metrics, traces, leader)
    except (ValueError, FileNotFoundError, GroupError) as error:
        sys.exit(f"mixtral-jax: {error}")
    worker.start()
    try:
        address = f"{options.host}:{options.port}"
        asyncio.run(_serve(address, worker, service, access, tls, options.drain_seconds, leader))
    except OSError as error:
        sys.exit(f"mixtral-jax: {error}")
    finally:
        if leader is not None:
            if leader.loss is not None:
                _start_again(leader.loss)
            leader.on_loss = _start_again  # the thread would be waited for in vain
        worker.stop()
        traces.close()
    if leader is not None and not worker.has_failed:
        leader.end(leader.leaving or f"{leader.name} was told to end")
    if worker.has_failed:
        sys.exit("mixtral-jax: the engine failed")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder, or tiny-random")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=50051)
    add_engine_flags(parser)
    add_place_flags(parser)
    parser.add_argument("--metrics-port", type=int, help="for Prometheus, on 127.0.0.1; 0: any")
    parser.add_argument("--otlp-endpoint", metavar="URL", help="where traces go; default: nowhere")
    parser.add_argument("--log-format", choices=FORMATS, default="text", help="of lines on stderr")
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        help="at the end, answers under way may take so long",
    )
    add_access_flags(parser)
    add_certificate_flags(parser)
    parser.add_argument(
        "--tls-client-ca", metavar="FILE", help="who must vouch for the certificates of clients"
    )
    return parser.parse_args()


def _say(text: str) -> None:
    print(f"engine: {text}", file=sys.stderr, flush=True)


def _start_again(loss: str) -> NoReturn:
    _say(f"{loss}; the group starts again")
    end_process(1)


def _leader(options: argparse.Namespace, place: Place, pretrained: Pretrained) -> Leader:
    """Of a group that has come together."""

    def end(reason: str) -> None:
        leader.end(reason)
        _say(f"{reason}; the group has ended")
        end_process(0)

    leader = Leader(place, facts(options, pretrained), _say, _start_again, end)
    leader.gather()
    connect(place)
    return leader


def _build(
    options: argparse.Namespace,
    pretrained: Pretrained,
    metrics: Metrics,
    traces: Traces,
    leader: Leader | None,
) -> tuple[EngineWorker, InferenceService]:
    keep_programs()
    card = pretrained.card

    def agree(limits: Limits) -> Limits:
        return limits if leader is None else leader.agree(limits)

    def explain() -> ServingError | None:
        return _PART_LOST if leader is not None and leader.loss_soon() else None

    prepared = prepare(options, pretrained, _say, agree)
    broadcast = None if leader is None else leader.broadcast
    engine = Engine(prepared.model, prepared.limits, prepared.steps, broadcast)
    if leader is not None:
        leader.await_ready()
    info = pb.ModelInfo(
        name=card.name,
        type="chat-completions",
        provider=card.provider,
        max_context=prepared.limits.max_context,
        vocab_size=card.model.vocab_size,
    )
    worker = EngineWorker(engine, metrics, explain)
    service = InferenceService(worker, pretrained.tokenizer, info, Calls(metrics, traces))
    compilations = CompilationCount()
    metrics.watch(engine.scheduler, lambda: compilations.value)
    return worker, service


async def _serve(
    address: str,
    worker: EngineWorker,
    service: InferenceService,
    access: Access,
    tls: ServerTls | None,
    drain_seconds: float,
    leader: Leader | None,
) -> None:
    """Serves until a signal, Drain, the engine's or a follower's end; then lets streams finish."""
    server, port, checks = await create_server(address, service, access, tls)
    _say(f"ready on {address.rpartition(':')[0]}:{port}")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if leader is not None:
        leader.on_leave = lambda reason: loop.call_soon_threadsafe(stop.set)
        leader.on_loss = lambda reason: worker.abandon(_PART_LOST)
    reasons = [
        asyncio.create_task(stop.wait()),
        asyncio.create_task(service.was_told_to_end.wait()),
        asyncio.create_task(_ended(worker)),
    ]
    await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
    for task in reasons:
        task.cancel()
    # First health, so that others get the new requests; those that come all the same are refused.
    await set_serving(checks, False)
    worker.drain()
    deadline = loop.time() + drain_seconds
    while worker.num_under_way and loop.time() < deadline:
        await asyncio.sleep(0.05)
    await server.stop(1.0)  # calls that watch its health would go on for ever


async def _ended(worker: EngineWorker) -> None:
    while not worker.ended.is_set():
        await asyncio.sleep(0.1)
