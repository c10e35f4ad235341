"""Lists of models as Anthropic's clients page through them."""

import pytest

from serving.errors import InvalidRequest, NotFound
from serving.gateway.dialect.anthropic.models import asks_as_anthropic, model_page
from serving.gateway.dialect.models import model_cards
from serving.proto import inference_pb2

INFO = inference_pb2.ModelInfo(
    name="m",
    max_context=64,
    adapters=[inference_pb2.AdapterInfo(name=name, digest="d") for name in "abc"],
)
CARDS = model_cards(INFO, 1_800_000_000)


def test_a_model() -> None:
    assert model_page(CARDS[:1], {}).model_dump() == {
        "data": [
            {
                "type": "model",
                "id": "m",
                "display_name": "m",
                "created_at": "2027-01-15T08:00:00Z",
                "lifecycle": "active",
                "max_input_tokens": 64,
                "max_tokens": 64,
            }
        ],
        "first_id": "m",
        "last_id": "m",
        "has_more": False,
    }


@pytest.mark.parametrize(
    ("query", "names", "has_more"),
    [
        ({}, "mabc", False),
        ({"limit": "2"}, "ma", True),
        ({"limit": "2", "after_id": "a"}, "bc", False),
        ({"limit": "1", "after_id": "a"}, "b", True),
        ({"after_id": "c"}, "", False),
        ({"limit": "2", "before_id": "c"}, "ab", True),
        ({"limit": "3", "before_id": "c"}, "mab", False),
    ],
)
def test_pages(query: dict[str, str], names: str, has_more: bool) -> None:
    page = model_page(CARDS, query)
    assert ("".join(model.id for model in page.data), page.has_more) == (names, has_more)
    assert (page.first_id, page.last_id) == ((names[0], names[-1]) if names else (None, None))


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "", "²", "9" * 5000])
def test_a_limit_that_is_none(limit: str) -> None:
    with pytest.raises(InvalidRequest, match="limit is"):
        model_page(CARDS, {"limit": limit})


def test_names_that_cannot_be() -> None:
    with pytest.raises(NotFound, match="'z'"):
        model_page(CARDS, {"after_id": "z"})
    with pytest.raises(InvalidRequest, match="leave one of them out"):
        model_page(CARDS, {"after_id": "a", "before_id": "b"})


def test_who_asks_so() -> None:
    assert asks_as_anthropic("/anthropic/v1/models", {})
    assert asks_as_anthropic("/v1/models", {"anthropic-version": "2023-06-01"})
    assert not asks_as_anthropic("/v1/models", {})
