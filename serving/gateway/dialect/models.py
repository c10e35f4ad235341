"""The served model and its adapters as clients read them: Azure's /info, and lists of models.

model_info    ModelInfo (proto) -> ModelInfo
model_cards   ModelInfo (proto) -> ModelCard, and one for each adapter
"""

from typing import Literal

from pydantic import Field

from serving.gateway.dialect.fields import Described, is_none
from serving.proto import inference_pb2

# Digits of a digest that tell two adapters apart.
_JOB_DIGITS = 16


class SamplingDefaults(Described):
    """The sampling parameters that hold where a request leaves them out.

    Those that the model's makers do not name are absent.
    """

    temperature: float | None = Field(default=None, exclude_if=is_none)
    """As in a request, like the fields that follow."""
    top_p: float | None = Field(default=None, exclude_if=is_none)
    """The likeliest tokens whose probabilities add up to this are kept."""
    top_k: int | None = Field(default=None, exclude_if=is_none)
    """The number of likeliest tokens that are kept."""
    min_p: float | None = Field(default=None, exclude_if=is_none)
    """The share of the likeliest token's probability that a token needs."""
    repetition_penalty: float | None = Field(default=None, exclude_if=is_none)
    """The divisor of the positive logits of tokens in prompt and answer."""


class ModelInfo(Described):
    """The answer of /info."""

    model_name: str
    """The served name."""
    model_type: str
    """The kind of requests that it answers: `chat-completions`."""
    model_provider_name: str
    """The maker of the model."""
    default_sampling_params: SamplingDefaults | None = Field(default=None, exclude_if=is_none)
    """The model's own values of sampling parameters; absent where it has none. Not Azure's."""


class Capabilities(Described):
    """The abilities of a model that Mistral's client asks for."""

    completion_chat: bool = True
    """Chats."""
    completion_fim: bool = False
    """Filling in the middle."""
    function_calling: bool = True
    """Tools."""
    fine_tuning: bool = False
    """Training through the API."""
    vision: bool = False
    """Images."""


class ModelCard(Described):
    """A served model, as OpenAI's and Mistral's clients list it."""

    id: str
    """The served name."""
    object: Literal["model"] = "model"
    """Always `model`."""
    created: int
    """Seconds since 1970: when the gateway was started."""
    owned_by: str
    """The maker of the model."""
    root: str
    """The served name of the model whose weights answer; vLLM's and Mistral's."""
    parent: str | None = None
    """The same, of an adapter; null for the model itself."""
    max_model_len: int
    """Tokens that prompt and answer may hold together; vLLM's name."""
    max_context_length: int
    """The same number under Mistral's name."""
    type: Literal["base", "fine-tuned"] = "base"
    """`base`, or `fine-tuned` for an adapter; Mistral's."""
    job: str | None = Field(default=None, exclude_if=is_none)
    """Mistral's, of an adapter: the beginning of the SHA-256 of its content."""
    capabilities: Capabilities = Capabilities()
    """The abilities of the model."""
    default_model_temperature: float | None = Field(default=None, exclude_if=is_none)
    """Mistral's name for the model's own temperature; absent where it has none."""
    default_sampling_params: SamplingDefaults | None = Field(default=None, exclude_if=is_none)
    """The model's own values of sampling parameters; absent where it has none."""


class ModelList(Described):
    """The served model, and its adapters in the order of their names."""

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[ModelCard]
    """The models."""


def model_info(model: inference_pb2.ModelInfo, kind: str | None = None) -> ModelInfo:
    """Returns the answer of /info; `kind` replaces the service's model type if it is given."""
    return ModelInfo(
        model_name=model.name,
        model_type=kind or model.type,
        model_provider_name=model.provider,
        default_sampling_params=sampling_defaults(model),
    )


def sampling_defaults(model: inference_pb2.ModelInfo) -> SamplingDefaults | None:
    """Returns the model's own values of sampling parameters; None where it has none."""
    values = {field.name: value for field, value in model.sampling_defaults.ListFields()}
    if not values:
        return None
    # A float32 of the proto, as it was written: 0.2 and not 0.20000000298023224.
    written = {
        name: float(f"{value:.7g}") if isinstance(value, float) else value
        for name, value in values.items()
    }
    return SamplingDefaults.model_validate(written)


def model_cards(model: inference_pb2.ModelInfo, created: int) -> list[ModelCard]:
    """Returns the entries of the model and of its adapters in a list of models.

    Args:
        model: The model, with its adapters.
        created: Seconds since 1970.
    """
    defaults = sampling_defaults(model)
    base = ModelCard(
        id=model.name,
        created=created,
        owned_by=model.provider,
        root=model.name,
        max_model_len=model.max_context,
        max_context_length=model.max_context,
        capabilities=Capabilities(function_calling="tools" in model.capabilities),
        default_model_temperature=None if defaults is None else defaults.temperature,
        default_sampling_params=defaults,
    )
    adapters = (
        base.model_copy(
            update={
                "id": adapter.name,
                "parent": model.name,
                "type": "fine-tuned",
                "job": adapter.digest[:_JOB_DIGITS],
            }
        )
        for adapter in model.adapters
    )
    return [base, *adapters]
