"""anthropic: the classes that errors raise, at once and in the middle of a stream."""

import os

import anthropic

URL, KEY = os.environ["ENDPOINT"], os.environ["KEY"]
EXPECTED = [
    ("!long", anthropic.BadRequestError, "invalid_request_error"),
    ("!fail:InvalidParameter", anthropic.BadRequestError, "invalid_request_error"),
    ("!fail:Forbidden", anthropic.ServiceUnavailableError, "overloaded_error"),
    ("!fail:ModelNotFound", anthropic.NotFoundError, "not_found_error"),
    ("!fail:DeadlineExceeded", anthropic.RequestTimeoutError, "timeout_error"),
    ("!fail:RequestTooLarge", anthropic.ContentTooLargeError, "request_too_large"),
    ("!fail:Overloaded", anthropic.RateLimitError, "rate_limit_error"),
    ("!fail:EngineFailure", anthropic.InternalServerError, "api_error"),
    ("!fail:Unavailable", anthropic.ServiceUnavailableError, "overloaded_error"),
]


def asked(text: str) -> dict:
    return {
        "model": "azureai",
        "max_tokens": 8,
        "messages": [{"role": "user", "content": text}],
    }


with anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0) as client:
    for script, kind, name in EXPECTED:
        for stream in (False, True):
            try:
                client.messages.create(**asked(script), stream=stream)
                raise AssertionError(f"{script} was answered")
            except anthropic.APIStatusError as error:
                assert type(error) is kind and error.type == name, (script, repr(error))
                assert error.body["request_id"] == error.request_id
    try:
        client.messages.create(**{**asked("one"), "model": "claude"})
        raise AssertionError("a model that is not there has answered")
    except anthropic.NotFoundError as error:
        assert "'claude' does not exist" in error.api_message
    try:
        client.with_options(api_key="wrong").messages.create(**asked("one"))
        raise AssertionError("a wrong key was taken")
    except anthropic.AuthenticationError as error:
        assert error.type == "authentication_error"
    texts = []
    try:
        with client.messages.stream(**asked("one !fail:EngineFailure")) as stream:
            texts.extend(stream.text_stream)
        raise AssertionError("a stream that breaks off was taken for a whole one")
    except anthropic.APIStatusError as error:
        assert error.type == "api_error" and texts == ["one"], repr(error)

# A model that failed is asked once, whatever the client's retries are.
with anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=5) as client:
    try:
        client.messages.create(**asked("!fail:EngineFailure"))
        raise AssertionError("a failure was answered")
    except anthropic.InternalServerError as error:
        assert error.response.request.headers["x-stainless-retry-count"] == "0"
