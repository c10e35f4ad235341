"""Memory of one device for pages of keys and values: most of what the weights leave."""

OF_FREE = 0.9
# Share of the chip's memory that is set aside for temporaries and programs.
TEMPORARY_SHARE = 0.05


def temporary_memory(capacity: int) -> int:
    """Bytes for the intermediate results of a step, of a device of `capacity` bytes."""
    return int(TEMPORARY_SHARE * capacity)


def page_memory(capacity: int, held: int) -> int:
    """Bytes for pages on a device of `capacity` bytes, of which weights hold `held`."""
    free = capacity - held
    return max(0, min(int(OF_FREE * free), free - temporary_memory(capacity)))
