"""gRPC's reflection, which tells tools such as grpcurl the contract of the services of a server."""

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection

_NAME = reflection.SERVICE_NAME


class _PoolWithMethods:
    """Finds methods too in protobuf's pool of descriptors, where symbols are all but methods."""

    def __init__(self) -> None:
        self._pool: Any = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """Returns the file that defines a symbol; raises KeyError if there is none."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file


def add_reflection(names: Iterable[str], server: grpc.aio.Server) -> None:
    """Adds reflection to a server that has not started.

    Args:
        names: The full names of the server's services; reflection itself is added to them.
        server: The server.
    """
    pool: Any = _PoolWithMethods()
    reflection.enable_server_reflection((*names, _NAME), server, pool=pool)
