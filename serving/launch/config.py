"""The settings of the service's process that belong to no other room."""

from dataclasses import dataclass
from pathlib import Path

from mixtral_jax.errors import ConfigError


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
    service_processes: int = 1
    """Processes that read requests and write text; with more than one the engine has its own."""
    text_port: tuple[int, ...] = ()
    """Ports of gRPC on 127.0.0.1, one for each of several such processes alone."""
    drain_delay: float = 0.0
    """Time after such a signal in which requests are still served, while readiness fails."""
    step_timeout: float = 60.0
    """Time that a step of the engine may take before the process ends with status 1."""
    stream_interval: int = 1
    """Tokens of a chunk of a stream, but for the first one and the last one."""
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

    def __post_init__(self) -> None:
        if self.service_processes < 1:
            raise ConfigError(
                f"--service-processes is {self.service_processes}; it must be at least 1"
            )
        if self.text_port and len(self.text_port) != self.service_processes:
            raise ConfigError(
                f"--text-port is given {len(self.text_port)} times, and --service-processes is "
                f"{self.service_processes}; give a port for each process, or none"
            )
        if self.text_port and self.service_processes == 1:
            raise ConfigError(
                "--text-port is for several processes; leave it out, or give --service-processes 2"
            )
