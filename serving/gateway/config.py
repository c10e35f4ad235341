"""Where the gateway keeps what it knows of requests, and the flags that say so."""

import argparse
import sys
from dataclasses import dataclass, field

from serving.accounting.accounts import Accounts
from serving.accounting.ledger import IN_MEMORY, UsageLedger
from serving.accounting.rate_limits import RateLimits
from serving.gateway.http.metrics import GatewayMetrics
from serving.observe.logs import FORMATS
from serving.observe.tracing import Traces


@dataclass(frozen=True, kw_only=True)
class Books:
    """All of it: by default in memory, where it is lost at the end."""

    accounts: Accounts = field(default_factory=Accounts)
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    traces: Traces = field(default_factory=Traces)
    log_prompts: bool = False

    def close(self) -> None:
        """Writes and sends what waits to be."""
        self.accounts.close()
        self.traces.close()


def add_book_flags(parser: argparse.ArgumentParser) -> None:
    """Adds them; `books_of` reads all but --log-format."""
    parser.add_argument(
        "--metrics-port", type=int, help="for Prometheus, on 127.0.0.1; 0: any; default: none"
    )
    parser.add_argument("--otlp-endpoint", metavar="URL", help="where traces go; default: nowhere")
    parser.add_argument("--log-format", choices=FORMATS, default="text", help="of lines on stderr")
    parser.add_argument(
        "--log-prompts", action="store_true", help="log what is asked and answered, all of it"
    )
    parser.add_argument(
        "--usage-db",
        metavar="FILE",
        default=IN_MEMORY,
        help="SQLite, where the usage of each caller is kept; default: in memory",
    )
    for what in ("requests", "tokens"):
        parser.add_argument(
            f"--max-{what}-per-minute",
            type=_positive,
            metavar="N",
            help="of each caller, then 429; default: no limit",
        )


def books_of(options: argparse.Namespace) -> Books:
    """What the flags ask for, and serves the metrics if they do.

    Raises ValueError where that cannot be had.
    """
    rates = RateLimits(options.max_requests_per_minute, options.max_tokens_per_minute)
    traces = Traces.exported(options.otlp_endpoint, "gateway")
    metrics = GatewayMetrics()
    if options.metrics_port is not None:
        try:
            port = metrics.serve(options.metrics_port)
        except OSError as error:
            raise ValueError(
                f"cannot listen on 127.0.0.1:{options.metrics_port} ({error.strerror}); stop what "
                "runs there or choose another with --metrics-port"
            ) from None
        print(f"gateway: metrics on http://127.0.0.1:{port}/metrics", file=sys.stderr, flush=True)
    return Books(
        accounts=Accounts(rates, UsageLedger(options.usage_db)),
        metrics=metrics,
        traces=traces,
        log_prompts=options.log_prompts,
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number
