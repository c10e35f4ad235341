"""The output of an answer of the Responses API: items that grow while the service's chunks come.

A text becomes a message, each call of a function an item of its own. All of them are kept as JSON,
because the end of a stream repeats what its events have told.
"""

from collections.abc import Callable

from serving.errors import InvalidRequest
from serving.gateway.dialect.chat.response import chat_logprobs
from serving.proto import inference_pb2

# Bytes of an answer, which the last events of a stream repeat four times. Only log-probabilities
# make it so long.
MAX_BYTES = 16 * 2**20

Encode = Callable[[str], str]


class MessageItem:
    """A message of the assistant.

    Args:
        item_id: Its id.
        encode: Writes a text as JSON.
    """

    def __init__(self, item_id: str, encode: Encode) -> None:
        self.id = item_id
        self._encode = encode
        self.text = bytearray()
        """Its text, the inside of a JSON string."""
        self.logprobs = bytearray()
        """The log-probabilities of its tokens, the inside of a JSON list."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return len(self.text) + len(self.logprobs)

    def add(self, chunk: inference_pb2.GenerateChunk) -> tuple[str, str]:
        """Adds a chunk's text; returns what is new of the text and the log-probabilities."""
        text = self._encode(chunk.text)[1:-1]
        logprobs = chat_logprobs(chunk, self._encode)
        self.text += text.encode()
        if logprobs:
            self.logprobs += (b"," if self.logprobs else b"") + logprobs.encode()
        return text, logprobs

    def part(self) -> str:
        """Returns its only part, an `OutputText`."""
        return (
            f'{{"type":"output_text","annotations":[],"logprobs":[{self.logprobs.decode()}],'
            f'"text":"{self.text.decode()}"}}'
        )

    def item(self, status: str, *, is_empty: bool = False) -> str:
        """Returns the `OutputMessage`; without its part if `is_empty`."""
        return (
            f'{{"id":{self._encode(self.id)},"type":"message","status":"{status}",'
            f'"role":"assistant","content":[{"" if is_empty else self.part()}]}}'
        )


class CallItem:
    """A call of a function.

    Args:
        item_id: Its id.
        call: The call, which is whole.
        encode: Writes a text as JSON.
    """

    def __init__(self, item_id: str, call: inference_pb2.ToolCall, encode: Encode) -> None:
        self.id = item_id
        self._encode = encode
        self.name = encode(call.name)
        """The name of the function, as JSON."""
        self.arguments = encode(call.arguments)
        """The arguments, which are JSON themselves, as a JSON string."""
        self._call_id = encode(call.id)

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return len(self.arguments) + len(self.name)

    def item(self, status: str, *, is_empty: bool = False) -> str:
        """Returns the `OutputFunctionCall`; without its arguments if `is_empty`."""
        arguments = '""' if is_empty else self.arguments
        return (
            f'{{"id":{self._encode(self.id)},"type":"function_call","status":"{status}",'
            f'"arguments":{arguments},'
            f'"call_id":{self._call_id},"name":{self.name}}}'
        )


class Output:
    """The items of one answer.

    Args:
        answer_id: The id of the answer, from which the items have theirs.
        encode: Writes a text as JSON.
    """

    def __init__(self, answer_id: str, encode: Encode) -> None:
        self.items: list[MessageItem | CallItem] = []
        self._number = answer_id.partition("_")[2] or answer_id
        self._encode = encode

    @property
    def message(self) -> MessageItem | None:
        """The message that grows at the end of the output, if there is one."""
        last = self.items[-1] if self.items else None
        return last if isinstance(last, MessageItem) else None

    def check_size(self) -> None:
        """Raises InvalidRequest if all items together hold more than MAX_BYTES."""
        check_size(sum(item.num_bytes for item in self.items))

    def begin_message(self) -> MessageItem:
        """Returns a new message at the end of the output."""
        message = MessageItem(f"msg_{self._number}_{len(self.items)}", self._encode)
        self.items.append(message)
        return message

    def add_call(self, call: inference_pb2.ToolCall) -> CallItem:
        """Returns a new call at the end of the output."""
        item = CallItem(f"fc_{self._number}_{len(self.items)}", call, self._encode)
        self.items.append(item)
        return item

    def written(self, status: str) -> str:
        """Returns the items as JSON, by commas.

        Args:
            status: The status of the answer. What an answer that was cut ends with is a message
                that was cut; a call is whole, or it is not there.
        """
        last = self.message
        return ",".join(item.item(status if item is last else "completed") for item in self.items)


def check_size(num_bytes: int) -> None:
    """Raises InvalidRequest if an answer of so many bytes is too long."""
    if num_bytes > MAX_BYTES:
        raise InvalidRequest(
            f"the answer has more than {MAX_BYTES:,} bytes with its log-probabilities; ask for "
            "fewer tokens or likeliest tokens"
        )


def has_text(chunk: inference_pb2.GenerateChunk) -> bool:
    """Returns whether a chunk adds to a message. Log-probabilities of calls belong to none."""
    return bool(chunk.text or (chunk.logprobs and not chunk.tool_calls))
