"""Size of prompts, held against the model's before the service is asked.

The service refuses too long a prompt itself. Were it asked, megabytes that can be no prompt would
be written, sent and read on the event loops of both processes, while others wait.
"""

from collections.abc import Sequence

from serving.errors import ContextTooLong, InvalidParameter, InvalidRequest, ServingError
from serving.gateway.dialect.names import renamed
from serving.proto import inference_pb2 as pb
from serving.proto.prompt_size import chat_size

PROMPTS = (("text",), ("token_ids",))
"""The service's paths of a prompt that is no chat."""


def check_prompts(calls: Sequence[pb.GenerateRequest], model: pb.ModelInfo) -> None:
    """Raises ContextTooLong if a prompt has more bytes, or ids, than the model's context holds."""
    for place, call in enumerate(calls):
        excess = _excess(call, model)
        if excess:
            error = ContextTooLong.of(model.max_context, f"the prompt has {excess}")
            raise at_place(error, place) if len(calls) > 1 else error


def at_place(error: ServingError, place: int) -> ServingError:
    """Returns the error of one of several prompts, which names its place if it is the prompt's.

    Args:
        error: The error.
        place: The prompt's place in the list `prompt`.
    """
    name = f"prompt[{place}]"
    if isinstance(error, ContextTooLong):
        placed = ContextTooLong(f"{error} It is {name}.")
        placed.parameter = name
        return placed
    if type(error) is InvalidRequest:
        return InvalidRequest(f"{name}: {error}")
    if isinstance(error, InvalidParameter):
        return renamed(error, lambda path: (name,) if path in PROMPTS else path)
    return error


def _excess(call: pb.GenerateRequest, model: pb.ModelInfo) -> str:
    """Returns the size of a prompt that is too long; "" for every other."""
    ids = len(call.token_ids.ids)
    if model.max_context and ids > model.max_context:
        return f"{ids:,} tokens"
    return _excess_bytes(_size(call), model)


def check_tokenized(call: pb.TokenizeRequest, model: pb.ModelInfo) -> None:
    """Raises ContextTooLong if a text to tokenize has more bytes than the context holds."""
    is_chat = call.WhichOneof("input") == "chat"
    size = chat_size(call.chat) if is_chat else len(call.text.encode())
    if excess := _excess_bytes(size, model):
        raise ContextTooLong.of(model.max_context, f"the prompt has {excess}")


def _excess_bytes(size: int, model: pb.ModelInfo) -> str:
    if model.max_prompt_bytes and size > model.max_prompt_bytes:
        return f"{size:,} bytes, more than so many tokens can hold"
    return ""


def _size(call: pb.GenerateRequest) -> int:
    """Returns the bytes of a prompt's text, without the roles of messages."""
    if call.WhichOneof("prompt") == "chat":
        return chat_size(call.chat)
    return len(call.text.encode())
