"""Pairs: rows of which one answer is preferred to another, for the objective "preference".

A line is a JSON object in one of these forms, those of TRL and that of OpenAI:

    {"prompt": "...", "chosen": "...", "rejected": "..."}         text
    {"prompt": [...], "chosen": [...], "rejected": [...]}         messages, with "tools" or without
    {"chosen": [...], "rejected": [...]}                          messages, of which the first ones
                                                                  are the same: these are the prompt
    {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}

https://huggingface.co/docs/trl/dataset_formats#preference
https://platform.openai.com/docs/guides/direct-preference-optimization
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from mixtral_jax.tokenization.messages import Message
from mixtral_jax.training.rows import (
    MESSAGES,
    PROMPT,
    TOOLS,
    UNREAD,
    Chat,
    Completion,
    DataError,
    kind_of,
    listed,
    read_chat,
    read_messages,
    read_text,
)

CHOSEN, REJECTED = "chosen", "rejected"
INPUT, PREFERRED, OTHER = "input", "preferred_output", "non_preferred_output"
_FORMS = (
    'give "prompt", "chosen" and "rejected", or "input", "preferred_output" and '
    '"non_preferred_output"'
)


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred answer, and the same prompt with another one."""

    chosen: Chat | Completion
    rejected: Chat | Completion


def read_pair(row: Mapping[str, object], ignored_keys: Collection[str]) -> Pair:
    """Returns the pair of a line's object. Raises DataError.

    Args:
        row: the object.
        ignored_keys: keys that may be there and mean nothing.
    """
    keys = {key for key, value in row.items() if value is not None} - set(ignored_keys)
    if keys >= {INPUT, PREFERRED, OTHER}:
        _check_keys(keys, {INPUT, PREFERRED, OTHER}, "")
        source = row[INPUT]
        if not isinstance(source, dict):
            raise DataError(f"has an input that is {kind_of(source)}: give an object with messages")
        given = {key: value for key, value in source.items() if value is not None}
        _check_keys(given.keys(), {MESSAGES, TOOLS, *UNREAD}, " in input")
        names = (f"{INPUT}.{MESSAGES}", PREFERRED, OTHER)
        return _chats(given.get(MESSAGES), row[PREFERRED], row[OTHER], given, names)
    if not keys >= {CHOSEN, REJECTED}:
        raise DataError(f"has the keys {listed(keys)}, which are no pair of answers: {_FORMS}")
    _check_keys(keys, {PROMPT, CHOSEN, REJECTED, TOOLS, *UNREAD}, "")
    chosen, rejected = row[CHOSEN], row[REJECTED]
    if PROMPT not in keys:
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise DataError("has answers without a prompt: give the prompt beside them")
        return _chats_of_one_beginning(chosen, rejected, row)
    fields = (row[PROMPT], chosen, rejected)
    if not any(isinstance(field, str) for field in fields):
        return _chats(*fields, row, (PROMPT, CHOSEN, REJECTED))
    prompt = row[PROMPT]
    if not isinstance(prompt, str) or not all(isinstance(field, str) for field in fields):
        raise DataError(
            "has a prompt, chosen and rejected of which only some are text: give all as text or "
            "all as messages; a prompt that the messages repeat is named in ignored_keys"
        )
    if row.get(TOOLS):
        raise DataError("has tools beside text: give prompt, chosen and rejected as messages")
    return Pair(
        Completion(prompt, read_text(chosen, CHOSEN)),
        Completion(prompt, read_text(rejected, REJECTED)),
    )


def _check_keys(keys: Collection[str], known: Collection[str], where: str) -> None:
    if unknown := set(keys) - set(known):
        raise DataError(
            f"has the unknown key {listed(unknown)}{where}: take it out, or name it in ignored_keys"
        )


def _chats(
    prompt: object,
    chosen: object,
    rejected: object,
    row: Mapping[str, object],
    names: tuple[str, str, str],
) -> Pair:
    """Returns the pair of a prompt and two answers, all of them lists of messages."""
    before, _ = read_messages(prompt, names[0], is_prompt=True)

    def chat(answer: object, name: str) -> Chat:
        after, is_learnt = read_messages(answer, name, is_prompt=False)
        return read_chat([*before, *after], [*[False] * len(before), *is_learnt], row)

    return Pair(chat(chosen, names[1]), chat(rejected, names[2]))


def _chats_of_one_beginning(chosen: object, rejected: object, row: Mapping[str, object]) -> Pair:
    """Returns the pair of two chats; the messages that both begin with are their prompt."""
    preferred = read_messages(chosen, CHOSEN, is_prompt=False)
    other = read_messages(rejected, REJECTED, is_prompt=False)
    shared = _shared(preferred[0], other[0])
    if not shared:
        raise DataError("has chosen and rejected that begin otherwise: both begin with the prompt")

    def chat(messages: list[Message], is_learnt: list[bool]) -> Chat:
        return read_chat(messages, [False] * shared + is_learnt[shared:], row)

    return Pair(chat(*preferred), chat(*other))


def _shared(first: Sequence[Message], other: Sequence[Message]) -> int:
    neighbours = zip(first, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], neighbours))
