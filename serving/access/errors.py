"""The error of a server that cannot let callers in as its operator asked."""

from serving.errors import SetupError


class AccessError(SetupError):
    """Keys, tokens or certificates that cannot be used; the message names the flag."""
