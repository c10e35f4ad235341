"""Reading of requests: a GenerateRequest becomes a Request of the engine, checked and in ids.

Tokenize and Detokenize are answered here too, because they are that rendering and its inverse.
"""

import logging
import secrets
from collections.abc import Callable, Iterable, Sequence

from google.protobuf.message import Message as ProtoMessage

from mixtral_jax.errors import ChatError, SamplingError
from mixtral_jax.sampling_params import MAX_BIASES, MAX_LOGIT_BIAS, SamplingFields, SamplingParams
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.errors import InvalidParameter, InvalidRequest, Problem, UnsupportedParameter
from serving.proto import inference_pb2 as pb
from serving.proto.prompt_size import chat_size
from serving.scheduling.request import NO_LIMIT, Priority, Request
from serving.service.answer.form import CAPABILITIES, AnswerForm, AnswerForms
from serving.service.answer.tool_use import has_tools, messages_of, tools_of
from serving.service.bounds import MAX_STOP_IDS, Bounds

# Text has three to five bytes for each token of a large vocabulary, and runs of spaces have more.
BYTES_PER_TOKEN = 16
# Bytes of a message that is read on the event loop: 200 tokens of a prompt take 0.3 ms there,
# letters in no order 0.6 ms, and a thread for them would take as long to wake.
QUICK_BYTES = 1024
_log = logging.getLogger(__name__)


class Translator:
    """Translates for one model. Thread-safe.

    Args:
        tokenizer: That of the model.
        info: The model's sizes.
        bytes_per_token: Most bytes of a prompt for each token of the context. A prompt of more is
            refused before it is tokenized, because to tokenize it would take seconds.
        compiler: Compiles what answers are held to; None refuses to hold them to anything.
        reads_predictions: Whether the engine guesses tokens from what answers may repeat.

    Attributes:
        prompt_bytes: Most bytes of a prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        info: pb.ModelInfo,
        bytes_per_token: int = BYTES_PER_TOKEN,
        compiler: Compiler | None = None,
        *,
        reads_predictions: bool = False,
    ) -> None:
        assert MAX_LOGIT_BIAS + MAX_STOP_IDS + len(tokenizer.eos_ids) <= MAX_BIASES
        self._tokenizer = tokenizer
        self._info = info
        self._reads_predictions = reads_predictions
        longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        # Text of more bytes than the longest piece has for each token never fits.
        self.prompt_bytes = info.max_context * min(longest, bytes_per_token)
        self._bounds = Bounds(info.max_context, self.prompt_bytes)
        self._forms = None if compiler is None else AnswerForms(compiler, tokenizer)

    def check(self, message: ProtoMessage) -> None:
        """Raises InvalidRequest naming the field that is too large; quick enough for a loop.

        The other methods do it first. A service does it before it has a thread for them.
        """
        self._bounds.check(message)
        match message:
            case pb.GenerateRequest():
                self._check_chat(message.chat)
            case pb.TokenizeRequest():
                self._check_chat(message.chat)

    def is_quick(self, message: pb.GenerateRequest) -> bool:
        """Returns whether `request` takes less time than waking a thread for it.

        All of the message counts, whatever it holds; tools are written by the template at a length
        that is not the message's.
        """
        return message.ByteSize() <= QUICK_BYTES and not message.chat.tools

    def request(self, message: pb.GenerateRequest, deadline: float | None) -> Request:
        """Returns the engine's request.

        Raises InvalidRequest naming the field.

        Args:
            message: The request of the wire.
            deadline: The time.monotonic() by which it must be answered; None for no limit.
        """
        self.check(message)
        max_tokens = message.max_tokens if message.HasField("max_tokens") else NO_LIMIT
        n = message.n if message.HasField("n") else 1
        if max_tokens < 1 and not asks_of_prompt(message):
            raise InvalidParameter(
                "max_tokens is 0; ask for at least 1 token, or for the prompt's logprobs"
            )
        if message.min_tokens > max_tokens:
            raise InvalidParameter(
                f"min_tokens is {message.min_tokens}; it must be within 0 and max_tokens, "
                f"which is {max_tokens}"
            )
        if "" in message.stop:
            raise InvalidParameter("stop holds an empty text; leave it out")
        self._check_ids("stop_token_ids", message.stop_token_ids)
        self._check_ids("allowed_token_ids", message.allowed_token_ids)
        sampling = self._sampling(message)
        ends = frozenset() if message.ignore_eos else self._tokenizer.eos_ids
        ends |= frozenset(message.stop_token_ids)
        allowed = frozenset(message.allowed_token_ids)
        if message.min_tokens and allowed and allowed <= ends:
            raise InvalidParameter(
                "allowed_token_ids holds only ids that end an answer, and none of them is drawn "
                "before min_tokens; allow others, or leave out min_tokens"
            )
        return Request(
            id=secrets.token_hex(16),
            prompt_ids=tuple(self._prompt_ids(message)),
            sampling=sampling,
            max_tokens=max_tokens,
            eos_ids=ends,
            min_tokens=message.min_tokens,
            n=n,
            deadline=deadline,
            caller=message.caller,
            salt=message.cache_salt,
            priority=_priority(message.priority),
            suspect=message.suspect,
            allowed_ids=allowed,
            prediction_ids=self._prediction_ids(message),
            prompt_logprobs=(
                message.prompt_logprobs if message.HasField("prompt_logprobs") else None
            ),
        )

    def needs_form(self, message: pb.GenerateRequest) -> bool:
        """Returns whether something is asked of the form of an answer."""
        return message.HasField("response_format") or has_tools(message.chat)

    @property
    def capabilities(self) -> Sequence[str]:
        """Names of ModelInfo for the forms that answers can be held to."""
        return () if self._forms is None else CAPABILITIES

    def form(self, message: pb.GenerateRequest) -> AnswerForm | None:
        """Returns what an answer is held to; None for nothing.

        It is compiled, which may take seconds. Raises InvalidParameter naming the field.
        """
        if self._forms is None:
            raise UnsupportedParameter("this server cannot hold answers to a form")
        return self._forms.form(message, continues=continues(message))

    def tokens(self, message: pb.TokenizeRequest) -> pb.Tokens:
        """Returns the ids of a chat or a text, and the bytes of each. Raises InvalidRequest."""
        self.check(message)
        match message.WhichOneof("input"):
            case "chat":
                ids = self._chat_ids(message.chat)
            case "text":
                with_special = (
                    not message.HasField("add_special_tokens") or message.add_special_tokens
                )
                ids = self._text_ids(message.text, with_special=with_special)
            case _:
                raise InvalidRequest("input is missing; set chat or text")
        return pb.Tokens(ids=ids, pieces=[self._tokenizer.token_bytes(i) for i in ids])

    def text(self, message: pb.DetokenizeRequest) -> pb.Text:
        """Returns the text of ids. Raises InvalidParameter."""
        self.check(message)
        self._check_ids("ids", message.ids)
        return pb.Text(text=self._tokenizer.decode(message.ids))

    def _sampling(self, message: pb.GenerateRequest) -> SamplingParams:
        """Translates the parameters of the wire; raises InvalidParameter naming the wrong one."""
        given = pb.SamplingParams()
        given.CopyFrom(self._info.sampling_defaults)
        given.MergeFrom(message.sampling)  # what the caller gives replaces the model's own
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
                    raise InvalidParameter("text is empty; give at least one character")
                return ids
            case "token_ids":
                ids = message.token_ids.ids
                if not ids:
                    raise InvalidParameter("token_ids is empty; give at least one id")
                self._check_ids("token_ids", ids)
                return ids
            case _:
                raise InvalidRequest("prompt is missing; set chat, text or token_ids")

    def _prediction_ids(self, message: pb.GenerateRequest) -> tuple[int, ...]:
        """Returns the tokens that an answer may repeat; those beyond a context are of no use."""
        if not (self._reads_predictions and message.prediction):
            return ()
        ids = self._text_ids(message.prediction, with_special=False)
        return tuple(ids[: self._info.max_context])

    def _chat_ids(self, chat: pb.Chat) -> list[int]:
        messages, tools = messages_of(chat), tools_of(chat)
        asks = not chat.HasField("add_generation_prompt") or chat.add_generation_prompt
        if chat.continue_last and chat.HasField("add_generation_prompt") and asks:
            raise InvalidRequest(
                "continue_last and add_generation_prompt are both true; an answer is either "
                "continued or opened"
            )
        return self._rendered(
            lambda: self._tokenizer.chat(
                messages, continue_last=chat.continue_last, asks=asks, tools=tools
            )
        )

    def _text_ids(self, text: str, *, with_special: bool = True) -> list[int]:
        return self._rendered(lambda: self._tokenizer.encode(text, with_special=with_special))

    def _rendered(self, render: Callable[[], list[int]]) -> list[int]:
        """Returns what a tokenizer makes of a prompt.

        Raises InvalidRequest for whatever the tokenizer raises: it ends this request alone; and
        InvalidParameter where that is a field of a message.
        """
        try:
            return render()
        except ChatError as error:
            if error.path:
                problem = Problem("value_error", ("chat", *error.path), str(error), None)
                raise InvalidParameter(str(error), [problem]) from None
            raise InvalidRequest(str(error)) from None
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a panic of a tokenizer in Rust is no Exception
            _log.exception("the tokenizer failed")
            raise InvalidRequest("the model's tokenizer cannot read this prompt") from None

    def _check_chat(self, chat: pb.Chat) -> None:
        name = "the messages and tools have" if chat.tools else "the messages have"
        self._bounds.check_prompt(name, chat_size(chat))


def asks_of_prompt(message: pb.GenerateRequest) -> bool:
    """Returns whether something is told about the prompt, so that an answer may be left out."""
    is_scored = message.HasField("prompt_logprobs")
    return is_scored or message.return_prompt_ids or message.return_prompt_pieces


def continues(message: pb.GenerateRequest) -> bool:
    """Returns whether an answer continues the text of its prompt, so that its first space stays."""
    return message.WhichOneof("prompt") != "chat" or message.chat.continue_last


def _priority(priority: pb.Priority) -> Priority:
    """Returns the class of the proto's; raises InvalidParameter for a number it does not have."""
    match priority:
        case pb.PRIORITY_UNSPECIFIED | pb.PRIORITY_INTERACTIVE:
            return Priority.INTERACTIVE
        case pb.PRIORITY_BATCH:
            return Priority.BATCH
    raise InvalidParameter(f"priority is {priority}; give PRIORITY_INTERACTIVE or PRIORITY_BATCH")
