"""A load generator for endpoints that speak OpenAI's chat API.

A level is a number of clients, each of which sends its next request when its last answer has ended.
Answers are greedy streams of exactly as many tokens as asked: `ignore_eos`, an extension of vLLM
and llama.cpp, makes a model continue past its end of an answer. If an endpoint does not know it,
answers are shorter. Tokens are therefore counted: by the usage in the answer, or else one for each
chunk with text.

A request that fails is counted as an error and measures nothing else. The time of a chunk is the
one at which its line was read; a chunk may hold several tokens or half of one, and the time between
chunks is what is reported as the time between tokens.
"""

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

import httpx

from serving.errors import SetupError

Progress = Callable[[int, int], None]
"""Called with answers done and answers in all."""

PERCENTILES = (50, 90, 99)

_PATH = "/v1/chat/completions"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# An answer may have to wait for all answers before it.
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
# These words are one token each in most vocabularies.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law "
    "car city name team minute idea body back face door health art war history party result change "
    "morning reason research girl guy moment air teacher force education"
)
_WORDS = _TEXT.split()
_PROBES = (8, 40)  # numbers of words of two prompts that show how an endpoint counts tokens


class BenchError(SetupError):
    """A measurement that cannot be made; the message says what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server: its URL before `/v1`, the model's name in request bodies, and the key.

    Without a name a server answers by the model that it has.
    """

    url: str
    model: str | None = None
    key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The measurement of a request; times are seconds of one monotonic clock."""

    sent: float
    ended: float | None = None  # when the last chunk came, with text or without
    arrivals: tuple[float, ...] = ()  # of the chunks with text
    tokens: int = 0
    prompt_tokens: int | None = None  # as the endpoint counts them
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Level:
    """The measurement of a level. Times are seconds; NaN if there was nothing to measure."""

    concurrency: int
    requests: int  # answered
    errors: int
    seconds: float  # from the first request sent to the end of the last answer
    tokens: int  # generated
    prompt_tokens: float  # of a request, on average
    answer_tokens: float  # of a request, on average
    tokens_per_second: float
    requests_per_second: float
    ttft: dict[str, float]  # percentiles "p50", "p90", "p99" of the time to the first token
    itl: dict[str, float]  # the same of the time between chunks
    first_error: str | None = None


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolates linearly between the two nearest values, as NumPy does; NaN without values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Returns the percentiles PERCENTILES, by names such as "p50"."""
    return {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}


def summary(concurrency: int, answers: Sequence[Answer]) -> Level:
    """Sums up the answers of a level."""
    good = [answer for answer in answers if answer.error is None]
    failed = [answer.error for answer in answers if answer.error is not None]
    first = min((answer.sent for answer in answers), default=0.0)
    last = max((answer.ended for answer in good if answer.ended is not None), default=first)
    seconds = last - first
    tokens = sum(answer.tokens for answer in good)
    prompts = [answer.prompt_tokens for answer in good if answer.prompt_tokens is not None]
    gaps = [b - a for answer in good for a, b in itertools.pairwise(answer.arrivals)]
    return Level(
        concurrency=concurrency,
        requests=len(good),
        errors=len(failed),
        seconds=seconds,
        tokens=tokens,
        prompt_tokens=statistics.fmean(prompts) if prompts else float("nan"),
        answer_tokens=tokens / len(good) if good else float("nan"),
        tokens_per_second=tokens / seconds if seconds else float("nan"),
        requests_per_second=len(good) / seconds if seconds else float("nan"),
        ttft=percentiles([a.arrivals[0] - a.sent for a in good if a.arrivals]),
        itl=percentiles(gaps),
        first_error=failed[0] if failed else None,
    )


def median(levels: Sequence[Level]) -> Level:
    """Merges repeated measurements of a level: the median of each figure, the sum of errors."""
    merged: dict[str, Any] = {}
    for field in fields(Level):
        values = [getattr(level, field.name) for level in levels]
        if isinstance(values[0], dict):
            merged[field.name] = {
                key: statistics.median(value[key] for value in values) for key in values[0]
            }
        elif field.name == "first_error":
            merged[field.name] = next((value for value in values if value is not None), None)
        elif field.name == "errors":
            merged[field.name] = sum(values)
        else:
            middle = statistics.median(values)
            merged[field.name] = round(middle) if isinstance(values[0], int) else middle
    return Level(**merged)


def prompts(count: int, words: int, *, seed: int | str = 0, shared: int = 0) -> list[str]:
    """Returns texts of random words, about a token each; the first `shared` words are the same.

    Apart from those, two texts share a word or two at the beginning at most, so that a server can
    reuse nothing but the chat template.
    """
    shared = min(shared, words)
    beginning = random.Random("shared").choices(_WORDS, k=shared)  # also from seed to seed
    return [
        " ".join(beginning + random.Random(f"{seed} {number}").choices(_WORDS, k=words - shared))
        for number in range(count)
    ]


def words_for(endpoint: Endpoint, tokens: int) -> int:
    """Returns how many words make a prompt of about `tokens` tokens, the chat template included.

    Sends a short and a longer prompt, which warms the endpoint up too. If the endpoint does not
    count tokens, a word is taken for one. Raises BenchError if it does not answer, with its reason.
    """
    few, more = _PROBES
    [short] = ask(endpoint, prompts(1, few, seed=-1), concurrency=1, max_tokens=2)
    [longer] = ask(endpoint, prompts(1, more, seed=-2), concurrency=1, max_tokens=2)
    if error := short.error or longer.error:
        raise BenchError(f"{endpoint.url}{_PATH} refused the first request: {error}")
    if short.prompt_tokens is None or longer.prompt_tokens is None:
        return tokens
    per_word = max(1.0, (longer.prompt_tokens - short.prompt_tokens) / (more - few))
    return max(1, round(more + (tokens - longer.prompt_tokens) / per_word))


def measure(
    endpoint: Endpoint,
    texts: Sequence[str],
    *,
    concurrency: int,
    max_tokens: int,
    progress: Progress | None = None,
) -> Level:
    """Sends all texts, `concurrency` of them at a time, and sums up the answers."""
    return summary(concurrency, ask(endpoint, texts, concurrency, max_tokens, progress))


def ask(
    endpoint: Endpoint,
    texts: Sequence[str],
    concurrency: int,
    max_tokens: int,
    progress: Progress | None = None,
) -> list[Answer]:
    """Sends all texts; returns the answers in the order in which they ended."""
    return asyncio.run(_ask(endpoint, texts, concurrency, max_tokens, progress))


async def _ask(
    endpoint: Endpoint,
    texts: Sequence[str],
    concurrency: int,
    max_tokens: int,
    progress: Progress | None,
) -> list[Answer]:
    answers: list[Answer] = []
    waiting = iter(texts)
    async with _client(endpoint, concurrency) as client:

        async def one_client() -> None:
            for text in waiting:
                answers.append(await _answer(client, body(endpoint, text, max_tokens)))
                if progress is not None:
                    progress(len(answers), len(texts))

        await asyncio.gather(*(one_client() for _ in range(concurrency)))
    return answers


def _client(endpoint: Endpoint, concurrency: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=endpoint.url.rstrip("/"),
        headers={"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {},
        limits=httpx.Limits(max_connections=concurrency),
        timeout=_TIMEOUT,
        # Proxies are for other hosts.
        trust_env=urlsplit(endpoint.url).hostname not in _LOOPBACK,
    )


def body(endpoint: Endpoint, text: str, max_tokens: int) -> dict[str, Any]:
    """Returns the body of a request for an answer of exactly `max_tokens` tokens."""
    named = {} if endpoint.model is None else {"model": endpoint.model}
    return named | {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _answer(client: httpx.AsyncClient, request: dict[str, Any]) -> Answer:
    sent = time.perf_counter()
    try:
        async with client.stream("POST", _PATH, json=request) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Answer(sent=sent, error=f"status {response.status_code}: {text[:200]}")
            lines = [(line, time.perf_counter()) async for line in response.aiter_lines()]
    except httpx.HTTPError as error:
        return Answer(sent=sent, error=f"{type(error).__name__}: {error}")
    return read(sent, lines)


def read(sent: float, lines: Iterable[tuple[str, float]]) -> Answer:
    """Reads the lines of a stream, each with the time at which it came."""
    arrivals = []
    usage: dict[str, int] = {}
    ended, last = False, sent
    for line, at in lines:
        name, _, data = line.partition(":")
        if name != "data":
            continue
        if data.strip() == "[DONE]":
            ended = True
            break
        try:
            chunk = json.loads(data)
        except ValueError:
            return Answer(sent=sent, error=f"an event that is not JSON: {data[:200]}")
        if error := chunk.get("error"):
            return Answer(sent=sent, error=f"the answer broke off: {json.dumps(error)[:200]}")
        usage = chunk.get("usage") or usage
        if not chunk.get("choices"):
            continue  # a heartbeat, or the usage alone
        last = at
        delta = chunk["choices"][0].get("delta") or {}
        if delta.get("content") or delta.get("reasoning_content"):
            arrivals.append(at)
    if not ended:
        return Answer(sent=sent, error="the answer broke off before [DONE]")
    tokens = usage.get("completion_tokens", len(arrivals))
    if not tokens:
        return Answer(sent=sent, error="the answer had no token")
    return Answer(
        sent=sent,
        ended=last,
        arrivals=tuple(arrivals),
        tokens=tokens,
        prompt_tokens=usage.get("prompt_tokens"),
    )
