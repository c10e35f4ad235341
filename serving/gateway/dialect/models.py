"""The served model as clients read it: Azure's /info, and the lists of OpenAI's and Mistral's APIs.

model_info   ModelInfo (proto) -> ModelInfo
model_card   ModelInfo (proto) -> ModelCard
"""

from typing import Literal

from serving.gateway.dialect.fields import Described
from serving.proto import inference_pb2


class ModelInfo(Described):
    """The answer of /info."""

    model_name: str
    """The served name."""
    model_type: str
    """The kind of requests that it answers: `chat-completions`."""
    model_provider_name: str
    """The maker of the model."""


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
    max_model_len: int
    """Tokens that prompt and answer may hold together; vLLM's name."""
    max_context_length: int
    """The same number under Mistral's name."""
    type: Literal["base"] = "base"
    """Always `base`."""
    capabilities: Capabilities = Capabilities()
    """The abilities of the model."""


class ModelList(Described):
    """The served models: one."""

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[ModelCard]
    """The models."""


def model_info(model: inference_pb2.ModelInfo, kind: str | None = None) -> ModelInfo:
    """Returns the answer of /info; `kind` replaces the service's model type if it is given."""
    return ModelInfo(
        model_name=model.name, model_type=kind or model.type, model_provider_name=model.provider
    )


def model_card(model: inference_pb2.ModelInfo, created: int) -> ModelCard:
    """Returns the model's entry in a list of models; `created` is in seconds since 1970."""
    return ModelCard(
        id=model.name,
        created=created,
        owned_by=model.provider,
        max_model_len=model.max_context,
        max_context_length=model.max_context,
        capabilities=Capabilities(function_calling="tools" in model.capabilities),
    )
