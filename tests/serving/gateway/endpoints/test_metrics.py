"""GET /metrics on the port of the API: whose figures, and for whom."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from serving.access.credentials import Access
from serving.access.keyring import Keyring
from tests.support.fakes import KEY, Stack, running_stack
from tests.support.gateway import BEARER, check_error


def families(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return [family.name for family in text_string_to_metric_families(answer.text)]


def test_an_operator_reads_the_figures_of_gateway_and_service(client: httpx.Client) -> None:
    answer = client.get("/metrics")
    names = families(answer)
    assert len(names) == len(set(names))
    assert {"vllm:prompt_tokens", "mixtral_gateway_requests"} <= set(names)
    assert 'vllm:prompt_tokens_total{model_name="scripted-7B"} 7.0' in answer.text
    assert "mixtral_gateway_open_requests 99.0" not in answer.text  # its own stands there


def test_others_are_refused(stack: Stack) -> None:
    check_error(httpx.get(f"{stack.url}/metrics"), 401, "Unauthorized")


def test_a_key_that_is_no_operators_reads_none() -> None:
    with running_stack(access=Access(Keyring({"alice": KEY}))) as stack:
        answer = httpx.get(f"{stack.url}/metrics", headers=BEARER)
        assert "operators" in check_error(answer, 403, "Forbidden")


def test_it_can_be_open_or_off() -> None:
    with running_stack(metrics_route="open") as stack:
        assert "vllm:prompt_tokens" in families(httpx.get(f"{stack.url}/metrics"))
        paths = httpx.get(f"{stack.url}/openapi.json").json()["paths"]
        assert paths["/metrics"]["get"]["security"] == []
    with running_stack(metrics_route="off") as stack:
        check_error(httpx.get(f"{stack.url}/metrics", headers=BEARER), 404, "NotFound")
        assert "/metrics" not in httpx.get(f"{stack.url}/openapi.json").json()["paths"]


def test_the_gateways_own_figures_are_there_without_a_service() -> None:
    with running_stack(target="127.0.0.1:1") as stack:
        names = families(httpx.get(f"{stack.url}/metrics", headers=BEARER, timeout=30))
    assert "mixtral_gateway_requests" in names and "vllm:prompt_tokens" not in names
