"""Number of fields in a message, bounded before its bytes become objects.

An empty message in a list is two bytes, and in memory thirty times as many: the parser makes a
quarter of a gigabyte of 8 MB, on the event loop. Packed numbers are one field.
"""

from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import Descriptor

from serving.errors import InvalidRequest

MAX_FIELDS = 2**14
"""Fields of a message and of those in it; 2,048 messages of a chat have a third as many."""
_SMALL = 2**16  # bytes of a message that is parsed without being counted
# Bytes of fields that this version does not have: the parser keeps them as long as the message.
_MAX_UNKNOWN = 2**16
# How many bytes a field's value has, by its wire type, where the type says it.
_FIXED_SIZES = {1: 8, 5: 4}
_VARINT, _BYTES = 0, 2
_GROUPS = (3, 4)  # begin and end of a group, which version 3 does not have, but its parsers read


def counting(deserialize: Any) -> Callable[[bytes], Any]:
    """Returns a parser of messages that raises InvalidRequest as `check_fields` does.

    `deserialize` is the method FromString of the message's class.
    """
    descriptor: Descriptor = deserialize.__self__.DESCRIPTOR

    def parse(data: bytes) -> Any:
        if len(data) > _SMALL:
            check_fields(data, descriptor)
        return deserialize(data)

    return parse


def check_fields(data: bytes, descriptor: Descriptor) -> None:
    """Raises InvalidRequest if a message has more than MAX_FIELDS fields, or much that is unknown.

    Unknown are fields that its type does not have, and groups. Without a bound they could be all of
    a message, and it would be kept in memory as long as its answer runs.

    What is no message at all may pass: the parser refuses it. Source of the format:
    https://protobuf.dev/programming-guides/encoding/
    """
    room, unknown = MAX_FIELDS, 0
    waiting = [(0, len(data), descriptor)]  # messages that are to be counted
    while waiting:
        start, end, message = waiting.pop()
        while start < end:
            room -= 1
            if room < 0:
                raise InvalidRequest(
                    f"the message has more than {MAX_FIELDS:,} fields; send fewer, and lists of "
                    "numbers packed"
                )
            tag, start = _varint(data, start)
            wire = tag & 7
            if wire == _VARINT:
                _, start = _varint(data, start)
            elif wire == _BYTES:
                size, start = _varint(data, start)
                field = message.fields_by_number.get(tag >> 3)
                if field is None:
                    unknown += size
                elif field.message_type is not None:
                    waiting.append((start, min(start + size, end), field.message_type))
                start += size
            elif wire in _FIXED_SIZES:
                start += _FIXED_SIZES[wire]
            elif wire in _GROUPS:
                raise InvalidRequest("the message has a group; send fields of version 3 alone")
            else:
                return  # what no message has
            if unknown > _MAX_UNKNOWN:
                raise InvalidRequest(
                    f"the message has more than {_MAX_UNKNOWN:,} bytes in fields that this server "
                    "does not know; leave them out"
                )


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """Returns the number at a place, and the place behind it."""
    value = shift = 0
    for place in range(start, min(start + 10, len(data))):
        value |= (data[place] & 127) << shift
        if data[place] < 128:
            return value, place + 1
        shift += 7
    return 0, len(data)  # cut off, or no number
