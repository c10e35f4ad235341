"""Number of values in a JSON text, bounded before the text becomes objects.

An empty list in JSON is two bytes, and in memory thirty times as many: what a body of a few
megabytes becomes is bounded by the number of its values, not by its bytes.
"""

from serving.errors import InvalidRequest

MAX_VALUES = 2**17 + 2**12
"""Most values of a body: the ids of the longest prompt, and all else beside them."""


def check_values(body: bytes) -> None:
    """Raises InvalidRequest if a JSON text has more than MAX_VALUES values.

    Every value but the first of a list or an object stands behind a comma, and every list or object
    begins with a bracket. Texts are looked at only where these characters are many, and that takes
    milliseconds.
    """
    if _count(body) <= MAX_VALUES:
        return
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # no quotation mark is escaped now
    # Beside each value there may be a key, and each of them has two quotation marks.
    if plain.count(b'"') > 4 * MAX_VALUES or _count(b"".join(plain.split(b'"')[::2])) > MAX_VALUES:
        raise InvalidRequest(
            f"the body has too many values; give at most {MAX_VALUES:,} in all lists together"
        )


def _count(body: bytes) -> int:
    return body.count(b",") + body.count(b"[") + body.count(b"{")
