"""Tools of OpenAI's own in requests: what only OpenAI can run, and what only its models call.

They are refused by name. With `--ignore-hosted-tools` they are left out instead, and the answer
lists them in a header: some agents, such as Codex, list them in every request.

https://platform.openai.com/docs/guides/tools
"""

from collections.abc import Callable, Collection
from typing import Any

from serving.gateway.dialect.fields import MAX_TOOLS
from serving.gateway.dialect.parsing import refuse_unknown
from serving.gateway.dialect.responses.items import MAX_ITEMS

IGNORED_HEADER = "x-mixtral-ignored-tools"
"""Header of an answer: types of tools and of input items that were left out, by commas."""
_MAX_IGNORED = 1024  # characters of it

TOOL_TYPES = frozenset(
    {
        *("web_search", "web_search_2025_08_26"),
        *("web_search_preview", "web_search_preview_2025_03_11"),
        *("file_search", "code_interpreter", "image_generation", "mcp", "tool_search"),
        *("computer", "computer_use", "computer_use_preview"),
        *("local_shell", "shell", "apply_patch"),
        *("namespace", "programmatic_tool_calling"),
        "custom",  # its input is no JSON, but a text or what a grammar of OpenAI's allows
    }
)
"""Types of tools that are left out."""
ITEM_TYPES = frozenset(
    {
        *("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call"),
        *("mcp_call", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response"),
        *("tool_search_call", "tool_search_output", "additional_tools"),
        *("computer_call", "computer_call_output"),
        *("local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output"),
        *("apply_patch_call", "apply_patch_call_output", "program", "program_output"),
        *("custom_tool_call", "custom_tool_call_output"),
    }
)
"""Types of input items that belong to them, which are left out too."""


class HostedTools:
    """Leaves hosted tools, and what belongs to them, out of a request, and lists their types.

    Args:
        ignores_hosted_tools: Whether hosted tools are left out rather than refused.
    """

    def __init__(self, *, ignores_hosted_tools: bool) -> None:
        self._ignores_hosted_tools = ignores_hosted_tools
        self.ignored: dict[str, None] = {}
        """The types that were left out, in order."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer that list what was left out."""
        return {IGNORED_HEADER: ", ".join(self.ignored)[:_MAX_IGNORED]} if self.ignored else {}

    def without(self, members: object, leaves: Callable[[str], bool], max_members: int) -> object:
        """Returns a list without members of some types; what is no list, or too long, as it is.

        Args:
            members: The list, as the client sent it.
            leaves: Says whether a type is left out; such a type is fit for a header.
            max_members: The most members of a list that is read.
        """
        if not isinstance(members, list) or len(members) > max_members:
            return members
        kept = []
        for member in members:
            kind = member.get("type") if isinstance(member, dict) else None
            if isinstance(kind, str) and leaves(kind):
                self.ignored[kind] = None
            else:
                kept.append(member)
        return kept


class ResponsesFields(HostedTools):
    """The rule for the fields of one request to the Responses API."""

    def apply(self, values: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
        """Returns the fields that are to be read.

        Args:
            values: The fields of the body.
            known: The names of the fields that the request's type has.

        Raises:
            InvalidParameter: A field is not among `known`.
        """
        refuse_unknown(values, known)
        if not self._ignores_hosted_tools:
            return values
        kept = {
            "tools": self.without(values.get("tools"), TOOL_TYPES.__contains__, MAX_TOOLS),
            "input": self.without(values.get("input"), ITEM_TYPES.__contains__, MAX_ITEMS),
        }
        choice = values.get("tool_choice")
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            tools = self.without(choice.get("tools"), TOOL_TYPES.__contains__, MAX_TOOLS)
            kept["tool_choice"] = choice | {"tools": tools}
        return values | {name: value for name, value in kept.items() if name in values}
