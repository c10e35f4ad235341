"""Text of an answer: the tokens of each choice become text, as far as it is certain, in chunks.

A chunk has what a token adds, or several tokens where pace.py lets them go out together. What the
chunks of a choice say, put together, does not depend on how many they are.

Calls of tools go out whole, each in the chunk of the token that ended it; their text is in no
chunk. An answer that is held to a form is whole where the form ends it. Cut by a stop text or a
stop id it is not, and its reason is `length`, as at the end of its tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mixtral_jax.structure.tool_reader import ToolReader
from mixtral_jax.tokenization.detokenizer import Detokenizer
from mixtral_jax.tokenization.messages import ToolCall
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.proto import inference_pb2 as pb
from serving.scheduling.request import Drawn, Event, FinishReason, Request
from serving.service.answer.form import AnswerForm
from serving.service.answer.pace import EVERY_TOKEN, Pace
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
        pace: Says which tokens go out together.

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
        pace: Pace = EVERY_TOKEN,
    ) -> None:
        self._request, self._tokenizer, self._pace = request, tokenizer, pace
        self.needs_check = form is not None and bool(form.violation or form.call_violation)
        self._choices = [
            Choice(index, tokenizer, stop, continues=continues, form=form)
            for index in range(request.n)
        ]
        self._usage = pb.Usage(prompt_tokens=len(request.prompt_ids))
        self._has_begun = False  # a chunk has had a token
        self._num_going_on = request.n
        self._held: dict[int, Choice] = {}  # those that have something to send

    @property
    def has_ended(self) -> bool:
        """True when every choice has ended."""
        return not self._num_going_on

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

    def progress(self, event: Event) -> pb.GenerateChunk | None:
        """Returns the chunk of an event that has neither a token nor an end, or None."""
        self._usage.cached_tokens = max(self._usage.cached_tokens, event.cached)
        if event.prompt_logprobs:
            return None  # `scores` tells as much
        return pb.GenerateChunk(
            choice=event.choice,
            computed_tokens=event.computed,
            cached_tokens=self._usage.cached_tokens,
        )

    def push(self, event: Event, now: float = 0.0) -> None:
        """Takes in a token or an end, which came at this time of time.monotonic().

        Push no event of a choice that has ended.
        """
        if event.cached > self._usage.cached_tokens:
            self._usage.cached_tokens = event.cached
        if (drawn := event.drawn) is not None:
            self._usage.completion_tokens += 1
            if drawn.accepted:
                self._usage.accepted_guesses += 1
            if drawn.rejected:
                self._usage.rejected_guesses += drawn.rejected
        choice = self._choices[event.choice]
        choice.push(event, now)
        if choice.has_ended:
            self._num_going_on -= 1
        if choice.has_news:
            self._held[event.choice] = choice

    def chunks(self, next_came: float | None = None) -> Iterator[pb.GenerateChunk]:
        """Yields the chunks that are to be sent now.

        The last chunk of the last choice carries the usage.

        Args:
            next_came: Time at which the next event came, if it is there already, so that nothing
                is late if it waits for that.
        """
        for index, choice in [*self._held.items()]:
            if choice.has_ended or self._pace.sends(choice, next_came):
                yield self._taken(index)

    def rest(self) -> Iterator[pb.GenerateChunk]:
        """Yields the chunks that were held back, where no more events come."""
        for index in [*self._held]:
            yield self._taken(index)

    def _taken(self, index: int) -> pb.GenerateChunk:
        choice = self._held.pop(index)
        has_tokens = choice.num_tokens > 0
        chunk = choice.take()
        if has_tokens and not self._has_begun:
            self._has_begun = True
            chunk.cached_tokens = self._usage.cached_tokens
        if choice.has_ended and self.has_ended and not self._held:
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
        self._index, self._form = index, form
        # The next chunk consists of these.
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._scores: list[pb.TokenLogprob] = []
        self._new_calls: list[ToolCall] = []
        self._end: dict[str, Any] = {}  # fields of its last chunk
        self.num_chunks = 0
        self.since = 0.0  # time at which its first text or call came
        self._texts: list[str] = []  # of the whole choice, if it is to be checked
        self._calls: list[ToolCall] = []

    @property
    def has_ended(self) -> bool:
        """True after the event, or the stop text, that ended it."""
        return self.reason is not None

    @property
    def num_tokens(self) -> int:
        """Number of tokens since its last chunk, those whose text is not certain among them."""
        return len(self._ids)

    @property
    def has_calls(self) -> bool:
        """True if calls are whole since its last chunk; later text is behind them."""
        return bool(self._new_calls)

    @property
    def has_news(self) -> bool:
        """True if the next chunk has text, calls or the end; else its tokens wait."""
        return bool(self._pieces or self._new_calls or self.reason is not None)

    def push(self, event: Event, now: float = 0.0) -> None:
        """Takes in a token or an end. Sets `reason`.

        A stop text ends a choice while the engine still computes it: push no later event of it.
        """
        assert self.reason is None
        drawn = event.drawn
        if drawn is None:
            assert event.finish_reason is not None, "only an end has no token"
            self.reason = event.finish_reason
            self._end = {"finish_reason": _FINISH[event.finish_reason]}
            return
        if not self.has_news:
            self.since = now
        self._ids.append(drawn.token_id)
        if drawn.logprob is not None:
            self._note(drawn, drawn.logprob)
        new, calls = self._reader.push(drawn.token_id)
        text = self._stops.push(new)
        if event.finish_reason is not None or calls or self._stops.stopped:
            text = self._turn(event, drawn, text, calls)
        if text:
            self._pieces.append(text)
            if self._form is not None and self._form.violation is not None:
                self._texts.append(text)

    def _turn(self, event: Event, drawn: Drawn, text: str, calls: Sequence[ToolCall]) -> str:
        """Takes in what comes with an end or with calls; returns the text before it."""
        reason = event.finish_reason
        self._new_calls += calls
        self._calls += calls
        if reason is not None:
            reason = self._reason(reason, drawn.token_id)
            new, more = self._reader.finish()
            self._new_calls += more
            self._calls += more
            # Where calls are required, the rest is the beginning of one that was cut.
            text += self._stops.push("" if self._must_call else new) + self._stops.finish()
        elif calls:
            text += self._stops.finish()  # no stop text goes on behind a call
        if self._stops.stopped:
            reason = FinishReason.LENGTH if self._holds_text else FinishReason.STOP
        if reason is None:
            return text
        self.reason = reason
        self._end["finish_reason"] = _FINISH[reason]
        if reason is FinishReason.STOP and self._calls:
            self._end["finish_reason"] = pb.FINISH_REASON_TOOL_CALLS
        if self._stops.found is not None:
            self._end["stop_text"] = self._stops.found
        elif event.finish_reason is FinishReason.STOP and drawn.token_id in self._stop_ids:
            self._end["stop_token_id"] = drawn.token_id
        return text

    def take(self) -> pb.GenerateChunk:
        """Returns the chunk of all that came since the last one."""
        chunk = pb.GenerateChunk(
            choice=self._index, text="".join(self._pieces), token_ids=self._ids, **self._end
        )
        if self._scores:
            chunk.logprobs.extend(self._scores)
            self._scores = []
        for call in self._new_calls:
            chunk.tool_calls.add(**call)
        if self._new_calls:
            self._new_calls = []
        self._ids, self._pieces = [], []
        self.num_chunks += 1
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

    def _note(self, drawn: Drawn, logprob: float) -> None:
        score = self._logprob(drawn.token_id, logprob)
        score.top.extend(self._logprob(*pair) for pair in drawn.top_logprobs)
        self._scores.append(score)

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
