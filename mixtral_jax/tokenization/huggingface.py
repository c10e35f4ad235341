"""TemplateTokenizer: any `tokenizer.json` with a chat template, made safe for outside text."""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mixtral_jax.errors import ChatError, TokenizerError
from mixtral_jax.tokenization.chat_template import ChatTemplate
from mixtral_jax.tokenization.messages import (
    Message,
    Tool,
    check_text,
    checked,
    checked_tools,
    parsed_json,
)
from mixtral_jax.tokenization.special_tokens import (
    eos_ids,
    extra_special_tokens,
    named_tokens,
    read_text,
    template_source,
)
from mixtral_jax.tokenization.tool_prompt import PROMPT_FORM, prompted
from mixtral_jax.tokenization.tool_template import template_form
from mixtral_jax.tokenization.vocabulary import Vocabulary, byte_level_bytes, spm_bytes

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
_RESERVED = "\U0010ffff"  # a noncharacter: Unicode keeps it out of exchanged text
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # what control tokens look like


class TemplateTokenizer(Vocabulary):
    """A `tokenizer.json` with the chat template published beside it.

    The usual software renders a chat to one string and tokenizes that, so a message that spells
    "<|im_end|>" ends its own turn. Tokenizing messages and template apart would prevent that, and
    would cut the text differently at the seams. Here the control tokens are respelled instead:
    each becomes the noncharacter U+10FFFF and one character more, at the same id, both in the
    tokenizer and in the template (its literals, bos_token, eos_token and the like). The rendered
    chat is still one string, cut and merged as ever, so its ids are the usual ones. But outside
    text never holds U+10FFFF (it becomes U+FFFD), and no other spelling of a control id is left.
    The template sees the messages as they are, whatever it does with them.

    Control tokens are the added tokens that are marked special, or listed as special in
    `tokenizer_config.json` or `special_tokens_map.json`, or written around messages by the
    template.
    """

    def __init__(self, folder: Path) -> None:
        """Read `tokenizer.json` and the files of `special_tokens` beside it.

        Raises FileNotFoundError without the first, TokenizerError for contents that the library
        `tokenizers` cannot read or that this class cannot follow faithfully.
        """
        self.folder = folder  # where a copy of its files begins
        spec = _read_spec(folder / TOKENIZER_FILE)
        named = named_tokens(folder)
        source = template_source(folder)
        template = ChatTemplate(source, named) if source is not None else None
        special = extra_special_tokens(folder).union(named.values())
        written = set(_MARKUP.findall(template.sample())) if template else set()
        controls: dict[str, int] = {
            token["content"]: token["id"]
            for token in spec["added_tokens"]
            if token["special"] or token["content"] in written | special
        }
        _refuse_unknown_names(named, controls)
        to_bytes, dummy_space = _decoding(spec["decoder"])

        spelling = {text: _RESERVED + chr(0xE000 + n) for n, text in enumerate(controls)}
        self._template = template.respelled(spelling) if template else None
        _respell(spec, spelling)
        self._tokenizer = _respelled_tokenizer(spec, controls, spelling)

        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(vocabulary.values()) + 1)
        for piece, token_id in vocabulary.items():
            if not piece.startswith(_RESERVED):
                pieces[token_id] = to_bytes(piece)
        ends = set(eos_ids(folder, len(pieces)))
        if "eos_token" in named:
            ends.add(controls[named["eos_token"]])
        if not ends:
            logger.warning(
                "the tokenizer in %s has no eos_token, and no eos_token_id ends an answer: answers "
                "go on to their limit; name one in tokenizer_config.json",
                folder,
            )
        super().__init__(pieces, ends, dummy_space=dummy_space)
        form = template_form(self._template, self, self._written_ids) if self._template else None
        self._template_has_tools = form is not None
        self.tool_form = form or PROMPT_FORM
        self._refuses_system = form is None and template is not None and _refuses_system(template)
        self._required = 1 + max(self._writable(named, controls, spelling), default=-1)

    def encode(self, text: str, *, with_special: bool = True) -> list[int]:
        """Return the ids of a text, with those that `tokenizer.json` puts around it, such as bos.

        Without `with_special` they are those of the text alone.

        Raises ChatError for text that is not Unicode.
        """
        check_text(text, "the text")
        return self._ids(text.replace(_RESERVED, "\ufffd"), add_special_tokens=with_special)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        continue_last: bool = False,
        asks: bool = True,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """Return the ids of the chat as the template writes it, with its generation prompt.

        With `continue_last` they end with the last message's text instead; without `asks` the
        generation prompt is left out.

        Raises ChatError if the template refuses the chat, or if there is no template.
        """
        chat = checked(messages, continue_last=continue_last)
        return self._rendered(chat, tools, continue_last=continue_last, asks=asks)

    def closed_chat(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> list[int]:
        """Return the ids of the chat as the template writes it, without its generation prompt.

        Raises ChatError as `chat` does, and if the last message is not an assistant's.
        """
        return self._rendered(checked(messages, closes_last=True), tools, asks=False)

    def _rendered(
        self,
        chat: list[Message],
        tools: Sequence[Tool],
        *,
        continue_last: bool = False,
        asks: bool = True,
    ) -> list[int]:
        if self._template is None:
            raise ChatError(
                "this model has no chat template: send a plain prompt, or put a "
                "chat_template.jinja beside its tokenizer.json"
            )
        functions = []
        if self._template_has_tools:
            functions = checked_tools(tools)
            for message in chat:
                for call in message.get("tool_calls", ()):
                    call["arguments"] = _without_escapes(call["arguments"])
        else:
            chat = prompted(chat, tools, in_user=self._refuses_system)
        text = self._template.render(
            _without_reserved(chat),
            continue_last=continue_last,
            asks=asks,
            tools=_without_reserved(functions),
        )
        return self._written_ids(text)

    @property
    def required_vocab_size(self) -> int:
        """Number of ids that a model must have; a token for padding alone is not among them."""
        return self._required

    def _writable(
        self, named: Mapping[str, str], controls: Mapping[str, int], spelling: Mapping[str, str]
    ) -> set[int]:
        """Return the ids that text, the template, bos or an end of answers may put before a model.

        Trainers add tokens for padding beyond the model's vocabulary, which nothing writes.
        """
        ids = {i for i in range(self.vocab_size) if self.token_bytes(i)} | self.eos_ids
        ids.update(self._ids("", add_special_tokens=True))
        template = self._template.source if self._template else ""
        for name, text in named.items():
            if text in controls and (name in template or name == "bos_token"):
                ids.add(controls[text])
        ids.update(controls[text] for text, respelled in spelling.items() if respelled in template)
        return ids

    def _written_ids(self, text: str) -> list[int]:
        """Return the ids of what the template has written."""
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # `encode` holds the interpreter's lock while it works; the call for a batch releases it.
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return encoding.ids


def _refuses_system(template: ChatTemplate) -> bool:
    chat: list[Message] = [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]
    try:
        template.render(chat)
    except ChatError:
        return True
    return False


def _without_escapes(text: str) -> str:
    """Return JSON text whose characters stand as they are, so that none hides in an escape."""
    value = parsed_json(text)
    return text if value is text else json.dumps(value, ensure_ascii=False)


def _without_reserved(value: Any) -> Any:
    """Return a value of JSON without the character that spells control tokens."""
    if isinstance(value, str):
        return value.replace(_RESERVED, "\ufffd")
    if isinstance(value, list):
        return [_without_reserved(item) for item in value]
    if isinstance(value, dict):
        return {_without_reserved(name): _without_reserved(item) for name, item in value.items()}
    return value


def _read_spec(path: Path) -> dict[str, Any]:
    """Return a `tokenizer.json` as the library `tokenizers` writes it anew.

    Files of older releases lack fields (`model.type` before 0.9); the library fills them in.
    Raises TokenizerError for what it cannot read, and for pieces that share an id.
    """
    stored = read_text(path)
    try:
        text = tokenizers.Tokenizer.from_str(stored).to_str()
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(
            f"{path} cannot be read by tokenizers {tokenizers.__version__}: {error}. Fetch the "
            "file again, or update that library if the file is newer"
        ) from error
    _refuse_shared_ids(path, stored)
    spec: dict[str, Any] = json.loads(text)
    return spec


def _refuse_shared_ids(path: Path, text: str) -> None:
    """Raise TokenizerError where two pieces have one id: the library keeps either, by chance."""
    vocab = json.loads(text)["model"]["vocab"]
    if not isinstance(vocab, dict) or len(set(vocab.values())) == len(vocab):
        return
    piece_of: dict[int, str] = {}
    for piece, token_id in vocab.items():
        if (other := piece_of.setdefault(token_id, piece)) != piece:
            raise TokenizerError(
                f"{path} gives both {other!r} and {piece!r} the id {token_id}: give every piece an "
                "id of its own"
            )


def _respell(spec: dict[str, Any], spelling: Mapping[str, str]) -> None:
    """Spell some tokens of a `tokenizer.json` otherwise, at the ids they have."""
    for token in spec["added_tokens"]:
        token["content"] = spelling.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spelling.get(p, p): token_id for p, token_id in model["vocab"].items()}
    else:  # Unigram: pieces with their scores, in the order of their ids
        model["vocab"] = [[spelling.get(p, p), score] for p, score in model["vocab"]]
    if "merges" in model:
        # Some converters list merges that build a control token out of plain text: those must go.
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [p for p in pairs if spelling.keys().isdisjoint([*p, "".join(p)])]
    if model["type"] == "BPE":
        # Characters without a token are dropped. Published software puts the unknown token there,
        # which in many vocabularies is the end of the text as well: outside text must not reach it.
        model["unk_token"] = None
    # A maximum length or a padding saved with the file is no part of what text means.
    spec["truncation"] = spec["padding"] = None


def _decoding(decoder: Mapping[str, Any] | None) -> tuple[Callable[[str], bytes], bool]:
    """Return the reader of a piece's bytes, and whether encoding puts a space before a text."""
    steps = [step["type"] for step in (decoder or {}).get("decoders", [decoder or {"type": None}])]
    if "ByteLevel" in steps:
        return byte_level_bytes, False
    if "ByteFallback" in steps:
        return spm_bytes, "Strip" in steps
    raise TokenizerError(
        f"tokenizer.json decodes by {steps}; supported are ByteLevel, and the steps of a "
        "sentencepiece model with ByteFallback"
    )


def _refuse_unknown_names(named: Mapping[str, str], controls: Mapping[str, int]) -> None:
    """Raise TokenizerError unless eos_token and bos_token, if named, are added tokens."""
    for name in ("eos_token", "bos_token"):
        if name in named and named[name] not in controls:
            raise TokenizerError(
                f"{name} is {named[name]!r} in tokenizer_config.json or special_tokens_map.json, "
                "which is no added token of tokenizer.json: add it there, or correct the name"
            )


def _respelled_tokenizer(
    spec: Mapping[str, Any], controls: Mapping[str, int], spelling: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """Return the tokenizer of a respelled `tokenizer.json`.

    Raises TokenizerError where a control token does not keep its id.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(
            f"tokenizer.json cannot be followed without merges into control tokens: {error}"
        ) from error
    for text, respelled in spelling.items():
        if (token_id := tokenizer.token_to_id(respelled)) != controls[text]:
            raise TokenizerError(
                f"tokenizer.json gives {text!r} the id {controls[text]} among its added tokens and "
                f"{token_id} in its vocabulary: correct one of them"
            )
    return tokenizer
