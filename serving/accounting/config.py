"""The settings of accounting: what callers may use and share, and where their use is kept."""

from dataclasses import dataclass
from fractions import Fraction

from serving.access.caller import CallerLimits
from serving.errors import SetupError


class AccountingError(SetupError):
    """Settings of limits that mean nothing; the message names the flag."""


@dataclass(frozen=True, kw_only=True)
class AccountingConfig:
    """Says what callers may use. The gateway and the service have the same values.

    Raises AccountingError for a number that is out of its range.
    """

    max_requests_per_minute: int | None
    """Requests of each caller in a minute; None: no limit."""
    max_tokens_per_minute: int | None
    """Tokens of prompts and answers of each caller in a minute; None: no limit."""
    max_concurrent_requests: int | None
    """Requests of each caller that are answered at the same time; None: no limit."""
    limit_share: str
    """The part of all these limits that this process enforces, such as "1/3"."""
    assumed_max_tokens: int
    """Tokens that are reserved for an answer whose request sets no max_tokens."""
    cached_token_charge: float
    """The part of a cached token of a prompt that counts against limits, from 0 to 1."""
    usage_db: str
    """SQLite file of each caller's usage, or ":memory:"."""
    share_prefixes: bool
    """Callers share computed prefixes with one another."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise AccountingError(
                f"--limit-share is {self.limit_share}; give a number above 0 and up to 1"
            )
        if not 0 <= self.cached_token_charge <= 1:
            raise AccountingError(
                f"--cached-token-charge is {self.cached_token_charge:g}; give 0 to 1"
            )

    @property
    def share(self) -> Fraction:
        """`limit_share` as a number."""
        try:
            return Fraction(self.limit_share)
        except (ValueError, ZeroDivisionError):
            raise AccountingError(
                f"--limit-share is {self.limit_share!r}; give a fraction such as 1/3"
            ) from None

    @property
    def limits(self) -> CallerLimits:
        """The limits of every caller for which its own key does not say otherwise."""
        return CallerLimits(
            requests_per_minute=self.max_requests_per_minute,
            tokens_per_minute=self.max_tokens_per_minute,
            concurrent_requests=self.max_concurrent_requests,
        )
