"""The names that requests may give in `model`, and whom each of them means."""

import re
from collections.abc import Callable, Collection, Mapping

from mixtral_jax.errors import AdapterError
from serving.errors import ModelNotFound
from serving.proto import inference_pb2 as pb

ANY_NAME = "*"
"""The alias for every name that no adapter has."""
BASE = ""
"""The place of an adapter's name in an answer of the model itself."""
# Names stand in paths, metrics and logs.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")


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

    def check_name(self, name: str) -> None:
        """Raises AdapterError for a name that no adapter may have beside this model."""
        if not _NAME.fullmatch(name):
            raise AdapterError(
                f"an adapter cannot be called {name[:100]!r}; give it at most 128 letters, digits "
                "and . _ : / @ + -, beginning with a letter or a digit"
            )
        if name == self._name:
            raise AdapterError(f"an adapter cannot be called '{name}', for the model is")
        if name in self._aliases:
            raise AdapterError(
                f"an adapter cannot be called '{name}', which means the model itself; call it "
                "otherwise, or give other names by --model-alias"
            )

    def listed(self) -> list[pb.AdapterInfo]:
        """Returns the loaded adapters in the order of their names."""
        return [
            pb.AdapterInfo(name=name, digest=digest)
            for name, digest in sorted(self._adapters().items())
        ]
