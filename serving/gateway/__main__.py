"""Runs the gateway: `python -m serving.gateway --target HOST:PORT`.

The key stands in the environment as MIXTRAL_JAX_API_KEY, where no list of processes shows it. What
is wrong before the start is told in one line and ends with status 1, a wrong flag with status 2.
SIGTERM and SIGINT end it with status 0, after the answers that are under way, or GRACE_SECONDS.
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

from serving.gateway.app import HEARTBEAT_SECONDS, StreamAborted, create_app
from serving.parent import end_with_parent

KEY_VARIABLE = "MIXTRAL_JAX_API_KEY"
GRACE_SECONDS = 20

logger = logging.getLogger("serving.gateway")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until a signal ends it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m serving.gateway", description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:50051", help="the model service")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes any free port")
    parser.add_argument(
        "--heartbeat-seconds",
        type=float,
        default=HEARTBEAT_SECONDS,
        help="a stream that is silent for so long says that it lives",
    )
    options = parser.parse_args(arguments)

    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        return _refuse(f"{KEY_VARIABLE} is not set; it holds the key that clients must present")
    try:
        app = create_app(options.target, [key], heartbeat_seconds=options.heartbeat_seconds)
    except ValueError as error:
        return _refuse(f"{KEY_VARIABLE} cannot be used: {error}")
    try:
        listener = listen(options.host, options.port)
    except OSError as error:
        return _refuse(_why_not_listening(options.host, options.port, error))

    end_with_parent()
    set_up_logging()
    # Both signals raise KeyboardInterrupt before and after uvicorn waits for them itself.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    host, port = listener.getsockname()[:2]
    logger.info("listening on http://%s:%d for the service at %s", host, port, options.target)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            ws="none",
        )
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return 0 if server.started else 1


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to from now on; raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def set_up_logging() -> None:
    """Warnings of everything, and what the gateway itself has to say, as lines on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_is_news)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logger.setLevel(logging.INFO)


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
