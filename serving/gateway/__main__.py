"""Runs the gateway: `python -m serving.gateway --target HOST:PORT`.

Keys stand in the environment, where no list of processes shows them: MIXTRAL_JAX_API_KEY is one
that clients present, MIXTRAL_JAX_SERVICE_KEY the one that the service is shown (or the first). What
is wrong before the start is told in one line and ends with status 1, a wrong flag with status 2.
SIGTERM and SIGINT end it with status 0 when the answers under way have ended, or --drain-seconds.
"""

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn

from serving.access.config import access_of, add_access_flags, service_key_of
from serving.access.tls import Certificate, ServiceTls, add_certificate_flags, add_service_flags
from serving.channel import target_of
from serving.gateway.answering import Limits
from serving.gateway.app import create_app
from serving.gateway.config import add_book_flags, books_of
from serving.gateway.event_stream import StreamAborted
from serving.gateway.http.drain import Drain, DrainingServer
from serving.gateway.http.failures import refuse_while_draining
from serving.gateway.http.protocol import Protocol
from serving.observe.logs import set_up
from serving.parent import end_with_parent

DRAIN_SECONDS = 30.0

logger = logging.getLogger("serving.gateway")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until a signal ends it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m serving.gateway", description=__doc__)
    parser.add_argument(
        "--target",
        action="append",
        metavar="HOST:PORT",
        help="a model service; repeat it for replicas, or give dns:///NAME:PORT (127.0.0.1:50051)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes any free port")
    parser.add_argument(
        "--heartbeat-seconds",
        type=float,
        default=Limits.heartbeat_seconds,
        help="a stream that is silent for so long says that it lives",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="whose pages in browsers may ask, such as https://example.org; repeat it, or give *",
    )
    parser.add_argument(
        "--model-type",
        help="what /info calls the model's type (chat-completions); some clients want another",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=DRAIN_SECONDS,
        help="at the end, answers under way may take so long",
    )
    add_access_flags(parser)
    add_certificate_flags(parser)
    add_service_flags(parser)
    add_book_flags(parser)
    options = parser.parse_args(arguments)

    try:
        target = target_of(options.target or ["127.0.0.1:50051"])
    except ValueError as error:
        return _refuse(f"--target cannot be used: {error}")
    try:
        books = books_of(options)
    except ValueError as error:
        return _refuse(str(error))
    try:
        app = create_app(
            target,
            access_of(options, os.environ),
            service_key=service_key_of(options, os.environ),
            service_tls=ServiceTls.of_flags(
                options.service_ca, options.service_cert, options.service_key, options.service_name
            ),
            books=books,
            limits=Limits(heartbeat_seconds=options.heartbeat_seconds),
            model_type=options.model_type,
            cors_origins=options.cors_origin,
        )
        certificate = Certificate.of_flags("tls", options.tls_cert, options.tls_key)
    except ValueError as error:
        books.close()
        return _refuse(str(error))
    try:
        listener = listen(options.host, options.port)
    except OSError as error:
        books.close()
        return _refuse(_why_not_listening(options.host, options.port, error))

    end_with_parent()
    set_up("serving.gateway", options.log_format, _is_news)
    # Both signals raise KeyboardInterrupt before and after uvicorn waits for them itself.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    host, port = listener.getsockname()[:2]
    scheme = "https" if certificate else "http"
    logger.info("listening on %s://%s:%d for the service at %s", scheme, host, port, target)
    drain = Drain(app, refuse_while_draining, options.drain_seconds)
    server = DrainingServer(
        uvicorn.Config(
            drain,
            access_log=False,
            log_config=None,
            log_level="warning",
            http=Protocol,
            server_header=False,
            ssl_certfile=certificate.chain if certificate else None,
            ssl_keyfile=certificate.key if certificate else None,
            timeout_graceful_shutdown=1,  # what is left after the drain
            ws="none",
        ),
        drain,
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return 0 if server.started else 1


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to from now on; raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record is not the traceback of what has been logged in one line already."""
    error = record.exc_info[1] if record.exc_info else None
    # uvicorn says itself how many answers it cancels when the grace is over.
    return not isinstance(error, (StreamAborted, asyncio.CancelledError))


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 2**16:
        raise ValueError
    return port


def _why_not_listening(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; stop what uses it, or choose another with --port"
    return f"cannot listen on port {port} of {host}: {error}; see --host and --port"


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
