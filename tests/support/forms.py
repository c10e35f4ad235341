"""Forms for answers of toy models in bytes, requests that have them, and what engines answer."""

import json
from typing import Any

from llguidance import LLMatcher

from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.matcher import Guide
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.engine.engine import Engine
from serving.scheduling.request import Event, Request
from serving.scheduling.step_plan import Limits

TOKENIZER = ByteTokenizer()
LIMITS = Limits(
    num_pages=400,
    page_size=4,
    max_sequences=8,
    max_step_tokens=64,
    max_context=256,
    max_waiting=99,
    deterministic=True,
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}


def is_person(answer: str) -> bool:
    """Returns True if a text is what SCHEMA describes."""
    value = json.loads(answer)
    return (
        [*value] == ["name", "age", "ok"]
        and 0 <= value["age"] <= 150
        and len(value["name"]) <= 6
        and value["ok"] in (True, False)
    )


def person_of(guide: Guide) -> Form:
    """SCHEMA's form without spaces: 29 of its characters are certain."""
    grammar = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
    return Form(guide.matcher(grammar))


def regex(guide: Guide, pattern: str, begins_after: int | None = None) -> Form:
    """The form of a regular expression."""
    return Form(guide.matcher(LLMatcher.grammar_from_regex(pattern)), begins_after)


def request(name: str, form: Form | None, **changes: Any) -> Request:
    """A hot request with a prompt and a seed of its own."""
    values: dict[str, Any] = dict(
        prompt_ids=tuple(TOKENIZER.encode(f"say {name}")),
        sampling=SamplingParams(temperature=1.5, seed=sum(map(ord, name))),
        max_tokens=120,
        eos_ids=TOKENIZER.eos_ids,
    )
    return Request(id=name, form=form, **{**values, **changes})


Events = dict[tuple[str, int], list[Event]]


def served(engine: Engine, *requests: Request) -> Events:
    """The events of each choice, to the end of all."""
    for asked in requests:
        engine.add(asked)
    events: Events = {}
    for _ in range(2000):
        for event in engine.step():
            if event.drawn is not None or event.finish_reason is not None:
                events.setdefault((event.request_id, event.choice), []).append(event)
        if not engine.has_work:
            return events
    raise AssertionError("it does not end")


def ids(events: list[Event]) -> list[int]:
    """The tokens of an answer."""
    return [event.drawn.token_id for event in events if event.drawn is not None]


def text(events: list[Event]) -> str:
    """The answer without the token that ends it."""
    tokens = [token for token in ids(events) if token not in TOKENIZER.eos_ids]
    return b"".join(map(TOKENIZER.token_bytes, tokens)).decode()
