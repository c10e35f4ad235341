"""mistralai: prints the names of all fields of a chat's request, as docs/wire.md writes them."""

import json

from mistralai.client import models

TYPES = {
    "": [models.ChatCompletionRequest, models.ChatCompletionStreamRequest],
    "response_format.": [models.ResponseFormat],
    "response_format.json_schema.": [models.JSONSchema],
    "tools.": [models.Tool],
    "tools.function.": [models.Function],
    "messages.": [
        models.SystemMessage,
        models.UserMessage,
        models.AssistantMessage,
        models.ToolMessage,
    ],
    "messages.content.": [models.TextChunk],
    "messages.tool_calls.": [models.ToolCall],
    "messages.tool_calls.function.": [models.FunctionCall],
}
fields = [
    place + (field.alias or name)
    for place, kinds in TYPES.items()
    for kind in kinds
    for name, field in kind.model_fields.items()
]
print(json.dumps(sorted(set(fields))))
