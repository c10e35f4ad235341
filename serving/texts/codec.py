"""Requests, events and errors as messages of serving/proto/texts.proto, and back, equal in all.

There is a function for each kind and direction. Events go in columns: a step of 256 streams takes a
fraction of a millisecond at each end.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from mixtral_jax.errors import SamplingError
from mixtral_jax.structure.form import Form
from serving.cluster.codec import sampling_message, sampling_of
from serving.errors import LEAVES, EngineFailure, Overloaded, ServingError
from serving.proto import texts_pb2 as pb
from serving.scheduling.request import Drawn, Event, FinishReason, Priority, Request, TokenScore

_FORCED = 1
_ACCEPTED = 1 << 3
_REJECTED_SHIFT = 4
_REASONS = (None, FinishReason.STOP, FinishReason.LENGTH)
_BITS = {reason: place << 1 for place, reason in enumerate(_REASONS)}
_MAX_TEXT = 4096  # characters of an error's message


class CodecError(ValueError):
    """A message that none of our processes writes."""


def submit_message(request: Request, number: int) -> pb.Submit:
    """Writes a request.

    Args:
        request: It has no seat yet, which only the engine gives.
        number: By which both ends call it.
    """
    assert request.seat is None, "the engine alone seats requests"
    form = request.form
    assert form is None or isinstance(form, Form)
    return pb.Submit(
        number=number,
        id=request.id,
        prompt_ids=request.prompt_ids,
        sampling=sampling_message(request.sampling),
        max_tokens=request.max_tokens,
        eos_ids=sorted(request.eos_ids),
        min_tokens=request.min_tokens,
        n=request.n,
        deadline=request.deadline,
        caller=request.caller,
        adapter=request.adapter,
        salt=request.salt,
        priority=request.priority,
        suspect=request.suspect,
        prompt_logprobs=request.prompt_logprobs,
        form=None
        if form is None
        else pb.Form(grammar=form.grammar, begins_after=form.begins_after),
        allowed_ids=sorted(request.allowed_ids),
        prediction_ids=request.prediction_ids,
    )


def request_of(message: pb.Submit) -> Request:
    """Reads a request, without its form. Raises CodecError for what no text process sends."""
    try:
        return Request(
            id=message.id,
            prompt_ids=tuple(message.prompt_ids),
            sampling=sampling_of(message.sampling),
            max_tokens=message.max_tokens,
            eos_ids=frozenset(message.eos_ids),
            min_tokens=message.min_tokens,
            n=message.n,
            deadline=message.deadline if message.HasField("deadline") else None,
            caller=message.caller,
            adapter=message.adapter,
            salt=message.salt,
            priority=Priority(message.priority),
            suspect=message.suspect,
            prompt_logprobs=(
                message.prompt_logprobs if message.HasField("prompt_logprobs") else None
            ),
            allowed_ids=frozenset(message.allowed_ids),
            prediction_ids=tuple(message.prediction_ids),
        )
    except (ValueError, SamplingError) as error:
        raise CodecError(f"a request cannot be read: {error}") from None


def events_message(events: Iterable[Event], number_of: Callable[[str], int]) -> pb.Events:
    """Writes events of a turn of the engine, in their order; none of them has an error's reason.

    Args:
        events: Of requests of one text process.
        number_of: Returns the number of a request by its id.
    """
    message = pb.Events()
    numbers, choices, tokens, flags = message.numbers, message.choices, message.tokens, []
    computed, cached, steps, seated = [], [], [], []
    for place, event in enumerate(events):
        drawn = event.drawn
        numbers.append(number_of(event.request_id))
        choices.append(event.choice)
        bits = _BITS[event.finish_reason]
        if drawn is None:
            tokens.append(0)
        else:
            tokens.append(drawn.token_id + 1)
            bits |= drawn.forced and _FORCED
            bits |= drawn.accepted and _ACCEPTED
            bits |= drawn.rejected << _REJECTED_SHIFT
            if drawn.logprob is not None or drawn.top_logprobs:
                ids, values = _columns(drawn.top_logprobs)
                message.logprobs.add(event=place, logprob=drawn.logprob, top_ids=ids, top=values)
        flags.append(bits)
        computed.append(event.computed)
        cached.append(event.cached)
        steps.append(event.steps)
        seated.append(event.seated)
        if event.prompt_logprobs:
            scores = [_score_message(score) for score in event.prompt_logprobs]
            message.scores.add(event=place, scores=scores)
    message.flags.extend(flags)
    message.computed.extend(computed)
    message.cached.extend(cached)
    message.steps.extend(steps)
    message.seated.extend(seated)
    return message


def events_of(message: pb.Events, id_of: Callable[[int], str]) -> Iterator[tuple[int, Event]]:
    """Yields events in their order, each with the number of its request.

    Args:
        message: As `events_message` writes it.
        id_of: Returns the id of a request by its number; "" for one that has been left.

    Raises CodecError where the columns do not agree.
    """
    logprobs = {row.event: row for row in message.logprobs}
    scores = {row.event: row.scores for row in message.scores}
    columns: tuple[Sequence[float], ...] = (
        message.numbers,
        message.choices,
        message.tokens,
        message.flags,
        message.computed,
        message.cached,
        message.steps,
        message.seated,
    )
    if len({len(column) for column in columns}) > 1:
        raise CodecError("the columns of events have different lengths")
    for place, (number, choice, token, bits, computed, cached, steps, seated) in enumerate(
        zip(*(list(column) for column in columns), strict=True)
    ):
        reason = bits >> 1 & 3
        if reason >= len(_REASONS):
            raise CodecError(f"an event has the flags {bits}")
        drawn = None
        if token:
            row = logprobs.get(place)
            if row is None:
                drawn = Drawn(token_id=token - 1)
            else:
                drawn = Drawn(
                    token_id=token - 1,
                    logprob=row.logprob if row.HasField("logprob") else None,
                    top_logprobs=_pairs(row.top_ids, row.top),
                )
            drawn.forced, drawn.accepted = bool(bits & _FORCED), bool(bits & _ACCEPTED)
            drawn.rejected = bits >> _REJECTED_SHIFT
        yield (
            number,
            Event(
                request_id=id_of(number),
                choice=choice,
                drawn=drawn,
                finish_reason=_REASONS[reason],
                computed=computed,
                cached=cached,
                seated=seated,
                steps=steps,
                prompt_logprobs=tuple(map(_score_of, scores[place])) if place in scores else (),
            ),
        )


def error_message(error: ServingError) -> pb.Error:
    """Writes an error that ends a request."""
    seconds = error.retry_after_ms / 1000 if isinstance(error, Overloaded) else None
    return pb.Error(name=type(error).__name__, message=str(error)[:_MAX_TEXT], retry_after=seconds)


def error_of(message: pb.Error) -> ServingError:
    """Reads an error; one of an unknown name is an EngineFailure."""
    kind = LEAVES.get(message.name, EngineFailure)
    if issubclass(kind, Overloaded) and message.HasField("retry_after"):
        return kind(message.message, message.retry_after)
    return kind(message.message)


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [token for token, _ in pairs], [value for _, value in pairs]


def _pairs(ids: Sequence[int], values: Sequence[float]) -> tuple[tuple[int, float], ...]:
    if len(ids) != len(values):
        raise CodecError("logprobs have another number of ids than of values")
    return tuple(zip(ids, values, strict=True))


def _score_message(score: TokenScore) -> pb.Score:
    ids, values = _columns(score.top_logprobs)
    return pb.Score(
        token_id=score.token_id, logprob=score.logprob, rank=score.rank, top_ids=ids, top=values
    )


def _score_of(message: pb.Score) -> TokenScore:
    return TokenScore(
        token_id=message.token_id,
        logprob=message.logprob,
        rank=message.rank,
        top_logprobs=_pairs(message.top_ids, message.top),
    )
