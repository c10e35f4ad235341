"""The settings of a gateway, as the operator gave them."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from serving.access.tls import ServiceTls
from serving.accounting.config import AccountingConfig
from serving.channel import target_of
from serving.errors import SetupError

_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")


class GatewayError(SetupError):
    """Settings that a gateway cannot work with; the message names the flag."""


@dataclass(frozen=True, kw_only=True)
class GatewayConfig(AccountingConfig):
    """Says which service a gateway asks, and what it does with requests.

    Raises GatewayError if the targets cannot be used together.
    """

    target: tuple[str, ...]
    """Addresses of the model service, as `serving.channel.target_of` reads them."""
    gateway_key: str = field(repr=False)
    """Key that is presented to the service."""
    service_ca: Path | None
    service_cert: Path | None
    service_key: Path | None
    """Private key of `service_cert`."""
    service_name: str | None
    port: int
    """Port of HTTP; 0 takes any."""
    heartbeat_seconds: float
    """Silence after which a stream sends a chunk without choices."""
    drain_seconds: float
    """Time that running answers may take to finish after a signal to end."""
    model_type: str | None
    """Type of the model in /info; None: as the service says."""
    cors_origin: tuple[str, ...]
    """Origins whose pages in browsers may ask; "*" stands for all."""
    metrics_host: str
    """Address of the port for Prometheus."""
    metrics_port: int | None
    """Port for Prometheus; None: no metrics are served."""
    otlp_endpoint: str | None
    """URL of the collector that traces are sent to."""
    log_format: str
    """One of serving.observe.logs.FORMATS."""
    trust_traceparent: bool
    """Continue the traces of clients instead of linking to them."""
    log_prompts: bool
    """Log the full text of prompts and answers."""
    usage_details: bool = False
    """Tell the cached tokens of prompts on OpenAI's paths of chats and texts."""
    metrics_route: str = "operators"
    """Who may ask for /metrics: "operators", "open" for everybody, "off" for nobody."""
    root_path: str = ""
    """The path before all routes under which a proxy publishes the gateway."""
    ignore_hosted_tools: bool = False
    """Leave out tools that only OpenAI or Anthropic can run, instead of refusing them."""
    page: bool = True
    """Serve the page to chat with."""
    gateway_processes: int = 1
    """Processes that answer, at one port and with one ledger."""
    drain_delay: float = 0.0
    """Time after such a signal in which requests are still served, while readiness fails."""

    def __post_init__(self) -> None:
        try:
            target_of(self.target)
        except ValueError as error:
            raise GatewayError(f"--target cannot be used: {error}") from None
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            raise GatewayError(
                f"--root-path is {self.root_path!r}; give a path such as /models/mixtral, which "
                "begins with a slash and ends with none"
            )

    @property
    def address(self) -> str:
        """All targets as the one that gRPC takes."""
        return target_of(self.target)

    def service_tls(self) -> ServiceTls | None:
        """Reads the certificates of the connection to the service. Raises AccessError."""
        return ServiceTls.of_flags(
            self.service_ca, self.service_cert, self.service_key, self.service_name
        )
