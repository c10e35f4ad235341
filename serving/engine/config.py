"""Configuration of an engine, as the operator gave it."""

from dataclasses import dataclass, fields
from pathlib import Path

from mixtral_jax.errors import ConfigError

# Adapters that are loaded at the same time, unless the operator names more.
_ADAPTERS = 8
# A page is a whole number of the rows that kernels read at once, and of the blocks of others.
PAGE_SIZES = (16, 32, 64, 128, 256)
_STORES = ("gs://", "s3://")


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
    max_sequences: int | None
    """Sequences of a step; None: by chip."""
    max_step_tokens: int | None
    """Tokens of a step; None: by chip."""
    max_waiting: int
    """Requests in the queue."""
    kv_memory: int | None
    """MiB of keys and values on each device; None: a part of what is free."""
    kv_dtype: str | None
    """Type of keys and values: "int8", "fp8" or the activations' own; None: by chip."""
    prefix_reuse: bool
    deterministic: bool
    """Answer equal requests equally, whatever runs beside them."""
    adapter: tuple[str, ...] = ()
    """Adapters that are loaded at the start, each as NAME=FOLDER."""
    adapters_folder: str | None = None
    """Folder whose subfolders are adapters, which come and go while the engine runs."""
    max_adapters: int | None = None
    """Adapters that are loaded at the same time; None: see `num_adapters`."""
    max_adapter_rank: int = 16
    """Largest rank of an adapter."""
    page_size: int | None = None
    """Tokens of a page of keys and values; None: by the kernels."""
    step_buckets: str | None = None
    """Numbers of tokens that a step is padded to, with commas between; None: by chip."""
    max_decode_slowdown: float = 2.3
    """Times that prompts may lengthen a step in which answers go on; infinite: any."""
    speculate: str | None = None
    """How the next tokens of answers are guessed: "lookup"; None: they are not."""
    draft_model: str | None = None
    """A checkpoint folder, or "tiny-random": a smaller model that guesses the next tokens."""
    expert_metrics: bool = False
    """Count the tokens that each expert of each layer gets."""

    @property
    def adapters(self) -> dict[str, Path | str]:
        """The folders of `adapter`, or their URLs in a store, by the names of the adapters."""
        pairs = [text.partition("=")[::2] for text in self.adapter]
        return {name: place if "://" in place else Path(place) for name, place in pairs}

    @property
    def reads_predictions(self) -> bool:
        """True if tokens are guessed from what a caller says that the answer may repeat."""
        return self.speculate == "lookup"

    @property
    def buckets(self) -> tuple[int, ...]:
        """The numbers of `step_buckets`; empty where they are chosen by chip."""
        return tuple(int(size) for size in (self.step_buckets or "").split(",") if size)

    @property
    def num_adapters(self) -> int:
        """The number of adapters that an engine keeps memory for; 0: it computes none."""
        if not self.adapter and self.adapters_folder is None:
            return 0
        return self.max_adapters or max(_ADAPTERS, len(self.adapter))

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                flag = f"--{field.name.replace('_', '-')}"
                raise ConfigError(f"{flag} is {value}; it must be at least 1")
        if self.kv_dtype not in (None, "int8", "fp8", "bfloat16", "float32"):
            raise ConfigError(
                f"--kv-dtype is {self.kv_dtype!r}; give int8, fp8, bfloat16 or float32, or leave "
                "it out"
            )
        if self.speculate not in (None, "lookup"):
            raise ConfigError(f"--speculate is {self.speculate!r}; give lookup, or leave it out")
        if self.speculate is not None and self.draft_model is not None:
            raise ConfigError(
                "--speculate lookup and --draft-model both guess the next tokens; give one of them"
            )
        flag = "--speculate" if self.draft_model is None else "--draft-model"
        is_guessed = self.speculate is not None or self.draft_model is not None
        if is_guessed and self.max_sequences == 1:
            raise ConfigError(
                f"{flag} has no row for a guess with --max-sequences 1; give 8 or more, or "
                "leave one of the two out"
            )
        if not self.max_decode_slowdown > 1:
            raise ConfigError(
                f"--max-decode-slowdown is {self.max_decode_slowdown}; prompts need time beside "
                "answers: give more than 1, such as 2.3, or inf for no bound"
            )
        self._check_sizes()
        self._check_adapters()

    def _check_sizes(self) -> None:
        if self.page_size is not None and self.page_size not in PAGE_SIZES:
            known = ", ".join(map(str, PAGE_SIZES))
            raise ConfigError(f"--page-size is {self.page_size}; give one of {known}")
        if (self.max_step_tokens or 0) < (self.max_sequences or 0) and self.max_step_tokens:
            raise ConfigError(
                f"--max-step-tokens is {self.max_step_tokens} and --max-sequences is "
                f"{self.max_sequences}; a step computes a token of every sequence at least: give "
                f"--max-step-tokens {self.max_sequences} or more, or fewer sequences"
            )
        if self.step_buckets is None:
            return
        texts = self.step_buckets.split(",")
        sizes = [int(text) if text.isdecimal() else 0 for text in texts]
        if min(sizes) < 1 or sizes != sorted(set(sizes)):
            raise ConfigError(
                f"--step-buckets is {self.step_buckets!r}; give numbers from small to large, such "
                "as 8,64,512"
            )

    def _check_adapters(self) -> None:
        for text in self.adapter:
            if not all(text.partition("=")):
                raise ConfigError(f"--adapter is {text!r}; give NAME=FOLDER")
        if len(self.adapters) < len(self.adapter):
            raise ConfigError("--adapter gives a name twice; give each adapter its own")
        if len(self.adapter) > self.num_adapters:
            raise ConfigError(
                f"--adapter names {len(self.adapter)} adapters; --max-adapters is "
                f"{self.max_adapters}, give at least as many"
            )
        if self.max_adapters is not None and not self.num_adapters:
            raise ConfigError(
                "--max-adapters has no adapters; give --adapter or --adapters-folder too"
            )
        folder = self.adapters_folder
        if folder is None or str(folder).startswith(_STORES):
            return
        if not Path(folder).is_dir():
            raise ConfigError(
                f"--adapters-folder is {folder}, which is no folder; give one of this machine, or "
                "gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"
            )
