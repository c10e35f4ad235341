"""Admission of callers' requests, what they reserve, and what they cost when they are over.

It knows neither HTTP nor a gRPC server: both ports begin a lease for a caller before they read its
request, reserve tokens when they have read it, and settle the lease when its answer has ended.

    begin -> (the request is read) -> reserve -> (the answer runs) -> settle

The reservation of a prompt is an estimate from its bytes, which the service's first chunk corrects.
The reservation of an answer is all that it may become: n times max_tokens. Settling gives back what
was not used. A request that waited in the queue only costs nothing, and a prompt of which a part
was computed costs that part.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from serving.access.caller import Caller
from serving.accounting.accounts import Accounts
from serving.accounting.answer_tokens import AnswerTokens
from serving.accounting.rate_limits import Allowance
from serving.accounting.tab import NotedTab, Tab, Used
from serving.errors import EngineFailure, Unavailable
from serving.proto import inference_pb2 as pb

# Errors for which nobody pays, where they leave the caller without any of the answer.
OUR_FAULTS = (EngineFailure, Unavailable)
# Bytes of a prompt that are one token, by estimate.
_BYTES_PER_TOKEN = 4
# Tokens that a chat template adds to a message.
_TOKENS_PER_MESSAGE = 3


class Lease:
    """An admitted request. Call `settle` once when it is over, however it ends.

    Args:
        admission: That which has admitted it.
        caller: Its caller.
        tab: Its account, which is open.
    """

    def __init__(self, admission: "Admission", caller: Caller, tab: Tab) -> None:
        self._admission = admission
        self._caller = caller
        self._tab = tab
        self._estimates: list[int] = []  # of each prompt, in tokens
        self._is_settled = False

    def reserve(
        self, calls: Sequence[pb.GenerateRequest], max_context: int, at_a_time: int | None = None
    ) -> None:
        """Reserves tokens for calls of the service; each of them counts as a request.

        Args:
            calls: The calls that answer the request.
            max_context: Tokens of prompt and answer together that the model holds.
            at_a_time: The number of calls that are under way at a time; None for all of them.

        Raises:
            InvalidRequest: They may use more than all of the caller's minute.
            Overloaded: They may use more than the caller has left of it.
        """
        if len(calls) > 1:
            self._tab.enter(len(calls) - 1, min(len(calls), at_a_time or len(calls)) - 1)
        self._estimates = [estimate(call) for call in calls]
        least = sum(self._estimates) + sum(call.n or 1 for call in calls)
        tokens = sum(self._estimates)
        for call, prompt in zip(calls, self._estimates, strict=True):
            tokens += (call.n or 1) * self._admission.answer_tokens(call, max_context - prompt)
        minute = self._admission.accounts.rates.tokens_of_a_minute(self._caller)
        if minute is not None and not any(call.HasField("max_tokens") for call in calls):
            tokens = max(least, min(tokens, minute))  # nobody has asked for so many
        self._tab.take(tokens)

    def follow(self, answers: Sequence[AnswerTokens]) -> None:
        """Corrects the reservation as soon as the number of each prompt's tokens is known.

        Accounts of another process are told what has been used so far, in case this one dies.
        """
        tab = self._tab
        used = partial(self._used, answers)
        for tokens, prompt in zip(answers, self._estimates, strict=True):
            tokens.on_rendered = partial(self._correct, prompt)
            if isinstance(tab, NotedTab):
                tokens.on_more = partial(tab.note, used)

    def settle(self, answers: Sequence[AnswerTokens] = ()) -> None:
        """Charges what was computed, and gives the rest of the reservation back.

        Later calls do nothing.

        Args:
            answers: The counts of the calls; without them the request costs nothing.
        """
        if self._is_settled:
            return
        self._is_settled = True
        for tokens in answers:
            tokens.on_rendered = tokens.on_more = None
        self._tab.settle(self._used(answers) if answers else None)

    def _used(self, answers: Sequence[AnswerTokens]) -> Used:
        prompt = sum(tokens.computed_prompt_tokens for tokens in answers)
        cached = sum(tokens.cached_tokens for tokens in answers)
        completion = sum(tokens.completion_tokens for tokens in answers)
        uncharged = cached * (1 - self._admission.cached_token_charge)
        adapter = next((tokens.adapter for tokens in answers if tokens.adapter), "")
        return Used(prompt, completion, cached, prompt - uncharged + completion, adapter)

    def _correct(self, estimated: int, prompt_tokens: int) -> None:
        if not self._is_settled:
            self._tab.correct(prompt_tokens - estimated)


class Admission:
    """Admits requests within the limits of their callers.

    Args:
        accounts: The accounts of all callers.
        assumed_max_tokens: Tokens that are reserved for an answer whose request sets no max_tokens.
        cached_token_charge: The part of a cached token of a prompt that counts against limits.
    """

    def __init__(
        self,
        accounts: Accounts,
        assumed_max_tokens: int = 1024,
        cached_token_charge: float = 1.0,
    ) -> None:
        self.accounts = accounts
        self.cached_token_charge = cached_token_charge
        self._assumed_max_tokens = assumed_max_tokens

    def begin(self, caller: Caller) -> Lease:
        """Admits a request before it is read; raises Overloaded, with its own `retry_after`."""
        return Lease(self, caller, self.accounts.open(caller))

    def requests_at_a_time(self, caller: Caller) -> int | None:
        """Returns the number of requests that a caller may have at a time; None without a limit."""
        return self.accounts.rates.requests_at_a_time(caller)

    def answer_tokens(self, call: pb.GenerateRequest, room: int) -> int:
        """Returns the tokens that a choice may have.

        Args:
            call: The call.
            room: Tokens that the context still holds behind the prompt.
        """
        tokens = call.max_tokens if call.HasField("max_tokens") else self._assumed_max_tokens
        return max(1, min(tokens, room))

    def headers(self, caller: Caller) -> dict[str, str]:
        """Returns the headers of an answer that tell the caller's limits, in OpenAI's words.

        https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers
        """
        return headers_of(self.accounts.allowances(caller))


def estimate(call: pb.GenerateRequest) -> int:
    """Returns the tokens of a call's prompt: those that it gives itself, or about its bytes / 4."""
    match call.WhichOneof("prompt"):
        case "token_ids":
            return len(call.token_ids.ids)
        case "chat":
            overhead = _TOKENS_PER_MESSAGE * len(call.chat.messages)
            return call.chat.ByteSize() // _BYTES_PER_TOKEN + overhead
        case _:
            return len(call.text.encode()) // _BYTES_PER_TOKEN + 1


def headers_of(allowances: Mapping[str, Allowance]) -> dict[str, str]:
    """Returns `x-ratelimit-{limit,remaining,reset}-{requests,tokens}` of allowances by unit."""
    headers = {}
    for unit, allowance in allowances.items():
        headers[f"x-ratelimit-limit-{unit}"] = str(allowance.limit)
        headers[f"x-ratelimit-remaining-{unit}"] = str(allowance.remaining)
        headers[f"x-ratelimit-reset-{unit}"] = duration(allowance.reset)
    return headers


def duration(seconds: float) -> str:
    """Returns a time as OpenAI's headers write it: 0s, 120ms, 1.5s, 6m0s."""
    milliseconds = round(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
