"""Azure's rule for parameters outside its own list."""

import pytest

from serving.errors import InvalidParameter, InvalidRequest
from serving.gateway.dialect.azure import ExtraParameters
from serving.gateway.dialect.openai import check_unknown
from tests.support.chats import DROP, PASS, asked


def test_what_the_linked_notebooks_send_unasked_needs_no_header() -> None:
    request = asked(safe_prompt=False, random_seed=3, max_completion_tokens=5, stream_options={})
    assert (request.sampling.seed, request.max_tokens) == (3, 5)


def test_extras_are_refused_in_microsofts_words() -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked(wine="red", n=1, temperature=99)
    assert type(caught.value) is InvalidRequest
    assert str(caught.value) == (
        "Extra parameters ['wine', 'n'] are not allowed when extra-parameters is not set or set to"
        " be 'error'. Set extra-parameters to 'pass-through' to pass to the model."
    )


def test_extras_that_nobody_knows_are_dropped_ignored_or_forbidden() -> None:
    assert asked(DROP, wine="red", n=2) == asked()
    assert asked(check_unknown, wine="red") == asked()
    with pytest.raises(InvalidParameter) as caught:
        asked(PASS, wine="red", logprobs=True)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.path, problem.message, problem.value) == (
        "extra_forbidden",
        ("body", "wine"),
        "Extra inputs are not permitted",
        "red",
    )


@pytest.mark.parametrize(
    ("header", "policy"),
    [
        (None, ExtraParameters.REFUSE),
        ("", ExtraParameters.REFUSE),
        ("error", ExtraParameters.REFUSE),
        ("drop", ExtraParameters.DROP),
        ("ignore", ExtraParameters.DROP),
        ("pass-through", ExtraParameters.PASS),
        ("Pass-Through", ExtraParameters.PASS),
        ("allow", ExtraParameters.PASS),
    ],
)
def test_the_header_decides(header: str | None, policy: ExtraParameters) -> None:
    assert ExtraParameters.from_header(header) is policy


@pytest.mark.parametrize("header", ["lenient", "passthrough", "true"])
def test_a_header_that_says_nothing_known_is_malformed(header: str) -> None:
    with pytest.raises(InvalidRequest, match="extra-parameters") as caught:
        ExtraParameters.from_header(header)
    # LiteLLM takes the first bracket of a body for the list of parameters.
    assert "[" not in str(caught.value)
