"""The workload of a plan: a model, its dtypes, and the traffic that it serves."""

from dataclasses import dataclass

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.kernels import kernels_for
from mixtral_jax.placement import Placement, WeightDtypes, checked_dtype


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The model that is to be served and the traffic that it gets.

    Raises ConfigError where a number is below 1 or the context exceeds the model's.

    Attributes:
        model: sizes of the model.
        dtype: float32, bfloat16, int8 or fp8; the dtype of the weights.
        kv_dtype: int8, float8_e4m3fn, or None for keys and values in the activations' dtype.
        batch: sequences that are decoded together.
        context: tokens of each sequence, prompt and answer together.
        prefill_tokens: tokens of one step that reads prompts.
        page_size: tokens of one page of keys and values.
        weight_dtypes: of single weights, as in `Placement.of`.
    """

    model: ModelConfig
    dtype: str
    kv_dtype: str | None
    batch: int
    context: int
    prefill_tokens: int
    page_size: int
    weight_dtypes: WeightDtypes = ()

    def __post_init__(self) -> None:
        if self.context > self.model.max_context:
            raise ConfigError(
                f"--context {self.context} is longer than the model's {self.model.max_context} "
                "tokens; ask for less"
            )
        if min(self.batch, self.context, self.prefill_tokens, self.page_size) < 1:
            raise ConfigError("batch, context, prefill and page size must be at least 1")

    @property
    def pages_per_sequence(self) -> int:
        """Number of pages that one sequence occupies; pages outside a sliding window are freed."""
        pages = -(-self.context // self.page_size)
        if self.model.sliding_window is None:
            return pages
        return min(pages, -(-(self.model.sliding_window - 1) // self.page_size) + 1)

    @property
    def product_dtype(self) -> str:
        """The dtype at whose rate most products run: experts of fp8 are widened to bfloat16."""
        return "bfloat16" if self.dtype == "fp8" and self.model.is_moe else self.dtype

    @property
    def attended_tokens(self) -> int:
        """Number of tokens that the last token of a sequence attends to."""
        return min(self.context, self.model.sliding_window or self.context)


def unsplit_placement(dtype: str, platform: str, weight_dtypes: WeightDtypes = ()) -> Placement:
    """The placement of a model on devices of a platform (cpu, tpu or gpu), before it is split.

    It gives the kernels, the dtype of activations and the page size of every split. Raises
    ConfigError for a dtype that models do not have.
    """
    kernels = kernels_for(platform)
    dtype = checked_dtype(dtype)
    return Placement(
        dtype=dtype,
        activation_dtype=kernels.activation_dtype(dtype),
        layout=None,
        kernels=kernels,
        weight_dtypes=weight_dtypes,
    )
