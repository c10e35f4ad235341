"""Rendering: a row of a data set becomes the token ids that the server would read and write.

There is no second renderer. The ids before an answer are `Tokenizer.chat` of the messages before
it, which is what the served endpoint computes when it is asked for that answer; the answer's ids
are what `Tokenizer.closed_chat` adds to them, up to the id that ends the answer.

The answers of a chat share an example as long as the ids up to an answer's end begin those of the
next question. Some formats move the system message or the tools to the last user's message (v2 and
v3 of Mistral's), or leave something out of the history: there a later answer is asked for with
other ids than an earlier one, and gets an example of its own.
"""

from collections.abc import Sequence

import numpy as np

from mixtral_jax.tokenization.messages import Message
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.training.example import Example
from mixtral_jax.training.pairs import CHOSEN, REJECTED, Pair
from mixtral_jax.training.rows import Chat, Completion, DataError


def examples_of_pair(pair: Pair, tokenizer: Tokenizer) -> list[Example]:
    """Returns the example of the preferred answer, and that of the other one.

    Raises ChatError and DataError as `examples_of`, and DataError for answers that are the same.
    """
    made: list[Example] = []
    for name, content in ((CHOSEN, pair.chosen), (REJECTED, pair.rejected)):
        examples = examples_of(content, tokenizer)
        if len(examples) > 1:
            raise DataError(
                f"has several answers in {name}, which this model's format asks for with other ids "
                "than it keeps them: give one answer of each kind"
            )
        made += examples
    if np.array_equal(made[0].ids, made[1].ids):
        raise DataError("has the same answer twice, so that there is nothing to prefer")
    return made


def examples_of(content: Chat | Completion, tokenizer: Tokenizer) -> list[Example]:
    """Returns the examples of a row, in the order of their answers; at least one.

    Raises ChatError for what the tokenizer refuses, and DataError for an answer that this model's
    format cannot write as it stands.
    """
    match content:
        case Chat():
            return _chat_examples(content, tokenizer)
        case Completion():
            return [_text_example(content, tokenizer)]


class _Growing:
    """The example of the answers so far, which share their ids."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._spans: list[tuple[int, int]] = []

    def takes(self, prompt: Sequence[int]) -> bool:
        """Returns whether the ids so far begin a prompt."""
        return list(prompt[: len(self._ids)]) == self._ids

    def add(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Adds an answer; its prompt begins with the ids so far."""
        self._ids = [*prompt, *answer]
        self._spans.append((len(prompt), len(self._ids)))

    def example(self) -> Example:
        """Returns the example, in which the ids of the answers count."""
        weights = np.zeros(len(self._ids), np.float32)
        for start, stop in self._spans:
            weights[start:stop] = 1
        return Example(np.array(self._ids, np.int32), weights)


def _chat_examples(chat: Chat, tokenizer: Tokenizer) -> list[Example]:
    messages, is_learnt = chat.messages, chat.is_learnt
    if tokenizer.tool_form.at_most_one:
        messages, is_learnt = _with_single_calls(messages, is_learnt)
    made: list[Example] = []
    growing = _Growing()
    for place, message in enumerate(messages):
        if not is_learnt[place]:
            continue
        prompt = tokenizer.chat(messages[:place], tools=chat.tools) if place else []
        if not prompt:
            raise DataError(f"answers nothing with message {place}, which the model cannot")
        closed = tokenizer.closed_chat(messages[: place + 1], tools=chat.tools)
        answer = _answer(prompt, closed, tokenizer, f"message {place}")
        _check_text(message, answer, tokenizer, f"message {place}")
        if not growing.takes(prompt):
            made.append(growing.example())
            growing = _Growing()
        growing.add(prompt, answer)
    return [*made, growing.example()]


def _answer(
    prompt: Sequence[int], closed: Sequence[int], tokenizer: Tokenizer, name: str
) -> list[int]:
    """Returns the ids between a prompt and the end of its answer, that end's id included."""
    if list(closed[: len(prompt)]) != list(prompt):
        raise DataError(
            f"cannot be learnt exactly: with the answer of {name} this model's format writes other "
            "ids before it than the server does when it asks for it. An answer that begins with "
            "white space may be the cause, or a template that begins answers otherwise than it "
            "keeps them"
        )
    for place in range(len(prompt), len(closed)):
        if closed[place] in tokenizer.eos_ids:
            return list(closed[len(prompt) : place + 1])
    raise DataError(
        f"has no end of the answer of {name}: this model's format writes none of the ids "
        f"{sorted(tokenizer.eos_ids)} behind it, so the model would never learn to end"
    )


def _check_text(message: Message, answer: Sequence[int], tokenizer: Tokenizer, name: str) -> None:
    """Raises DataError unless the ids of an answer hold its text, but for outer white space."""
    text, written = message["content"].strip(), tokenizer.decode(answer).strip()
    calls = message.get("tool_calls")
    if calls and text not in written:
        raise DataError(
            f"has text beside calls in {name}, which this model's format leaves out: take the text "
            "out, or put it in a message of its own"
        )
    if not calls and text != written:
        raise DataError(
            f"has text in {name} that this model's format changes: {text[:60]!r} becomes "
            f"{written[:60]!r}"
        )


def _with_single_calls(
    messages: Sequence[Message], is_learnt: Sequence[bool]
) -> tuple[list[Message], list[bool]]:
    """Returns a chat whose messages have one call at most, each followed by its result.

    A format in which an answer calls at most once writes several calls of a message so.
    """
    made: list[Message] = []
    learnt: list[bool] = []
    place = 0
    while place < len(messages):
        message, is_trained = messages[place], is_learnt[place]
        place += 1
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            made.append(message)
            learnt.append(is_trained)
            continue
        results = []
        while place < len(messages) and messages[place]["role"] == "tool":
            results.append(messages[place])
            place += 1
        for number, call in enumerate(calls):
            made.append({**message, "tool_calls": [call], "content": message["content"]})
            learnt.append(is_trained)
            result = _result_of(call["id"], results)
            if result is not None:
                made.append(result)
                learnt.append(False)
            elif is_trained and number + 1 < len(calls):
                raise DataError(
                    "has several calls in a message and not a result for each, which this model's "
                    "format cannot write: it calls once an answer"
                )
        made += results
        learnt += [False] * len(results)
    return made, learnt


def _result_of(call_id: str, results: list[Message]) -> Message | None:
    """Takes the result of a call out of a list: of that id, or the first one without any."""
    for result in results:
        if result.get("tool_call_id", "") in ("", call_id):
            results.remove(result)
            return result
    return None


def _text_example(row: Completion, tokenizer: Tokenizer) -> Example:
    """Returns the example of plain text; what is read begins with the ids that begin any prompt."""
    prompt = tokenizer.encode(row.prompt)
    ids = tokenizer.encode(row.prompt + row.completion)
    if ids[: len(prompt)] != prompt:
        raise DataError(
            "has a prompt whose last token would be another one with the completion behind it: let "
            "the prompt end where a word ends, and the completion begin with the space"
        )
    end = ending_id(tokenizer)
    weights = np.zeros(len(ids) + 1, np.float32)
    weights[max(len(prompt), 1) :] = 1  # nothing stands before the first id, to predict it from
    return Example(np.array([*ids, end], np.int32), weights)


def ending_id(tokenizer: Tokenizer) -> int:
    """Returns the id that ends plain text: the only one, or the one that ends answers of chats.

    Raises DataError if there is none.
    """
    ends = tokenizer.eos_ids
    if len(ends) == 1:
        return next(iter(ends))
    if not ends:
        raise DataError(
            "cannot be ended: this tokenizer has no eos_token, so a model would never learn to end"
        )
    chat: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "a"},
    ]
    prompt = tokenizer.chat(chat[:1])
    return _answer(prompt, tokenizer.closed_chat(chat), tokenizer, "message 1")[-1]
