"""Tools of Anthropic's own in requests: what only Anthropic can run, or only its models know.

They are refused by name. With `--ignore-hosted-tools` they are left out instead, with their blocks
in the conversation, and the answer lists them in a header.

https://docs.claude.com/en/docs/agents-and-tools/tool-use/overview
"""

import re
from collections.abc import Collection
from typing import Any

from serving.gateway.dialect.anthropic.content import MAX_TURNS
from serving.gateway.dialect.fields import MAX_PARTS, MAX_TOOLS
from serving.gateway.dialect.parsing import refuse_unknown
from serving.gateway.dialect.responses.hosted_tools import HostedTools

TOOL_FAMILIES = (
    *("bash_", "browser_toolset_", "code_execution_", "computer_", "mcp_toolset", "memory_"),
    *("advisor_", "text_editor_", "tool_search_tool_", "web_fetch_", "web_search_"),
)
"""Beginnings of the types of tools that are left out; dates follow."""
_TYPE = re.compile(r"[a-z0-9_]{1,64}")  # what follows is the client's, and stands in a header
BLOCK_TYPES = frozenset(
    {
        *("server_tool_use", "mcp_tool_use", "mcp_tool_result", "container_upload"),
        *("web_search_tool_result", "web_fetch_tool_result", "tool_search_tool_result"),
        *("code_execution_tool_result", "bash_code_execution_tool_result"),
        *("text_editor_code_execution_tool_result", "advisor_tool_result", "tool_reference"),
        "mcp_tool_listing",
    }
)
"""Types of blocks that belong to them, which are left out too."""


class MessagesFields(HostedTools):
    """The rule for the fields of one request to the Messages API."""

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
        kept = dict(values)
        if "tools" in values:
            kept["tools"] = self.without(values["tools"], _is_hosted, MAX_TOOLS)
        turns = values.get("messages")
        if isinstance(turns, list) and len(turns) <= MAX_TURNS:
            kept["messages"] = [self._turn(turn) for turn in turns]
        return kept

    def _turn(self, turn: object) -> object:
        """Returns a message without blocks of hosted tools, also within results of others."""
        if not isinstance(turn, dict):
            return turn
        content = self.without(turn.get("content"), BLOCK_TYPES.__contains__, MAX_PARTS)
        if isinstance(content, list) and len(content) <= MAX_PARTS:
            content = [
                block | {"content": self._within(block)} if _has_blocks(block) else block
                for block in content
            ]
        return turn | {"content": content} if "content" in turn else turn

    def _within(self, block: dict[str, Any]) -> object:
        return self.without(block["content"], BLOCK_TYPES.__contains__, MAX_PARTS)


def _is_hosted(kind: str) -> bool:
    return _TYPE.fullmatch(kind) is not None and kind.startswith(TOOL_FAMILIES)


def _has_blocks(block: object) -> bool:
    return isinstance(block, dict) and isinstance(block.get("content"), list)
