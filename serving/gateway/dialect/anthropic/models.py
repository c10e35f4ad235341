"""The served model and its adapters as Anthropic's clients list them.

model_page   ModelCards -> ModelPage

https://docs.claude.com/en/api/models-list
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from serving.errors import InvalidRequest, NotFound
from serving.gateway.dialect.anthropic.error import is_anthropic_path
from serving.gateway.dialect.fields import Described
from serving.gateway.dialect.models import ModelCard

_MAX_LIMIT = 1000
_USUAL_LIMIT = 20


class AnthropicModel(Described):
    """A served model."""

    type: Literal["model"] = "model"
    """Always `model`."""
    id: str
    """The served name."""
    display_name: str
    """The same."""
    created_at: str
    """When the gateway was started, as RFC 3339 writes it."""
    lifecycle: Literal["active"] = "active"
    """Always `active`."""
    max_input_tokens: int
    """Tokens that prompt and answer may hold together."""
    max_tokens: int
    """The same number."""


class ModelPage(Described):
    """A part of the list of models."""

    data: list[AnthropicModel]
    """The model, and its adapters in the order of their names."""
    first_id: str | None
    """The name of the first one here."""
    last_id: str | None
    """The name of the last one here."""
    has_more: bool
    """Whether there are more in the direction that was asked for."""


def asks_as_anthropic(path: str, headers: Mapping[str, str]) -> bool:
    """Returns whether a request for models is of a client of Anthropic's: its path or header."""
    return is_anthropic_path(path) or "anthropic-version" in headers


def anthropic_model(card: ModelCard) -> AnthropicModel:
    """Returns a model as Anthropic's clients read it."""
    return AnthropicModel(
        id=card.id,
        display_name=card.id,
        created_at=datetime.fromtimestamp(card.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        max_input_tokens=card.max_model_len,
        max_tokens=card.max_model_len,
    )


def model_page(cards: Sequence[ModelCard], query: Mapping[str, str]) -> ModelPage:
    """Returns the part of the list that a query asks for.

    Args:
        cards: All models.
        query: `limit` (1 to 1000), and `after_id` or `before_id`.

    Raises:
        InvalidRequest: The limit is none, or both names are given.
        NotFound: No model has the name.
    """
    text = query.get("limit", str(_USUAL_LIMIT))
    limit = int(text) if text.isascii() and text.isdecimal() and len(text) <= 4 else 0
    if not 1 <= limit <= _MAX_LIMIT:
        raise InvalidRequest(f"limit is '{text[:40]}'; it must be within 1 and {_MAX_LIMIT}")
    after, before = query.get("after_id"), query.get("before_id")
    if after is not None and before is not None:
        raise InvalidRequest("after_id and before_id are both given; leave one of them out")
    names = [card.id for card in cards]
    start, end = 0, len(cards)
    if after is not None:
        start = _place(names, after) + 1
    if before is not None:
        end = _place(names, before)
    chosen = cards[start:end]
    shown = chosen[-limit:] if before is not None else chosen[:limit]
    return ModelPage(
        data=[anthropic_model(card) for card in shown],
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(shown) < len(chosen),
    )


def _place(names: Sequence[str], name: str) -> int:
    if name not in names:
        raise NotFound(f"no model has the name '{name[:100]}'")
    return names.index(name)
