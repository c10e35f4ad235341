"""`python -m serving.gateway`: the HTTP endpoint before a model service."""

import asyncio
import contextlib
import errno
import logging
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from serving.access.config import AccessConfig
from serving.access.credentials import Access
from serving.access.renewal import RenewedContext
from serving.access.tls import Certificate
from serving.accounting.accounts import Accounts
from serving.accounting.ledger_server import LedgerServer
from serving.channel import join_address
from serving.command_line import app_of, command, run
from serving.flags import GATEWAY, arguments, record
from serving.gateway.answering import Limits
from serving.gateway.app import create_app
from serving.gateway.config import GatewayConfig, GatewayError
from serving.gateway.event_stream import StreamAborted
from serving.gateway.http.connections import Connections
from serving.gateway.http.drain import Drain
from serving.gateway.http.failures import refuse_while_draining
from serving.gateway.http.limits import HttpLimits
from serving.gateway.http.metrics import GatewayMetrics
from serving.gateway.http.server import HttpServer
from serving.gateway.processes.member import Member, http_share, room_share
from serving.gateway.processes.parent import run_processes
from serving.observe.gathered import GatheredFigures
from serving.observe.key_reloads import report_failed_certificate
from serving.observe.logs import set_up
from serving.observe.metrics_port import serve_metrics
from serving.open_files import raise_open_files
from serving.parent import end_with_parent

# Warnings of uvicorn about requests, for which the access log has a line that says more.
_SAID = ("Invalid HTTP request", "Unsupported upgrade request", "No supported WebSocket library")
# Files of a gateway that are no connections of clients: logs, the ledger, gRPC, keys.
_OTHER_FILES = 64

logger = logging.getLogger("serving.gateway")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until a signal ends it; returns the exit status."""
    app = app_of(command(_serve, GATEWAY))
    return run(app, arguments, program="python -m serving.gateway")


def _serve(given: dict[str, Any]) -> None:
    """Serve HTTP in front of a model service until SIGTERM or SIGINT.

    Keys come from the environment, where no list of processes shows them: MIXTRAL_JAX_API_KEY
    holds one that clients present, MIXTRAL_JAX_SERVICE_KEY the one that is presented to the
    service, where the same must be set.

    A signal ends it with status 0 when running answers have finished, or after --drain-seconds.
    """
    access = record(AccessConfig, given, admits_gateway=False)
    door = access.access()
    config = record(GatewayConfig, given, gateway_key=access.key_for_service())
    http = record(HttpLimits, given)
    if Member.is_this():
        _serve_at(access, door, config, http_share(http, config.gateway_processes), Member(config))
    elif config.gateway_processes > 1:
        _serve_by_processes(access, config, http)
    else:
        _serve_at(access, door, config, http, None)


def _serve_by_processes(access: AccessConfig, config: GatewayConfig, http: HttpLimits) -> None:
    """Serves by several processes, whose accounts and figures this one has."""
    accounts, figures = Accounts.of(config), GatheredFigures()
    try:
        with (
            listen(access.host, config.port) as listener,
            LedgerServer(accounts, figures) as ledger,
        ):
            _show_metrics(config, figures.registry)
            end_with_parent()
            set_up("serving", config.log_format, _is_news)
            _say_listening(listener, config, access.certificate())
            options = arguments(config, access, http)
            seconds = config.drain_delay + config.drain_seconds
            run_processes(config.gateway_processes, options, listener, ledger.address, seconds)
    finally:
        accounts.close()


def _serve_at(
    access: AccessConfig,
    door: Access,
    config: GatewayConfig,
    http: HttpLimits,
    member: Member | None,
) -> None:
    """Serves in this process: alone, or as a member of several."""
    certificate, metrics = access.certificate(), GatewayMetrics()
    # `create_app` puts the drain around the application.
    drain = Drain(
        refuse_while_draining, refuse_while_draining, config.drain_seconds, config.drain_delay
    )
    limits = Limits(
        config.heartbeat_seconds,
        body_seconds=http.body_seconds,
        body_room=room_share(config.gateway_processes),
    )
    accounts = None if member is None else member.accounts
    with listen(access.host, config.port) if member is None else member.listener as listener:
        app = create_app(
            config, door, accounts=accounts, metrics=metrics, limits=limits, drain=drain
        )
        end_with_parent()
        set_up("serving", config.log_format, _is_news)
        if member is None:
            _show_metrics(config, metrics.registry)
            _say_listening(listener, config, certificate)
        else:
            metrics.report = lambda: member.accounts.sums(metrics.text())
        # Both signals raise KeyboardInterrupt before and after uvicorn waits for them itself.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        connections = Connections(_within_files(http), metrics, http.proxies())
        settings = _uvicorn(app, http, certificate)
        if certificate is not None:
            _renew(settings, certificate, metrics)
        server = HttpServer(settings, drain, listener, connections)
        if member is not None:
            settings.callback_notify = partial(_show_life, member, metrics, server)
            settings.timeout_notify = 0  # uvicorn asks every second
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    if not server.started:
        raise SystemExit(1)  # uvicorn has said why
    if member is not None and member.accounts.was_lost:
        raise SystemExit(1)  # to be started again


async def _show_life(member: Member, metrics: GatewayMetrics, server: HttpServer) -> None:
    """Tells the parent every second that this process goes on; ends it without the ledger."""
    if not member.show_life(metrics.text()):
        server.should_exit = True


def _show_metrics(config: GatewayConfig, registry: CollectorRegistry) -> None:
    if config.metrics_port is not None:
        url = serve_metrics(registry, config.metrics_host, config.metrics_port)
        print(f"gateway: metrics on {url}", file=sys.stderr, flush=True)


def _say_listening(
    listener: socket.socket, config: GatewayConfig, certificate: Certificate | None
) -> None:
    scheme = "https" if certificate else "http"
    host, port = listener.getsockname()[:2]
    address = f"{scheme}://{join_address(host, port)}"
    logger.info("listening on %s for the service at %s", address, config.address)


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that clients can connect to from now on. Raises GatewayError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise GatewayError(
                f"port {port} of {host} is in use; stop what uses it, or choose another with --port"
            ) from None
        raise GatewayError(
            f"cannot listen on port {port} of {host}: {error}; see --host and --port"
        ) from None


def _uvicorn(app: FastAPI, http: HttpLimits, certificate: Certificate | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        log_level="warning",
        proxy_headers=bool(http.forwarded_allow_ips),
        forwarded_allow_ips=list(http.forwarded_allow_ips),
        server_header=False,
        ssl_certfile=certificate.chain if certificate else None,
        ssl_keyfile=certificate.key if certificate else None,
        timeout_graceful_shutdown=1,  # for what is still open after the drain
        ws="none",
    )


def _renew(settings: uvicorn.Config, certificate: Certificate, metrics: GatewayMetrics) -> None:
    """Makes the server show the newest certificate in each handshake."""
    renewed = RenewedContext(certificate)
    report_failed_certificate(metrics.registry, lambda: renewed.reload_failed)
    settings.load()
    assert settings.ssl is not None
    renewed.attach(settings.ssl)


def _within_files(http: HttpLimits) -> HttpLimits:
    """Raises the process's limit of open files, and returns limits of connections below it."""
    files = raise_open_files()
    allowed = max(1, files - _OTHER_FILES)
    if files == resource.RLIM_INFINITY or http.max_connections <= allowed:
        return http
    logger.warning(
        "at most %d connections instead of %d, because this process may open %d files; raise its "
        "hard limit (ulimit -n), or give a lower --max-connections",
        *(allowed, http.max_connections, files),
    )
    return replace(
        http,
        max_connections=allowed,
        max_connections_per_address=min(http.max_connections_per_address, allowed),
    )


def _is_news(entry: logging.LogRecord) -> bool:
    """Returns False for what has been logged in one line already."""
    if str(entry.msg).startswith(_SAID):
        return False
    error = entry.exc_info[1] if entry.exc_info else None
    # uvicorn says itself how many answers it cancels when the grace is over.
    return not isinstance(error, (StreamAborted, asyncio.CancelledError))


if __name__ == "__main__":
    sys.exit(main())
