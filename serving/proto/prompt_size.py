"""Size of prompts in bytes, counted alike by the gateway and by the service."""

from serving.proto import inference_pb2 as pb


def chat_size(chat: pb.Chat) -> int:
    """Returns the bytes of a chat's texts in UTF-8, without the roles of messages.

    Texts are the contents of messages, their calls of tools, and the tools.
    """
    size = 0
    for message in chat.messages:
        size += len(message.content.encode()) + len(message.tool_call_id.encode())
        for call in message.tool_calls:
            size += sum(len(text.encode()) for text in (call.id, call.name, call.arguments))
    for tool in chat.tools:
        size += sum(len(text.encode()) for text in (tool.name, tool.description, tool.parameters))
    return size
