"""Text of one choice: its tokens become text, as far as it is certain, in chunks of a stream."""

from collections.abc import Sequence

from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.proto import inference_pb2 as pb
from serving.scheduling.request import Drawn, Event, FinishReason
from serving.service.stop_texts import StopTexts

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class Choice:
    """Turns the events of one choice into chunks. Tokens wait until their text is certain."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, stop: Sequence[str], *, continues: bool
    ) -> None:
        self.has_ended = False
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(continues=continues)
        self._stops = StopTexts(stop)
        self._chunk = pb.GenerateChunk(choice=index)

    def push(self, event: Event) -> pb.GenerateChunk | None:
        """Returns the chunk that the event adds to the stream, or None. Sets `has_ended`.

        A stop text ends a choice while the engine still computes it: push no later event of it.
        """
        assert not self.has_ended and event.drawn is not None
        self._note(event.drawn)
        text = self._stops.push(self._detokenizer.push(event.drawn.token_id))
        reason = event.finish_reason
        if reason is not None:
            text += self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        if self._stops.stopped:
            reason = FinishReason.STOP
        if reason is not None:
            self.has_ended = True
            self._chunk.finish_reason = _FINISH[reason]
        elif not text:
            return None
        chunk, self._chunk = self._chunk, pb.GenerateChunk(choice=self._chunk.choice)
        chunk.text = text
        return chunk

    def _note(self, drawn: Drawn) -> None:
        self._chunk.token_ids.append(drawn.token_id)
        if drawn.logprob is not None:
            logprob = self._logprob(drawn.token_id, drawn.logprob)
            logprob.top.extend(self._logprob(*pair) for pair in drawn.top_logprobs)
            self._chunk.logprobs.append(logprob)

    def _logprob(self, token_id: int, logprob: float) -> pb.TokenLogprob:
        token = self._tokenizer.token_bytes(token_id)
        return pb.TokenLogprob(token_id=token_id, token=token, logprob=logprob)
