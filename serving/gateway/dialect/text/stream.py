"""A text completion's answer as a stream. Its chunks have the type of the whole answer."""

import json

from serving.gateway.dialect.chunks import Identity, id_list
from serving.gateway.dialect.fields import StreamUsage
from serving.gateway.dialect.sse import Events
from serving.gateway.dialect.text.logprobs import TextPosition, text_logprobs
from serving.gateway.dialect.text.prompts import EchoedPrompt, Repeated
from serving.proto import inference_pb2


class TextEvents(Events):
    """Writes the events of a text completion, whose type is `TextCompletion`."""

    kind = "text_completion"
    merges_end = True

    def __init__(
        self,
        identity: Identity,
        stream_usage: StreamUsage = StreamUsage.LAST,
        repeated: Repeated | None = None,
    ) -> None:
        super().__init__(identity, stream_usage)
        self._repeated = repeated or Repeated([])
        self._prompts: dict[int, EchoedPrompt] = {}  # by place
        self._positions: dict[int, TextPosition] = {}  # by choice
        self._prompt_ids: dict[int, str] = {}  # by choice, until its first event

    def _events(self, chunk: inference_pb2.GenerateChunk) -> str:
        events = super()._events(chunk)
        return self._echo(chunk) + events

    def _ids(self, chunk: inference_pb2.GenerateChunk) -> str:
        """Returns the ids of a choice's tokens, before the first ones those of its prompt."""
        if chunk.prompt_ids:
            prompt = f'"prompt_token_ids":[{id_list(chunk.prompt_ids)}],'
            choices = self._repeated.choices
            first = chunk.choice // choices * choices
            self._prompt_ids |= dict.fromkeys(range(first, first + choices), prompt)
        ids = super()._ids(chunk)
        return self._prompt_ids.pop(chunk.choice, "") + ids if ids else ""

    def _echo(self, chunk: inference_pb2.GenerateChunk) -> str:
        """Returns the events of what a chunk tells of an echoed prompt, one for each choice."""
        repeated = self._repeated
        if not repeated.is_echoed or not (chunk.prompt_pieces or chunk.prompt_logprobs):
            return ""
        place = chunk.choice // repeated.choices
        if place not in self._prompts:
            self._prompts[place] = EchoedPrompt(repeated.texts[place], repeated.logprobs)
        prompt = self._prompts[place]
        news = prompt.read(chunk)
        if news is None:
            return ""
        logprobs = "null"
        if news.columns is not None:
            logprobs = json.dumps(news.columns, separators=(",", ":"))
        first = place * repeated.choices
        choices = range(first, first + repeated.choices)
        for choice in choices:
            self._positions.setdefault(choice, TextPosition(prompt.length))
        spent = self._spent(self._prompt_tokens)
        return "".join(self._event(choice, news.text, logprobs, usage=spent) for choice in choices)

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
