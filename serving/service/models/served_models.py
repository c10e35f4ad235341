"""The names that requests may give in `model`, and whom each of them means."""

from collections.abc import Callable, Collection, Mapping

from serving.errors import ModelNotFound
from serving.proto import inference_pb2 as pb

ANY_NAME = "*"
"""The alias for every name that no adapter has."""
BASE = ""
"""The place of an adapter's name in an answer of the model itself."""


class ServedModels:
    """Knows the served model by its names, and its adapters by theirs. Thread-safe.

    Args:
        name: The served name of the model.
        aliases: Its other names; with ANY_NAME every name that no adapter has.
        adapters: Returns the digests of the loaded adapters by their names, SHA-256 in hexadecimal
            digits. It is asked for each request, because they come and go.
    """

    def __init__(
        self,
        name: str,
        aliases: Collection[str] = (),
        adapters: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._name = name
        self._aliases = frozenset(aliases)
        self._adapters = adapters

    def adapter_of(self, asked: str) -> str:
        """Returns the name of the adapter that a request asks for; BASE for the model itself.

        Args:
            asked: The request's `model`; empty where it names none.

        Raises:
            ModelNotFound: Nothing that is loaded has this name.
        """
        if not asked or asked == self._name:
            return BASE
        if asked in self._adapters():
            return asked
        if asked in self._aliases or ANY_NAME in self._aliases:
            return BASE
        raise ModelNotFound.of(asked, self._name)

    def listed(self) -> list[pb.AdapterInfo]:
        """Returns the loaded adapters in the order of their names."""
        return [
            pb.AdapterInfo(name=name, digest=digest)
            for name, digest in sorted(self._adapters().items())
        ]
