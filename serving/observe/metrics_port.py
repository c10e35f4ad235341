"""The port at which Prometheus reads the metrics of a process."""

from prometheus_client import CollectorRegistry, start_http_server

from serving.errors import SetupError

HOST = "127.0.0.1"


def serve_metrics(registry: CollectorRegistry, port: int) -> int:
    """Serves a registry at http://127.0.0.1:PORT/metrics from a thread; returns the port.

    Port 0 takes any free one. Raises SetupError if the port is taken.
    """
    try:
        server, _ = start_http_server(port, addr=HOST, registry=registry)
    except OSError as error:
        raise SetupError(
            f"cannot listen on {HOST}:{port} ({error.strerror}); stop what runs there or choose "
            "another with --metrics-port"
        ) from None
    return int(server.server_port)
