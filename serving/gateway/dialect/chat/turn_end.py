"""The end of a rendered chat: vLLM's `add_generation_prompt` and `continue_final_message`.

https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#chat-api
"""

from collections.abc import Sequence

from pydantic_core import PydanticCustomError

from serving.gateway.dialect.chat.messages import Message
from serving.proto import inference_pb2


def check_turn_end(messages: Sequence[Message], opens: bool | None, continues: bool | None) -> None:
    """Refuses ends of a chat that contradict themselves.

    Args:
        messages: The chat; nothing is continued where it is empty.
        opens: `add_generation_prompt`.
        continues: `continue_final_message`.
    """
    if continues and opens:
        raise PydanticCustomError(
            "turn_end",
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
        )
    if continues and messages and messages[-1].role != "assistant":
        raise PydanticCustomError(
            "turn_end",
            "continue_final_message needs a last message of the role assistant, to go on from",
        )
    if opens and messages and messages[-1].prefix:
        raise PydanticCustomError(
            "turn_end", "add_generation_prompt and a last message with prefix exclude each other"
        )


def set_turn_end(chat: inference_pb2.Chat, opens: bool | None, continues: bool | None) -> None:
    """Writes the end of a chat, which `check_turn_end` has checked, into its proto."""
    if continues:
        chat.continue_last = True
    if opens is not None and not chat.continue_last:
        chat.add_generation_prompt = opens
