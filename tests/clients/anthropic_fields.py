"""anthropic: prints the names of all fields of a request, as docs/wire.md writes them."""

import json
import typing

from anthropic import types
from anthropic.types import beta, message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_create_params

TYPES = {
    "": [
        message_create_params.MessageCreateParamsNonStreaming,
        message_create_params.MessageCreateParamsStreaming,
        message_count_tokens_params.MessageCountTokensParams,
        beta_create_params.MessageCreateParamsStreaming,
    ],
    "messages.": [types.MessageParam],
    "messages.content.text.": [types.TextBlockParam],
    "messages.content.tool_use.": [types.ToolUseBlockParam],
    "messages.content.tool_result.": [types.ToolResultBlockParam],
    "messages.content.thinking.": [types.ThinkingBlockParam, types.RedactedThinkingBlockParam],
    "tools.": [types.ToolParam],
    "tool_choice.": [types.ToolChoiceParam],
    "output_config.": [types.OutputConfigParam, beta.BetaOutputConfigParam],
    "output_config.format.": [types.JSONOutputFormatParam],
    "thinking.": [types.ThinkingConfigParam],
    "context_management.": [beta.BetaContextManagementConfigParam],
}
# It becomes a header.
HEADERS = {"betas"}


def members(kind):
    """All types of a union, or the one type that is given."""
    inner = typing.get_args(kind)
    return [each for part in inner for each in members(part)] if inner else [kind]


fields = {
    place + name
    for place, kinds in TYPES.items()
    for kind in kinds
    for member in members(kind)
    for name in typing.get_type_hints(member)
}
print(json.dumps(sorted(fields - HEADERS)))
