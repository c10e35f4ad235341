"""An answer at once, written as JSON while its chunks arrive: the frame that all kinds share.

Each chunk is written when it comes and then forgotten, so that the end of a long answer costs no
more than its beginning, and nothing of it is held twice. The types of the answer stand beside each
kind's writer; a test holds both to the same bytes.
"""

import json
from collections.abc import Callable, Iterator

from serving.errors import InvalidRequest
from serving.gateway.dialect.chunks import (
    Chunks,
    Identity,
    finish_reason,
    id_list,
    usage,
)
from serving.proto import inference_pb2
from serving.proto.stop_reason import stop_reason

# Bytes of a whole answer. Logprobs make it long: of 16 choices with the 20 likeliest in each place,
# a token is about 25,000 bytes.
MAX_BYTES = 64 * 2**20
# Bytes of one log-probability, about.
LOGPROB_BYTES = 80
# Bytes of a token id in a list, about.
ID_BYTES = 7

# Writes a text as JSON, in Unicode.
encode = json.JSONEncoder(ensure_ascii=False).encode


class WholeChoice:
    """One choice of an answer; each kind of request has a subclass.

    Args:
        index: Its place among the choices.
        tells_stop: Whether the choice has the member `stop_reason`.
    """

    def __init__(self, index: int, *, tells_stop: bool = False) -> None:
        self.index = index
        self._tells_stop = tells_stop
        self._stop_reason = ""  # the member, with the comma before it
        self._ids: bytearray | None = None  # of its tokens, the inside of a list
        self.text = bytearray()  # the inside of a JSON string
        self.reason = ""

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return len(self.text) + len(self._ids or b"")

    @property
    def members(self) -> str:
        """The members behind the finish reason, each with a comma before it."""
        ids = "" if self._ids is None else f',"token_ids":[{self._ids.decode()}]'
        return self._stop_reason + ids

    def return_ids(self) -> None:
        """Has the ids of its tokens written; to be called before the first chunk is added."""
        self._ids = bytearray()

    def add(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Writes a chunk of the choice."""
        self.text += encode(chunk.text)[1:-1].encode()
        if self._ids is not None and chunk.token_ids:
            self._ids += (("," if self._ids else "") + id_list(chunk.token_ids)).encode()
        if chunk.finish_reason:
            self.reason = finish_reason(chunk)
            if self._tells_stop:
                self._stop_reason = f',"stop_reason":{json.dumps(stop_reason(chunk))}'
        if chunk.logprobs:
            self.add_logprobs(chunk)

    def add_logprobs(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Writes the log-probabilities of a chunk, which has some."""
        raise NotImplementedError

    def pieces(self) -> Iterator[bytes | bytearray]:
        """Yields the choice as JSON."""
        raise NotImplementedError


class WholeAnswer:
    """Gathers the chunks of one answer; each kind of request has a subclass.

    Args:
        identity: The fields of the answer that are known before.
    """

    kind: str
    choice: Callable[..., WholeChoice]

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._choices: dict[int, WholeChoice] = {}
        self._usage = ""
        self._num_bytes = 0

    def add(self, chunks: Chunks) -> None:
        """Writes chunks in the order in which they came.

        Raises:
            InvalidRequest: The answer has more than MAX_BYTES.
        """
        for chunk in chunks:
            if chunk.HasField("usage"):
                spent = usage(chunk, tells_cached=self._identity.tells_cached)
                self._usage = spent.model_dump_json()
            if not (chunk.text or chunk.logprobs or chunk.finish_reason or chunk.tool_calls):
                continue  # it says how far the prompt is computed
            choice = self._choices.get(chunk.choice)
            if choice is None:
                choice = self._choices[chunk.choice] = self.choice(
                    chunk.choice, tells_stop=self._identity.is_openai
                )
                if self._identity.returns_ids:
                    choice.return_ids()
            before = choice.num_bytes
            choice.add(chunk)
            self._num_bytes += choice.num_bytes - before
        check_size(self._num_bytes)

    def pieces(self) -> Iterator[bytes | bytearray]:
        """Yields the whole answer as JSON; call it when all chunks have been added."""
        identity = self._identity
        yield (
            f'{{"id":{encode(identity.id)},"object":"{self.kind}","created":{identity.created},'
            f'"model":{encode(identity.model)},"choices":['
        ).encode()
        for place, index in enumerate(sorted(self._choices)):
            if place:
                yield b","
            yield from self._choices[index].pieces()
        yield f'],"usage":{self._usage}'.encode()
        yield from self.rest()
        yield b"}"

    def rest(self) -> Iterator[bytes | bytearray]:
        """Yields the members behind the usage, each with a comma before it."""
        yield from ()


def check_size(num_bytes: int) -> None:
    """Raises InvalidRequest if a whole answer of so many bytes is too long."""
    if num_bytes > MAX_BYTES:
        raise InvalidRequest(
            f"the answer has more than {MAX_BYTES:,} bytes with its log-probabilities; ask for it "
            "with 'stream': true, or for fewer choices, tokens or likeliest tokens"
        )


def check_logprobs(calls: list[inference_pb2.GenerateRequest]) -> None:
    """Raises InvalidRequest if the log-probabilities of a whole answer would be too long.

    Args:
        calls: The calls that are about to be asked; those without `max_tokens` are not counted.
    """
    num_logprobs = sum(
        (call.n or 1) * call.max_tokens * (1 + call.top_logprobs)
        for call in calls
        if call.HasField("top_logprobs")
    )
    # Nobody knows yet how many tokens a prompt has that is given as a text.
    num_logprobs += sum(
        (call.n or 1) * len(call.token_ids.ids) * (1 + call.prompt_logprobs)
        for call in calls
        if call.HasField("prompt_logprobs")
    )
    check_size(num_logprobs * LOGPROB_BYTES)
