"""The port at which Prometheus reads the metrics of a process."""

from prometheus_client import CollectorRegistry, start_http_server

from serving.errors import SetupError


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> str:
    """Serves a registry over HTTP from a thread; returns its URL, which ends in /metrics.

    Args:
        registry: The figures.
        host: The address to listen on. Whoever reaches it can read the figures.
        port: The port; 0 takes any free one.

    Raises:
        SetupError: The address is not one of this machine, or the port is taken.
    """
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise SetupError(
            f"cannot listen on {host}:{port} ({error.strerror}); stop what runs there or choose "
            "another with --metrics-port and --metrics-host"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{server.server_port}/metrics"
