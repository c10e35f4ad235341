"""The settings of accounting: what callers may use and share, and where their use is kept."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AccountingConfig:
    """Says what callers may use. The gateway and the service have the same values."""

    max_requests_per_minute: int | None
    """Requests of each caller in a minute; None: no limit."""
    max_tokens_per_minute: int | None
    """Tokens of prompts and answers of each caller in a minute; None: no limit."""
    usage_db: str
    """SQLite file of each caller's usage, or ":memory:"."""
    share_prefixes: bool
    """Callers share computed prefixes with one another."""
