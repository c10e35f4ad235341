"""A gateway for the tests of a file, before a service whose answers are worked out by hand."""

from collections.abc import Iterator

import httpx
import pytest

from serving import channel
from serving.gateway import upstream
from tests.support.fakes import PATIENCE, Stack, running_stack
from tests.support.gateway import BEARER


@pytest.fixture(scope="package", autouse=True)
def patient() -> Iterator[None]:
    """A busy machine may take seconds for what a gateway gives two or three."""
    options = dict(channel._OPTIONS) | {"grpc.min_reconnect_backoff_ms": 20_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "_OPTIONS", tuple(options.items()))
        patch.setattr(upstream, "SHORT_CALL_SECONDS", 20.0)
        yield


@pytest.fixture(scope="module")
def shared() -> Iterator[Stack]:
    with running_stack() as stack:
        yield stack


@pytest.fixture
def stack(shared: Stack) -> Stack:
    shared.service.reset()
    shared.set_serving(True)
    return shared


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, headers=BEARER, timeout=PATIENCE) as client:
        yield client
