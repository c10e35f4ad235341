"""Structured answers and calls of functions, by the packages that people use.

What each asks stands in its script in tests/clients.
"""

import pytest

from tests.support.structure_clients import (
    STRUCTURE_CLIENTS,
    StructureClient,
    recorded,
    sent,
)

pytestmark = pytest.mark.slow

each_client = pytest.mark.parametrize("client", STRUCTURE_CLIENTS, ids=lambda client: client.name)


@each_client
def test_a_client_sends_the_bodies_that_are_kept(client: StructureClient) -> None:
    """The bodies in tests/clients/bodies are what these versions send, and nothing else."""
    versions, bodies = recorded(client.name)
    if client.environment is None and client.versions() != versions:
        pytest.skip(f"the bodies are of {versions}")
    assert client.versions() == versions
    assert sent(client) == bodies
