"""Reading of requests: a GenerateRequest becomes a Request of the engine, checked and in ids.

Tokenize and Detokenize are answered here too, because they are that rendering and its inverse.
"""

import secrets
import time
from collections.abc import Iterable, Sequence

from mixtral_jax.errors import ChatError, SamplingError
from mixtral_jax.sampling_params import MAX_BIASES, MAX_LOGIT_BIAS, SamplingFields, SamplingParams
from mixtral_jax.tokenization.messages import Message
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.errors import ContextTooLong, InvalidParameter, InvalidRequest
from serving.proto import inference_pb2 as pb
from serving.scheduling.request import Priority, Request

# The queue counts a request once however many choices it has, so their number is limited.
MAX_CHOICES = 16
# Before min_tokens the ids that end a choice are biased too, so their number is limited.
MAX_STOP_IDS = 16
# Bytes of the gateway's salt, a SHA-256.
MAX_SALT = 32
_NO_LIMIT = 2**31


class Translator:
    """Translates for one model. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, info: pb.ModelInfo) -> None:
        assert MAX_LOGIT_BIAS + MAX_STOP_IDS + len(tokenizer.eos_ids) <= MAX_BIASES
        self._tokenizer = tokenizer
        self._info = info
        pieces = (tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))
        # A text of more bytes never fits the context. Encoding it to find out would take seconds.
        self._max_bytes = info.max_context * max(map(len, pieces))

    def request(self, message: pb.GenerateRequest, seconds: float | None) -> Request:
        """Returns the engine's request; `seconds` from now it must be answered, None for no limit.

        Raises InvalidRequest naming the field.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        max_tokens = message.max_tokens if message.HasField("max_tokens") else _NO_LIMIT
        n = message.n if message.HasField("n") else 1
        if max_tokens < 1:
            raise InvalidParameter("max_tokens is 0; ask for at least 1 token")
        if message.min_tokens > max_tokens:
            raise InvalidParameter(
                f"min_tokens is {message.min_tokens}; it must be within 0 and max_tokens, "
                f"which is {max_tokens}"
            )
        _check("n", n, 1, MAX_CHOICES)
        if "" in message.stop:
            raise InvalidParameter("stop holds an empty text; leave it out")
        if len(message.stop_token_ids) > MAX_STOP_IDS:
            raise InvalidParameter(
                f"stop_token_ids has {len(message.stop_token_ids)} ids; give at most {MAX_STOP_IDS}"
            )
        self._check_ids("stop_token_ids", message.stop_token_ids)
        if len(message.cache_salt) > MAX_SALT:
            raise InvalidParameter(
                f"cache_salt has {len(message.cache_salt)} bytes; give at most {MAX_SALT}"
            )
        sampling = self._sampling(message)
        ends = frozenset() if message.ignore_eos else self._tokenizer.eos_ids
        return Request(
            id=secrets.token_hex(16),
            prompt_ids=tuple(self._prompt_ids(message)),
            sampling=sampling,
            max_tokens=max_tokens,
            eos_ids=ends | frozenset(message.stop_token_ids),
            min_tokens=message.min_tokens,
            n=n,
            deadline=deadline,
            caller=message.caller,
            salt=message.cache_salt,
            priority=_priority(message.priority),
            suspect=message.suspect,
        )

    def tokens(self, message: pb.TokenizeRequest) -> pb.Tokens:
        """Returns the ids of a chat or a text, and the bytes of each. Raises InvalidRequest."""
        match message.WhichOneof("input"):
            case "chat":
                ids = self._chat_ids(message.chat)
            case "text":
                ids = self._text_ids(message.text)
            case _:
                raise InvalidRequest("input is missing; set chat or text")
        return pb.Tokens(ids=ids, pieces=[self._tokenizer.token_bytes(i) for i in ids])

    def text(self, message: pb.DetokenizeRequest) -> pb.Text:
        """Returns the text of ids. Raises InvalidParameter."""
        self._check_ids("ids", message.ids)
        return pb.Text(text=self._tokenizer.decode(message.ids))

    def _sampling(self, message: pb.GenerateRequest) -> SamplingParams:
        """Translates the parameters of the wire; raises InvalidParameter naming the wrong one."""
        given = message.sampling
        fields: SamplingFields = {
            # A number beyond the vocabulary keeps all of it; it must also fit 31 bits.
            "top_k": min(given.top_k, self._info.vocab_size),
            "min_p": given.min_p,
            "presence_penalty": given.presence_penalty,
            "frequency_penalty": given.frequency_penalty,
            "logit_bias": dict(given.logit_bias),
        }
        if given.HasField("temperature"):
            fields["temperature"] = given.temperature
        if given.HasField("top_p"):
            fields["top_p"] = given.top_p
        if given.HasField("repetition_penalty"):
            fields["repetition_penalty"] = given.repetition_penalty
        if given.HasField("seed"):
            fields["seed"] = given.seed
        if message.HasField("top_logprobs"):
            fields["top_logprobs"] = message.top_logprobs
        try:
            sampling = SamplingParams(**fields)
            sampling.check_vocabulary(self._info.vocab_size)
        except SamplingError as error:
            raise InvalidParameter(str(error)) from None
        return sampling

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        largest = max(ids, default=0)
        if largest >= self._info.vocab_size:
            raise InvalidParameter(f"{name} holds {largest}; ids are below {self._info.vocab_size}")

    def _prompt_ids(self, message: pb.GenerateRequest) -> Sequence[int]:
        match message.WhichOneof("prompt"):
            case "chat":
                ids: Sequence[int] = self._chat_ids(message.chat)
                if not ids:
                    raise InvalidRequest(
                        "the model's chat template makes no text of these messages; "
                        "add a message of the user"
                    )
                return ids
            case "text":
                ids = self._text_ids(message.text)
                if not ids:
                    raise InvalidRequest("text is empty; give at least one character")
                return ids
            case "token_ids":
                ids = message.token_ids.ids
                if not ids:
                    raise InvalidRequest("token_ids is empty; give at least one id")
                if max(ids) >= self._info.vocab_size:
                    raise InvalidRequest(
                        f"token_ids holds {max(ids)}; ids are below {self._info.vocab_size}"
                    )
                return ids
            case _:
                raise InvalidRequest("prompt is missing; set chat, text or token_ids")

    def _chat_ids(self, chat: pb.Chat) -> list[int]:
        messages: list[Message] = [{"role": m.role, "content": m.content} for m in chat.messages]
        self._check_size("the messages have", sum(len(m["content"].encode()) for m in messages))
        try:
            return self._tokenizer.chat(messages, continue_last=chat.continue_last)
        except ChatError as error:
            raise InvalidRequest(str(error)) from None

    def _text_ids(self, text: str) -> list[int]:
        self._check_size("the text has", len(text.encode()))
        return self._tokenizer.encode(text)

    def _check_size(self, what: str, size: int) -> None:
        if size > self._max_bytes:
            raise ContextTooLong(
                f"{what} {size:,} bytes; the {self._info.max_context:,} tokens of this server's "
                "context cannot hold so many: shorten what you send"
            )


def _priority(priority: pb.Priority) -> Priority:
    """Returns the class of the proto's; raises InvalidParameter for a number it does not have."""
    match priority:
        case pb.PRIORITY_UNSPECIFIED | pb.PRIORITY_INTERACTIVE:
            return Priority.INTERACTIVE
        case pb.PRIORITY_BATCH:
            return Priority.BATCH
    raise InvalidParameter(f"priority is {priority}; give PRIORITY_INTERACTIVE or PRIORITY_BATCH")


def _check(name: str, value: float, low: float, high: float) -> None:
    # Rounded: as a float of the wire, 0.01 is a little less than 0.01. NaN is refused.
    if not low <= round(value, 6) <= high:
        raise InvalidParameter(f"{name} is {value:g}; it must be within {low:g} and {high:g}")
