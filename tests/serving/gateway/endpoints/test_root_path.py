"""--root-path: a proxy publishes the server below a path, whether it takes the path off or not."""

import httpx
import pytest

from serving.gateway.config import GatewayError
from tests.support.fakes import gateway_config, running_stack
from tests.support.gateway import BEARER, chat_body, check_error


def test_routes_answer_with_and_without_the_path_and_keep_their_dialect() -> None:
    with (
        running_stack(root_path="/models/mixtral") as stack,
        httpx.Client(base_url=stack.url, headers=BEARER) as client,
    ):
        for path in ("/v1/chat/completions", "/models/mixtral/v1/chat/completions"):
            answer = client.post(path, json=chat_body("one two"))
            assert answer.json()["choices"][0]["message"]["content"] == "one two"
            assert answer.json()["id"].startswith("chatcmpl-")
        assert client.get("/models/mixtral/health/ready").status_code == 200
        document = client.get("/models/mixtral/openapi.json").json()
        assert document["servers"] == [{"url": "/models/mixtral"}]
        # A browser's relative addresses need the slash; a request with a body is not sent on.
        bare = client.get("/models/mixtral", follow_redirects=False)
        assert (bare.status_code, bare.headers["location"]) == (307, "/models/mixtral/")
        check_error(client.post("/models/mixtral", json={}), 405, "MethodNotAllowed")
        # Errors have the form of the route behind the path.
        refused = client.post("/models/mixtral/v1/chat/completions", json={})
        assert refused.json().keys() == {"error"} and refused.status_code == 400
        check_error(client.get("/models/mixtral/nothing"), 404, "NotFound")


@pytest.mark.parametrize("path", ["models", "/models/", "/", "/a b", "//a"])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(GatewayError, match="--root-path is"):
        gateway_config(root_path=path)
