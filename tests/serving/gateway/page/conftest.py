"""A browser for the tests of the page, and the page before a service whose answers are known."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.browser import PageErrors, running_browser
from tests.support.fakes import KEY, Stack, running_stack
from tests.support.writing import Writer, WritingInference

PATIENCE = 20_000.0  # milliseconds that only a failing test waits


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def shared() -> Iterator[Stack]:
    with running_stack() as stack:
        yield stack


def _is_of_a_key(response: Any) -> bool:
    """Returns whether this is the list of models for a key, not that of the page's beginning."""
    return response.url.endswith("/v1/models") and "authorization" in response.request.headers


@pytest.fixture
def stack(shared: Stack) -> Stack:
    """The gateway before the scripted service, which says the words of the last message."""
    shared.service.adapters = {}
    shared.service.reset()
    return shared


@pytest.fixture(scope="module")
def writing() -> Iterator[tuple[Stack, WritingInference]]:
    """The gateway before a service that writes whatever it is given."""
    writer = Writer()
    with running_stack(inference=writer) as stack:
        yield stack, writer.service


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server in a profile of its own, with a key. No page may report errors."""
    opened = []

    def open_page(url: str, key: str = KEY, **context: Any) -> Any:
        profile = browser.new_context(**context)
        profile.set_default_timeout(PATIENCE)
        page = profile.new_page()
        opened.append((profile, PageErrors(page)))
        page.goto(url)
        if key:
            if page.is_hidden("#settings"):
                page.click("#toggle")
            with page.expect_response(_is_of_a_key):
                page.fill("#key", key)
                page.dispatch_event("#key", "change")
        return page

    yield open_page
    for profile, errors in opened:
        profile.close()
        assert not errors.texts
        assert not errors.foreign
