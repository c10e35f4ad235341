"""POST /tokenize and /detokenize: vLLM's and llama.cpp's bodies and answers, and their cost."""

from typing import Any

import httpx
import pytest

from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.accounting.accounts import Accounts
from tests.support.fakes import KEY, Stack, gateway_config, running_stack
from tests.support.gateway import BEARER, check_error

HELLO = [104, 105]  # the scripted service has a token for each byte
MESSAGES = [{"role": "user", "content": "hi"}]
BEGUN = [*MESSAGES, {"role": "assistant", "content": "so"}]


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (
            {"prompt": "hi"},
            {"count": 3, "max_model_len": 64, "tokens": [256, *HELLO], "token_strs": None},
        ),
        (
            {"model": "any", "prompt": "hi", "add_special_tokens": False},
            {"count": 2, "max_model_len": 64, "tokens": HELLO, "token_strs": None},
        ),
        (
            {"prompt": "hé", "return_token_strs": True},
            {
                "count": 4,
                "max_model_len": 64,
                "tokens": [256, 104, 195, 169],
                "token_strs": ["", "h", "\ufffd", "\ufffd"],
            },
        ),
        (
            {"prompt": "", "add_special_tokens": False},
            {"count": 0, "max_model_len": 64, "tokens": [], "token_strs": None},
        ),
        (
            {"messages": MESSAGES},
            {"count": 4, "max_model_len": 64, "tokens": [256, *HELLO, 257], "token_strs": None},
        ),
        (
            {"messages": MESSAGES, "add_generation_prompt": False},
            {"count": 3, "max_model_len": 64, "tokens": [256, *HELLO], "token_strs": None},
        ),
        (
            {
                "messages": BEGUN,
                "add_generation_prompt": False,
                "continue_final_message": True,
            },
            {"count": 3, "max_model_len": 64, "tokens": [256, 115, 111], "token_strs": None},
        ),
        ({"content": "hi"}, {"tokens": HELLO}),
        ({"content": "hi", "add_special": True}, {"tokens": [256, *HELLO]}),
        (
            {"content": "hé", "with_pieces": True},
            {
                "tokens": [
                    {"id": 104, "piece": "h"},
                    {"id": 195, "piece": [195]},
                    {"id": 169, "piece": [169]},
                ]
            },
        ),
    ],
)
def test_tokens_of_a_text_and_a_chat(
    client: httpx.Client, body: dict[str, Any], answer: dict[str, Any]
) -> None:
    response = client.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    assert response.json() == answer


def test_the_bytes_are_those_that_clients_have_read(client: httpx.Client) -> None:
    recorded = {
        '{"prompt": "hi"}': b'{"count":3,"max_model_len":64,"tokens":[256,104,105],'
        b'"token_strs":null}',
        '{"content": "hi"}': b'{"tokens":[104,105]}',
        '{"content": "hi", "with_pieces": true}': b'{"tokens":[{"id":104,"piece":"h"},'
        b'{"id":105,"piece":"i"}]}',
    }
    for asked, answer in recorded.items():
        response = client.post(
            "/tokenize", content=asked, headers={"content-type": "application/json"}
        )
        assert response.content == answer
        assert response.headers["content-type"] == "application/json"
    assert client.post("/detokenize", json={"tokens": HELLO}).content == (
        b'{"prompt":"hi","content":"hi"}'
    )


def test_a_long_answer_is_written_in_pieces_that_fit(client: httpx.Client) -> None:
    text = "a" * 5000  # more tokens than are written at a time
    answer = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == 5001
    assert set(answer["tokens"][1:]) == {97} and set(answer["token_strs"][1:]) == {"a"}


def test_tools_and_the_caller_reach_the_service(client: httpx.Client, stack: Stack) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    client.post("/tokenize", json={"messages": MESSAGES, "tools": [tool]})
    ((call, metadata),) = stack.service.tokenized
    assert [asked.name for asked in call.chat.tools] == ["f"]
    assert metadata["mixtral-caller-bin"] == b"default"  # callers take turns


def test_tokens_become_text_under_both_names(client: httpx.Client) -> None:
    for tokens, text in (([256, *HELLO], "hi"), ([], ""), ([195], "\ufffd")):
        answer = client.post("/detokenize", json={"tokens": tokens, "model": "any"})
        assert answer.json() == {"prompt": text, "content": text}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "there are 0 of prompt, content and messages"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "there are 2 of prompt"),
        ("/tokenize", {"prompt": "a", "wine": 1}, "Extra inputs"),
        ("/tokenize", {"messages": []}, "at least 1 item"),
        ("/tokenize", {"content": "a", "parse_special": True}, "parse_special is not supported"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template is not"),
        (
            "/tokenize",
            {"messages": BEGUN, "add_generation_prompt": True, "continue_final_message": True},
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
        ),
        (
            "/tokenize",
            {"messages": MESSAGES, "continue_final_message": True},
            "continue_final_message needs a last message of the role assistant",
        ),
        ("/tokenize", {"prompt": "a", "with_pieces": True}, "with_pieces means nothing beside pro"),
        (
            "/tokenize",
            {"prompt": "a", "add_generation_prompt": True},
            "add_generation_prompt means",
        ),
        ("/tokenize", {"content": "a", "return_token_strs": True}, "means nothing beside content"),
        ("/tokenize", {"messages": MESSAGES, "add_special": True}, "nothing beside messages"),
        ("/detokenize", {}, "Field required"),
        ("/detokenize", {"tokens": [-1]}, "greater than or equal to 0"),
        ("/detokenize", {"tokens": "a"}, "valid list"),
    ],
)
def test_bodies_that_are_refused(
    client: httpx.Client, path: str, body: dict[str, Any], words: str
) -> None:
    answer = client.post(path, json=body)
    code = answer.json()["error"]["code"]
    assert code in ("Invalid input", "parameter_not_supported")
    assert words in check_error(answer, 422, code)


def test_what_the_service_refuses_is_passed_on(client: httpx.Client) -> None:
    check_error(client.post("/tokenize", json={"prompt": "!long"}), 400, "context_length_exceeded")
    check_error(
        client.post("/tokenize", json={"prompt": "!status:UNAVAILABLE"}), 503, "ServiceUnavailable"
    )


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_a_key_is_asked_for(stack: Stack, path: str) -> None:
    check_error(httpx.post(f"{stack.url}{path}", json={}), 401, "Unauthorized")


def test_they_cost_a_request_of_the_callers_minute_and_no_tokens() -> None:
    config = gateway_config(max_requests_per_minute=2, max_tokens_per_minute=1000)
    with (
        running_stack(
            access=Access(Keyring({"default": KEY})),
            parts={"accounts": Accounts.of(config)},
        ) as stack,
        httpx.Client(base_url=stack.url, headers=BEARER) as client,
    ):
        first = client.post("/tokenize", json={"prompt": "hi"})
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-remaining-tokens"] == "1000"
        assert client.post("/detokenize", json={"tokens": HELLO}).status_code == 200
        check_error(client.post("/tokenize", json={"prompt": "hi"}), 429, "TooManyRequests")
        assert client.get("/usage").json()["data"] == []
