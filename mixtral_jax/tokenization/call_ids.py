"""Ids of tool calls: nine letters and digits, which is what Mistral's formats demand.

Histories hold ids of any form, because each vendor's servers make their own.
"""

import hashlib
import re
import secrets
import string

_ALPHABET = string.ascii_letters + string.digits
ID_LENGTH = 9  # letters and digits of an id
_RIGHT_FORM = re.compile(r"[a-zA-Z0-9]{9}")


def new_call_id() -> str:
    """Returns a random id. Two of a million equal each other with a chance of 4 in 100,000."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(ID_LENGTH))


class CallIds:
    """The ids of one chat, each mapped to one of the right form: always the same, no two alike.

    Ids of the right form stay as they are. Others become letters and digits of a hash, so that the
    next request of a conversation has the same ids and finds its prefix in the cache.
    """

    def __init__(self) -> None:
        self._mapped: dict[str, str] = {}
        self._taken: set[str] = set()

    def map(self, call_id: str) -> str:
        """Returns the id of nine letters and digits that stands for `call_id`."""
        if (known := self._mapped.get(call_id)) is not None:
            return known
        mapped = call_id if _RIGHT_FORM.fullmatch(call_id) else _hashed(call_id)
        while mapped in self._taken:
            mapped = _hashed(f"{call_id} {mapped}")
        self._mapped[call_id] = mapped
        self._taken.add(mapped)
        return mapped


def _hashed(text: str) -> str:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    letters = []
    for _ in range(ID_LENGTH):
        number, place = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[place])
    return "".join(letters)
