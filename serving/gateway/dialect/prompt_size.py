"""Size of prompts, held against the model's before the service is asked.

The service refuses too long a prompt itself. Were it asked, megabytes that can be no prompt would
be written, sent and read on the event loops of both processes, while others wait.
"""

from collections.abc import Sequence

from serving.errors import ContextTooLong
from serving.proto import inference_pb2 as pb
from serving.proto.prompt_size import chat_size


def check_prompts(calls: Sequence[pb.GenerateRequest], model: pb.ModelInfo) -> None:
    """Raises ContextTooLong if a prompt has more bytes, or ids, than the model's context holds."""
    for call in calls:
        ids = len(call.token_ids.ids)
        if model.max_context and ids > model.max_context:
            raise ContextTooLong.of(model.max_context, f"the prompt has {ids:,} tokens")
        size = _size(call)
        if model.max_prompt_bytes and size > model.max_prompt_bytes:
            raise ContextTooLong.of(
                model.max_context,
                f"the prompt has {size:,} bytes, more than so many tokens can hold",
            )


def _size(call: pb.GenerateRequest) -> int:
    """Returns the bytes of a prompt's text, without the roles of messages."""
    if call.WhichOneof("prompt") == "chat":
        return chat_size(call.chat)
    return len(call.text.encode())
