"""A text completion's answer as a stream. Its chunks have the type of the whole answer."""

import json

from serving.gateway.dialect.chunks import Identity
from serving.gateway.dialect.fields import StreamUsage
from serving.gateway.dialect.sse import Events
from serving.gateway.dialect.text.response import TextPosition, text_logprobs
from serving.proto import inference_pb2


class TextEvents(Events):
    """Writes the events of a text completion, whose type is `TextCompletion`."""

    kind = "text_completion"
    merges_end = True

    def __init__(self, identity: Identity, stream_usage: StreamUsage = StreamUsage.LAST) -> None:
        super().__init__(identity, stream_usage)
        self._positions: dict[int, TextPosition] = {}  # by choice

    def _event(
        self, index: int, text: str, logprobs: str, reason: str = "null", usage: str = ""
    ) -> str:
        return (
            f'{self._head}{{"text":{json.dumps(text)},"index":{index},"logprobs":{logprobs},'
            f'"finish_reason":{reason}}}]{usage}}}\n\n'
        )

    def _logprobs(self, chunk: inference_pb2.GenerateChunk) -> str:
        position = self._positions.setdefault(chunk.choice, TextPosition())
        columns = text_logprobs(chunk, position=position)
        return json.dumps(columns, separators=(",", ":"))
