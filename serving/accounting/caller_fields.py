"""The fields of a call that say who asks: caller, salt of its prefixes, and class.

The gateway writes them into the calls that it sends under its own key, and the service into those
that callers send to it directly, so that a caller is the same by HTTP and by gRPC.
"""

import hashlib
import hmac
import secrets

from serving.access.caller import Caller
from serving.errors import Forbidden
from serving.proto import inference_pb2 as pb

# The fields that only the gateway may set, in the words of the proto.
NAMES = ("caller", "cache_salt", "priority", "suspect")


class CallerFields:
    """Writes who asks into calls.

    A salt is an HMAC-SHA256 (RFC 2104) of the caller's name and of the salt that the client chose,
    under the gateway's key to the service. So nobody can name another's salt, and a client's own
    can only narrow what is shared.

    Args:
        key: The gateway's key to the service, the same in all processes of a deployment; without
            it a random one, whose salts no other process makes.
        share_prefixes: Whether callers share computed prefixes with one another.
    """

    def __init__(self, key: str | None, *, share_prefixes: bool = False) -> None:
        self._key = key.encode() if key else secrets.token_bytes(32)
        self._share_prefixes = share_prefixes

    def write(
        self,
        message: pb.GenerateRequest,
        caller: Caller,
        cache_salt: str | None = None,
        priority: pb.Priority = pb.PRIORITY_UNSPECIFIED,
    ) -> None:
        """Writes a caller's name, salt and class into a call.

        Args:
            message: The call.
            caller: The caller.
            cache_salt: The salt that the client itself has chosen.
            priority: The class that it has asked for, which it gets if it may.
        """
        message.caller = caller.name
        message.cache_salt = self.salt(caller.name, cache_salt)
        message.priority = priority if caller.may_be_interactive else pb.PRIORITY_BATCH

    def salt(self, caller: str, cache_salt: str | None = None) -> bytes:
        """Returns the 32 bytes under which the caller's prefixes are shared.

        Without a salt of its own a caller shares with itself, or with everybody if prefixes are
        shared; with one it shares only with itself under that salt.
        """
        if cache_salt is None:
            content = b"all" if self._share_prefixes else b"caller\0" + caller.encode()
        else:
            name = caller.encode()
            content = b"own\0%d\0%b%b" % (len(name), name, cache_salt.encode())
        return hmac.digest(self._key, content, hashlib.sha256)


def refuse_caller_fields(message: pb.GenerateRequest) -> None:
    """Raises Forbidden if a call that is not the gateway's says who asks."""
    for name in NAMES:
        if getattr(message, name):
            raise Forbidden(
                f"{name} is set by the gateway under its own key; leave it out: the caller is the "
                "one whose key it is"
            )
