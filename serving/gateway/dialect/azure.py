"""Rules that only Azure's API has: versions in the query, and fields outside its own list."""

import enum
import re
from collections.abc import Collection
from typing import Any

from serving.errors import InvalidRequest
from serving.gateway.dialect.parsing import forbidden, shortened

# Azure's versions are dates; its newest API says "v1", "preview" or "latest".
API_VERSION = r"\d{4}-\d{2}-\d{2}(-preview)?|v1|preview|latest"
"""Pattern of what `api-version` may be."""
# The fields of a chat that Azure's API has, and those that its linked notebooks and clients send
# to it unasked. Every other field must be asked for by the header, though we know it.
_FIELDS = {
    *("messages", "model", "frequency_penalty", "presence_penalty", "temperature", "top_p"),
    *("max_tokens", "response_format", "stop", "stream", "tools", "tool_choice", "seed"),
    *("modalities", "safe_prompt", "random_seed", "stream_options", "max_completion_tokens"),
}
# The number of fields that a refusal lists; no client sends so many.
_MAX_LISTED = 32


def check_api_version(version: str | None) -> None:
    """Raises InvalidRequest for an `api-version` that no version of Azure's API has had."""
    if version is not None and not re.fullmatch(API_VERSION, version):
        raise InvalidRequest(
            f"api-version is '{version[:40]}'; leave it out, or give a date like 2024-05-01-preview"
        )


class ExtraParameters(enum.Enum):
    """The treatment of a chat's fields outside Azure's list, by the header `extra-parameters`."""

    REFUSE = "error"
    DROP = "drop"
    PASS = "pass-through"

    @classmethod
    def from_header(cls, value: str | None) -> "ExtraParameters":
        """Returns what the header asks for; raises InvalidRequest for an unknown value.

        Args:
            value: The header; "error" if it is absent or empty.
        """
        # "allow" and "ignore" stand in older revisions of Microsoft's pages.
        names = {"error": cls.REFUSE, "drop": cls.DROP, "pass-through": cls.PASS}
        names |= {"allow": cls.PASS, "ignore": cls.DROP}
        policy = names.get((value or "error").strip().lower())
        if policy is None:
            raise InvalidRequest(
                f"the header extra-parameters is '{shortened(str(value))}'; it must be 'error', "
                "'drop' or 'pass-through'"
            )
        return policy

    def apply(self, values: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
        """Returns the body's fields that the model is to see.

        Args:
            values: The fields of the body.
            known: The names of the fields that the request's type has.

        Raises:
            InvalidRequest: REFUSE, and there are fields outside Azure's list.
            InvalidParameter: PASS, and there are fields that the type does not have.
        """
        extra = [name for name in values if name not in _FIELDS]
        if self is ExtraParameters.REFUSE and extra:
            # Microsoft's sentence to the letter: LiteLLM reads the list out of it and tries again.
            names = [shortened(name) for name in extra[:_MAX_LISTED]]
            raise InvalidRequest(
                f"Extra parameters {names!r} are not allowed when extra-parameters is not set or "
                "set to be 'error'. Set extra-parameters to 'pass-through' to pass to the model."
            )
        if self is ExtraParameters.DROP:
            return {name: value for name, value in values.items() if name in _FIELDS}
        if unknown := [name for name in extra if name not in known]:
            raise forbidden(unknown, values)
        return values
