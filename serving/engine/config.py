"""Configuration of an engine, as the operator gave it."""

from dataclasses import dataclass, fields

from mixtral_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Says which model an engine runs, and how. The numbers are those of all devices together.

    Raises ConfigError for a number below 1.
    """

    model: str
    """A checkpoint folder, or "tiny-random"."""
    dtype: str | None
    """Type of the weights; None: as they are stored."""
    mesh: str
    """Sizes of the mesh's axes, such as "data=1,expert=8,tensor=1", or "auto"."""
    dp_attention: bool
    """Split sequences instead of heads over the mesh's expert axis."""
    max_sequences: int
    max_step_tokens: int
    max_waiting: int
    """Requests in the queue."""
    kv_memory: int | None
    """MiB of keys and values on each device; None: a part of what is free."""
    kv_dtype: str | None
    """Type of keys and values: "int8"; None: as they are computed."""
    prefix_reuse: bool
    deterministic: bool
    """Answer equal requests equally, whatever runs beside them."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                flag = f"--{field.name.replace('_', '-')}"
                raise ConfigError(f"{flag} is {value}; it must be at least 1")
        if self.kv_dtype not in (None, "int8"):
            raise ConfigError(f"--kv-dtype is {self.kv_dtype!r}; give int8, or leave it out")
