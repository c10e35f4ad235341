"""Masks along random answers, over every vocabulary: no control ids, bounded white space, and what
ends is valid."""

import json
import random
import re
from collections.abc import Callable, Set

import jsonschema
import numpy as np
import pytest

from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.specification import Kind, Specification
from mixtral_jax.tokenization.tokenizer import Tokenizer

NAMES = ["v1", "v2", "v3", "tekken-v3", "byte-level", "sentencepiece", "metaspace", "bytes"]
SCHEMAS = [
    {"type": "object"},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "mail": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"enum": ["a", "b c", "é🙂"]}, "maxItems": 4},
            "size": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "is_new": {"type": "boolean"},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "string", "pattern": "^[a-zà-ü ]{0,9}$"},
                    "branches": {
                        "type": "array",
                        "items": {"$ref": "#/$defs/tree"},
                        "maxItems": 2,
                    },
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 2, "maxItems": 3},
]
MOST_TOKENS = 400
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class Ids:
    """Which ids of a vocabulary are of which kind: each is bool [V]."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.control = np.array([not piece for piece in pieces])
        self.end = np.array([i in tokenizer.eos_ids for i in range(len(pieces))])
        self.closing = np.array([piece.strip() in (b'"', b"}", b"]") for piece in pieces])
        self.blank = np.array([bool(piece) and not piece.strip() for piece in pieces])


def bits(mask: np.ndarray) -> np.ndarray:
    return np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)


def walk(
    form: Form, ids: Ids, choose: Callable[[np.ndarray], np.ndarray], rng: random.Random
) -> tuple[list[int], bool]:
    """Draws an answer of the ids that `choose` takes from each mask, and whether it ended."""
    matcher = form.matcher()
    mask = np.zeros(matcher.words, np.int32)
    drawn: list[int] = []
    for _ in range(MOST_TOKENS):
        matcher.fill(mask)
        allowed = bits(mask)
        assert not allowed[len(ids.control) :].any()
        allowed = allowed[: len(ids.control)]
        # No control id but those that end the answer, and those exactly where it may end.
        assert np.array_equal(allowed & ids.control, ids.end & matcher.may_end)
        token_id = int(rng.choice(np.flatnonzero(choose(allowed)).tolist()))
        matcher.consume([token_id])
        if ids.end[token_id]:
            return drawn, True
        drawn.append(token_id)
    return drawn, False


def hasty(ids: Ids, rng: random.Random) -> Callable[[np.ndarray], np.ndarray]:
    """Draws at random, and often what closes a string, a list or the answer."""

    def choose(allowed: np.ndarray) -> np.ndarray:
        closing = allowed & (ids.closing | ids.end)
        return closing if closing.any() and rng.random() < 0.3 else allowed

    return choose


def spacious(ids: Ids) -> Callable[[np.ndarray], np.ndarray]:
    """Draws white space wherever it may."""

    def choose(allowed: np.ndarray) -> np.ndarray:
        return allowed & ids.blank if (allowed & ids.blank).any() else allowed

    return choose


@pytest.mark.parametrize("name", NAMES)
def test_answers_that_end_are_valid(
    name: str, vocabularies: Callable[[str], Tokenizer], compilers: Callable[[str], Compiler]
) -> None:
    tokenizer, rng = vocabularies(name), random.Random(name)
    kinds, ended = Ids(tokenizer), 0
    for schema in SCHEMAS:
        wanted = Specification(Kind.JSON_SCHEMA, json.dumps(schema))
        form = compilers(name).compile(wanted, continues=False, salt=b"")
        for _ in range(4):
            ids, is_whole = walk(form, kinds, hasty(kinds, rng), rng)
            if is_whole:
                value = json.loads(tokenizer.decode(ids))
                jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
                ended += 1
    assert ended >= len(SCHEMAS)


@pytest.mark.parametrize("name", NAMES)
def test_white_space_is_bounded(
    name: str, vocabularies: Callable[[str], Tokenizer], compilers: Callable[[str], Compiler]
) -> None:
    tokenizer, rng = vocabularies(name), random.Random(name)
    wanted = Specification(
        Kind.JSON_SCHEMA, json.dumps({"type": "array", "items": {"type": "boolean"}, "minItems": 9})
    )
    form = compilers(name).compile(wanted, continues=False, salt=b"")
    ids, _ = walk(form, Ids(tokenizer), spacious(Ids(tokenizer)), rng)
    text = STRING.sub('""', tokenizer.decode(ids))
    runs = [len(run) for run in re.findall(r"\s+", text)]
    assert max(runs) == 8
    assert text == text.lstrip()


@pytest.mark.parametrize("kind", [Kind.REGEX, Kind.CHOICE, Kind.LARK, Kind.GBNF])
@pytest.mark.parametrize("name", ["v3", "tekken-v3", "byte-level"])
def test_texts_of_other_kinds_match(
    kind: Kind,
    name: str,
    vocabularies: Callable[[str], Tokenizer],
    compilers: Callable[[str], Compiler],
) -> None:
    """Each of these grammars accepts the texts of one expression."""
    tokenizer, rng = vocabularies(name), random.Random(name)
    wanted = {
        Kind.REGEX: Specification(Kind.REGEX, "[ab ]{2,5}(é|🙂)"),
        Kind.CHOICE: Specification(Kind.CHOICE, choices=("ab é", "abé", "  🙂")),
        Kind.LARK: Specification(
            Kind.LARK, 'start: LETTER{2,5} ("é" | "🙂")\nLETTER: "a" | "b" | " "'
        ),
        Kind.GBNF: Specification(Kind.GBNF, 'root ::= [ab ]{2,5} end\nend ::= "é" | "🙂"'),
    }[kind]
    form = compilers(name).compile(wanted, continues=False, salt=b"")
    kinds = Ids(tokenizer)
    for _ in range(20):
        ids, is_whole = walk(form, kinds, lambda allowed: allowed, rng)
        assert is_whole
        text = tokenizer.decode(ids)
        assert re.fullmatch("[ab ]{2,5}(é|🙂)", text), text
        assert kind is not Kind.CHOICE or text in wanted.choices


def test_a_character_is_written_whole(
    vocabularies: Callable[[str], Tokenizer], compilers: Callable[[str], Compiler]
) -> None:
    """In a string, bytes that begin no character are refused, and surrogates too (RFC 3629)."""
    tokenizer = vocabularies("v3")
    form = compilers("v3").compile(Specification(Kind.JSON_OBJECT), continues=False, salt=b"")
    byte = {tokenizer.token_bytes(i)[0]: i for i in range(3 + 768, 3 + 768 + 256)}
    assert byte.keys() == set(range(256))

    def follow(*before: int) -> Set[int]:
        matcher = form.matcher()
        matcher.consume([*tokenizer.encode('{"')[1:], *(byte[value] for value in before)])
        mask = np.zeros(matcher.words, np.int32)
        matcher.fill(mask)
        return {value for value in byte if bits(mask)[byte[value]]}

    outside = {0x80, 0xC0, 0xC1, 0xF5, 0xFF, 0x00, 0x1F}
    assert {0xC3, 0xE2, 0xF0, ord("a"), ord('"')} <= follow()
    assert not outside & follow()
    assert follow(0xF0) == set(range(0x90, 0xC0))
    assert follow(0xED) == set(range(0x80, 0xA0))
    assert follow(0xC3) == set(range(0x80, 0xC0))
