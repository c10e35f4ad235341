"""The document that describes the endpoint says what the application does."""

import json
import re
from typing import Any

import httpx
import pytest

from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.accounting.admission import headers_of
from serving.accounting.rate_limits import UNITS, Allowance
from serving.gateway.app import create_app
from serving.gateway.openapi.document import document
from serving.gateway.openapi.page import page
from tests.support.fakes import KEY, gateway_config, running_stack

NAMES = (
    *("ChatRequest", "CompletionRequest", "ResponsesRequest", "ResponseObject", "ResponseEvent"),
    *("MessagesRequest", "MessageObject", "MessageEvent", "AnthropicErrorBody"),
    *("CountRequest", "TokenCountAnswer", "AnthropicModel", "ModelPage"),
)


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return document()


def test_every_route_is_described_and_no_other(told: dict[str, Any]) -> None:
    app = create_app(gateway_config(target=("127.0.0.1:1",)), Access(Keyring({"default": KEY})))
    offered = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.routes
        for method in route.methods - {"HEAD"}
    }
    described = {(path, method) for path, methods in told["paths"].items() for method in methods}
    assert offered == described
    operations = [each["operationId"] for path in told["paths"].values() for each in path.values()]
    assert len(operations) == len(set(operations))


def test_every_reference_leads_somewhere(told: dict[str, Any]) -> None:
    text = json.dumps(told)
    for part in text.split('"$ref": "#/components/schemas/')[1:]:
        assert part.partition('"')[0] in told["components"]["schemas"]


def test_the_version_of_the_api_is_described_as_it_is_checked(told: dict[str, Any]) -> None:
    (version,) = (each for each in told["paths"]["/info"]["get"]["parameters"])
    assert version["name"] == "api-version"
    for text in ("2024-05-01-preview", "v1", "latest", "v2"):
        described = re.fullmatch(version["schema"]["pattern"], text) is not None
        assert described == (text != "v2")


def test_requests_and_answers_are_described_field_by_field(told: dict[str, Any]) -> None:
    schemas = told["components"]["schemas"]
    for name in (*NAMES, "Message", "ChatCompletion", "ErrorBody"):
        for field, schema in schemas[name]["properties"].items():
            assert schema.get("description"), (name, field)
    assert schemas["ChatRequest"]["required"] == ["messages"]
    assert schemas["ChatRequest"]["properties"]["temperature"]["anyOf"][0] == {
        "type": "number",
        "minimum": 0,
        "maximum": 2,
    }
    chat = told["paths"]["/chat/completions"]["post"]
    assert set(chat["responses"]) == {"200", *(str(status) for status in ERRORS)}
    assert "retry-after" in chat["responses"]["429"]["headers"]
    assert "retry-after" not in chat["responses"]["422"]["headers"]


def test_responses_are_described(told: dict[str, Any]) -> None:
    for path in ("/responses", "/v1/responses", "/openai/responses"):
        responses = told["paths"][path]["post"]["responses"]
        assert "x-mixtral-ignored-tools" in responses["200"]["headers"]
        event = responses["200"]["content"]["text/event-stream"]["schema"]["properties"]["data"]
        assert event["description"].startswith("ResponseEvent")
        refused = responses["400"]["content"]["application/json"]["schema"]
        assert refused == {"$ref": "#/components/schemas/OpenAIErrorBody"}
    assert told["components"]["schemas"]["ResponsesRequest"]["required"] == ["input"]


def test_the_headers_of_limits_are_described(told: dict[str, Any]) -> None:
    written = headers_of({unit: Allowance(60, 59, 1.0) for unit in UNITS})
    responses = told["paths"]["/v1/completions"]["post"]["responses"]
    assert responses["200"]["headers"].keys() == written.keys() | OF_FORMS
    others = {"x-ms-error-code", "retry-after", "retry-after-ms"}
    assert responses["429"]["headers"].keys() == written.keys() | others
    assert responses["503"]["headers"].keys() == others


OF_FORMS = {"x-mixtral-weakened", "x-mixtral-violation"}
ERRORS = (400, 401, 403, 404, 405, 408, 413, 415, 422, 424, 429, 500, 503)


def test_both_are_there_without_a_key_and_need_nothing_else() -> None:
    with running_stack() as stack, httpx.Client(base_url=stack.url) as client:
        assert client.get("/openapi.json").json() == document()
        answer = client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == page(document())
    assert "<script" not in answer.text and "://" not in answer.text
    assert "POST /v1/chat/completions" in answer.text
    assert "frequency_penalty" in answer.text
