"""The settings of the service's process that belong to no other room."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Says where the service listens, how it is watched, and how it ends."""

    port: int
    """Port of gRPC; 0 takes any."""
    drain_seconds: float
    """Time that running answers may take to finish after a signal to end."""
    metrics_host: str
    """Address of the port for Prometheus."""
    metrics_port: int | None
    """Port for Prometheus; None: no metrics are served."""
    otlp_endpoint: str | None
    """URL of the collector that traces are sent to."""
    max_bytes_per_token: int
    """Most bytes of a prompt's text for each token of the context."""
    log_format: str
    """One of serving.observe.logs.FORMATS."""
    drain_delay: float = 0.0
    """Time after such a signal in which requests are still served, while readiness fails."""
    step_timeout: float = 60.0
    """Time that a step of the engine may take before the process ends with status 1."""
    profile: Path | None = None
    """Folder of the profiles that SIGUSR1 starts; None: none are made."""
    profile_seconds: float = 10.0
    """Time after which a profile ends by itself."""
    generation_config: str = "auto"
    """Where the model's sampling defaults are read: "auto", "vllm" for none, or a folder."""
    override_generation_config: str | None = None
    """JSON object of sampling defaults that replace those."""
    model_alias: tuple[str, ...] = ()
    """Other names under which requests mean the model itself; "*" for all that no adapter has."""
