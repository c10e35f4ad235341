"""Text of an answer: the tokens of each choice become text, as far as it is certain, in chunks.

Calls of tools go out whole, each in the chunk of the token that ended it; their text is in no
chunk. An answer that is held to a form is whole where the form ends it. Cut by a stop text or a
stop id it is not, and its reason is `length`, as at the end of its tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from mixtral_jax.structure.tool_reader import ToolReader
from mixtral_jax.tokenization.detokenizer import Detokenizer
from mixtral_jax.tokenization.messages import ToolCall
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.proto import inference_pb2 as pb
from serving.scheduling.request import Drawn, Event, FinishReason, Request
from serving.service.answer.form import AnswerForm
from serving.service.answer.prompt_scores import prompt_pieces, score_chunks
from serving.service.answer.stop_texts import StopTexts

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True)
class Stops:
    """The caller's own ends of a choice.

    Attributes:
        texts: A choice ends before, or where they are `included` behind, the first of them.
        ids: A choice ends after one of them; without those that are the model's own end anyway.
        included: Whether the text that ends a choice is the end of its text.
    """

    texts: tuple[str, ...] = ()
    ids: frozenset[int] = frozenset()
    included: bool = False

    @classmethod
    def of(cls, message: pb.GenerateRequest, tokenizer: Tokenizer) -> "Stops":
        """Returns what a request names."""
        own = frozenset() if message.ignore_eos else tokenizer.eos_ids
        ids = frozenset(message.stop_token_ids) - own
        return cls(tuple(message.stop), ids, message.include_stop)


class AnswerText:
    """Turns the events of one request into the chunks of its stream.

    Args:
        request: The request.
        tokenizer: That of the model.
        stop: The texts and ids of the caller that end a choice.
        continues: Whether the answer continues the prompt's text.
        form: The form that the answer is held to; None where there is none.

    Attributes:
        needs_check: Whether a part of the form is not enforced.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        stop: Stops,
        *,
        continues: bool,
        form: AnswerForm | None = None,
    ) -> None:
        self._request, self._tokenizer = request, tokenizer
        self.needs_check = form is not None and bool(form.violation or form.call_violation)
        self._choices = [
            Choice(index, tokenizer, stop, continues=continues, form=form)
            for index in range(request.n)
        ]
        self._usage = pb.Usage(prompt_tokens=len(request.prompt_ids))
        self._has_begun = False  # a chunk has had a token

    @property
    def has_ended(self) -> bool:
        """True when every choice has ended."""
        return all(choice.has_ended for choice in self._choices)

    def reason(self, index: int) -> FinishReason | None:
        """Returns why a choice has ended; None while it goes on."""
        return self._choices[index].reason

    def violation(self, index: int) -> str | None:
        """Returns how a choice that has ended misses a part of its form that is not enforced.

        It takes time: call it in a thread. None where it was cut, or nothing is wrong.
        """
        return self._choices[index].violation()

    def opening(self, *, has_pieces: bool = False, has_ids: bool = False) -> pb.GenerateChunk:
        """Returns the first chunk of the stream: the size of the prompt, and who answers.

        With `has_pieces` also what each token of the prompt adds to its text, and with `has_ids`
        the ids of these tokens.
        """
        chunk = pb.GenerateChunk(
            prompt_tokens=self._usage.prompt_tokens, adapter=self._request.adapter
        )
        if has_ids:
            chunk.prompt_ids.extend(self._request.prompt_ids)
        if has_pieces:
            chunk.prompt_pieces.extend(prompt_pieces(self._request.prompt_ids, self._tokenizer))
        return chunk

    def scores(self, event: Event) -> Iterator[pb.GenerateChunk]:
        """Yields the chunks of the prompt's logprobs that an event has: first of what it adds."""
        cached = max(self._usage.cached_tokens, event.cached)
        for scores in score_chunks(event.prompt_logprobs, self._tokenizer):
            yield pb.GenerateChunk(
                choice=event.choice,
                computed_tokens=event.computed,
                cached_tokens=cached,
                prompt_logprobs=scores,
            )

    def push(self, event: Event) -> pb.GenerateChunk | None:
        """Returns the chunk that an event adds, or None. Push no event of a choice that has ended.

        The last chunk of the last choice carries the usage.
        """
        self._usage.cached_tokens = max(self._usage.cached_tokens, event.cached)
        if event.drawn is None and event.finish_reason is None:
            if event.prompt_logprobs:
                return None  # `scores` tells as much
            return pb.GenerateChunk(
                choice=event.choice,
                computed_tokens=event.computed,
                cached_tokens=self._usage.cached_tokens,
            )
        if event.drawn is not None:
            self._usage.completion_tokens += 1
        chunk = self._choices[event.choice].push(event)
        if chunk is None:
            return None
        if event.drawn is not None and not self._has_begun:
            self._has_begun, chunk.cached_tokens = True, self._usage.cached_tokens
        if self.has_ended:
            chunk.usage.CopyFrom(self._usage)
        return chunk


class Choice:
    """Turns the events of one choice into chunks. Tokens wait until their text is certain."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        stop: Stops,
        *,
        continues: bool,
        form: AnswerForm | None = None,
    ) -> None:
        self.reason: FinishReason | None = None  # why it ended
        self._tokenizer = tokenizer
        self._reader: _Reader = (
            ToolReader(
                tokenizer,
                continues=continues,
                text_may_precede=not (form.holds_text or form.must_call),
            )
            if form is not None and form.may_call
            else _TextReader(tokenizer.detokenizer(continues=continues))
        )
        self._stops = StopTexts(stop.texts, included=stop.included)
        self._stop_ids = stop.ids
        self._chunk = pb.GenerateChunk(choice=index)
        self._form = form
        self._texts: list[str] = []  # of the whole choice, if it is to be checked
        self._calls: list[ToolCall] = []

    @property
    def has_ended(self) -> bool:
        """True after the event, or the stop text, that ended it."""
        return self.reason is not None

    def push(self, event: Event) -> pb.GenerateChunk | None:
        """Returns the chunk that a token adds to the stream, or None. Sets `reason`.

        A stop text ends a choice while the engine still computes it: push no later event of it.
        """
        assert not self.has_ended
        if event.drawn is None:
            assert event.finish_reason is not None, "only an end has no token"
            self.reason, self._chunk.finish_reason = (
                event.finish_reason,
                _FINISH[event.finish_reason],
            )
            return self._chunk
        self._note(event.drawn)
        new, calls = self._reader.push(event.drawn.token_id)
        self._calls += calls
        text = self._stops.push(new)
        reason = event.finish_reason
        if reason is not None:
            reason = self._reason(reason, event.drawn.token_id)
            new, more = self._reader.finish()
            calls = [*calls, *more]
            self._calls += more
            # Where calls are required, the rest is the beginning of one that was cut.
            text += self._stops.push("" if self._must_call else new) + self._stops.finish()
        elif calls:
            text += self._stops.finish()  # no stop text goes on behind a call
        if self._stops.stopped:
            reason = FinishReason.LENGTH if self._holds_text else FinishReason.STOP
        if self._form is not None and self._form.violation is not None:
            self._texts.append(text)
        for call in calls:
            self._chunk.tool_calls.add(**call)
        if self._stops.found is not None:
            self._chunk.stop_text = self._stops.found
        elif event.finish_reason is FinishReason.STOP and event.drawn.token_id in self._stop_ids:
            self._chunk.stop_token_id = event.drawn.token_id
        if reason is not None:
            self.reason = reason
            self._chunk.finish_reason = _FINISH[reason]
            if reason is FinishReason.STOP and self._calls:
                self._chunk.finish_reason = pb.FINISH_REASON_TOOL_CALLS
        elif not (text or calls):
            return None
        chunk, self._chunk = self._chunk, pb.GenerateChunk(choice=self._chunk.choice)
        chunk.text = text
        return chunk

    @property
    def _holds_text(self) -> bool:
        return self._form is not None and self._form.holds_text

    @property
    def _must_call(self) -> bool:
        return self._form is not None and self._form.must_call

    def _reason(self, reason: FinishReason, last: int) -> FinishReason:
        """Returns why a choice ended that ended with the id `last`: LENGTH for what is cut.

        An id of the caller's cuts whatever is held to a form.
        """
        if reason is not FinishReason.STOP or last in self._tokenizer.eos_ids:
            return reason
        has_begun = self._reader.is_inside_call or (self._must_call and not self._calls)
        is_held = self._holds_text or has_begun
        return FinishReason.LENGTH if is_held else reason

    def violation(self) -> str | None:
        """Returns how the choice misses a part of its form, as `AnswerText.violation` does."""
        form = self._form
        if self.reason is not FinishReason.STOP or form is None:
            return None
        if self._calls:
            check = form.call_violation
            wrong = [] if check is None else [check(call) for call in self._calls]
            return next((text for text in wrong if text is not None), None)
        return None if form.violation is None else form.violation("".join(self._texts))

    def _note(self, drawn: Drawn) -> None:
        self._chunk.token_ids.append(drawn.token_id)
        if drawn.logprob is not None:
            logprob = self._logprob(drawn.token_id, drawn.logprob)
            logprob.top.extend(self._logprob(*pair) for pair in drawn.top_logprobs)
            self._chunk.logprobs.append(logprob)

    def _logprob(self, token_id: int, logprob: float) -> pb.TokenLogprob:
        token = self._tokenizer.token_bytes(token_id)
        return pb.TokenLogprob(token_id=token_id, token=token, logprob=logprob)


class _Reader(Protocol):
    """Reader of an answer's text and calls, token by token, as ToolReader is."""

    @property
    def is_inside_call(self) -> bool:
        """True if an answer that ended here would lose a call that it has begun."""

    def push(self, token_id: int) -> tuple[str, list[ToolCall]]:
        """Returns the text that is certain and the calls that are whole now."""

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Returns the rest when no more tokens come."""


class _TextReader:
    """Reader of an answer without calls."""

    is_inside_call = False

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer

    def push(self, token_id: int) -> tuple[str, list[ToolCall]]:
        """Returns the text that is certain."""
        return self._detokenizer.push(token_id), []

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Returns the rest of the text."""
        return self._detokenizer.finish(), []
