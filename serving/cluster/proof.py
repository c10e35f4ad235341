"""Proofs that the two ends of a group's stream have the key of the group, without sending it.

Each end chooses a nonce and answers the other's by HMAC-SHA-256 (RFC 2104) of its role and both
nonces, under the key. A stranger who listens at the leader's port, or who joins, learns nothing
that it could show to anybody else: a proof counts for one stream and one direction.
"""

import hashlib
import hmac
import secrets
from typing import Literal

NONCE = "group-nonce"
"""Name of the metadata with the nonce of the end that sends it, in hexadecimal."""
PROOF = "group-proof"
"""Name of the metadata with the leader's proof, in hexadecimal."""
NONCE_LENGTH = 64
"""Length of a nonce in hexadecimal digits."""


def new_nonce() -> str:
    """Returns 32 random bytes in hexadecimal."""
    return secrets.token_hex(NONCE_LENGTH // 2)


def proof_of(
    key: str, role: Literal["leader", "follower"], leader_nonce: str, follower_nonce: str
) -> bytes:
    """Returns the 32 bytes by which an end of the stream proves that it has the key."""
    text = f"mixtral.group.v1 {role} {leader_nonce} {follower_nonce}"
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).digest()


def is_nonce(text: str) -> bool:
    """Returns True for what `new_nonce` may have returned."""
    return len(text) == NONCE_LENGTH and all(digit in "0123456789abcdef" for digit in text)
