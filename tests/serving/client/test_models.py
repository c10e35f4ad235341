"""The Python client names a model or an adapter, before a scripted service."""

import asyncio
from collections.abc import Iterator

import pytest

from serving.client import AsyncClient, Client
from serving.client.types import Message
from serving.errors import ModelNotFound
from tests.support.fakes import KEY, Stack, running_stack

ONE: list[Message] = [{"role": "user", "content": "one"}]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        stack.service.adapters = {"tuned": "ab" * 32, "other": "cd" * 32}
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    stack.service.reset()
    with Client(stack.target, key=KEY) as client:
        yield client


def test_a_name_reaches_the_service(client: Client, stack: Stack) -> None:
    for name in ("tuned", "scripted-7B", None):
        assert client.complete(ONE, model=name).text == "one"
    assert [request.model for request in stack.service.requests] == ["tuned", "scripted-7B", ""]
    assert client.info().adapters == ("other", "tuned")


def test_a_name_that_nothing_has_is_an_error(client: Client) -> None:
    with pytest.raises(ModelNotFound, match="'nobody' does not exist"):
        list(client.chat(ONE, model="nobody"))


def test_an_older_server_does_not_answer_for_an_adapter(
    client: Client, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not read the name, and would answer as the model without one."""
    monkeypatch.setattr(stack.service, "reads_names", False)
    assert client.complete(ONE).text == "one"
    with pytest.raises(ModelNotFound, match="older than adapters"):
        client.complete(ONE, model="tuned")

    async def ask() -> None:
        async with AsyncClient(stack.target, key=KEY) as later:
            await later.complete(ONE, model="tuned")

    with pytest.raises(ModelNotFound, match="older than adapters"):
        asyncio.run(ask())
