"""The figures that show whether a server follows the files of its keys and its certificate."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge


def report_failed_reload(registry: CollectorRegistry, has_failed: Callable[[], bool]) -> None:
    """Adds the gauge `mixtral_keys_reload_failed` to the metrics of a process.

    Args:
        registry: The metrics of the process.
        has_failed: Returns True while older keys are in use, because the file cannot be read.
    """
    gauge = Gauge(
        "mixtral_keys_reload_failed",
        "1 while the file of keys cannot be read again, and a removed key still opens; else 0.",
        registry=registry,
    )
    gauge.set_function(lambda: float(has_failed()))


def report_failed_certificate(
    registry: CollectorRegistry, has_failed: Callable[[], bool], name: str = "mixtral_certificate"
) -> None:
    """Adds the gauge NAME_reload_failed to the metrics of a process.

    Args:
        registry: The metrics of the process.
        has_failed: Returns True while an older certificate is in use, because its files, which have
            changed, cannot be used.
        name: The certificate: `mixtral_certificate` is the one that clients are shown,
            `mixtral_service_certificate` what a gateway needs to reach the service.
    """
    gauge = Gauge(
        f"{name}_reload_failed",
        "1 while the files of the certificate have changed and cannot be used; else 0.",
        registry=registry,
    )
    gauge.set_function(lambda: float(has_failed()))
