"""Patterns of schemas: the written form matches what ECMA-262 and Python's `re` both match."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.structure.json_schema.patterns import UnsupportedPattern, translate
from mixtral_jax.structure.schema import read
from tests.mixtral_jax.structure.json_schema.walks import Vocabulary

TEXTS = [
    *("", "a", "b", "ab", "xa", "ax", "abc", "A1_", "12", "1.5", "-3", ".", "é", "x@y.de", " "),
    *("a b", "foo-bar", "[x]", "a&b", "{", "a{", "/", "-", "\u00a0", "٣", "a\nb", "xx", "aab"),
]


@pytest.mark.parametrize(
    "pattern",
    [
        *("", "^", "$", "a", "^a", "a$", "^a$", "^a|b$", "(^a$|^b$)", "^(a|b)+$", "^a?b*$"),
        *(r"^\d+$", r"^\w+$", r"\s", r"^[\w.-]+@[\w-]+\.\w{2,}$", r"^[^\d]$", r"^[a\-z]$"),
        *(r"^[a&&b]$", r"^[\[x\]]+$", r"a{", r"^\u00e9$", r"^(?:foo|bar)-(?<n>bar)$", r"^[ab]{2}$"),
        *(r"^.+$", r"^[+-]?\d+(\.\d+)?$", r"^\x41", r"\/", r"^[^a]$", r"^a{2}?b$", "x{2,}"),
    ],
)
@pytest.mark.filterwarnings("ignore:Possible")
def test_what_is_written_matches_the_same(pattern: str) -> None:
    vocabulary = Vocabulary.of_bytes()
    schema = read(json.dumps({"type": "string", "pattern": pattern}), strict=True)
    python = re.compile(pattern.replace("(?<n>", "(?P<n>"))
    for text in TEXTS:
        accepted = vocabulary.accepts(schema, json.dumps(text, ensure_ascii=False))
        matched = bool(python.search(text))
        # Outside ASCII, what the readings take differently is not written.
        assert accepted == matched or (matched and not accepted and not text.isascii()), text


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(?=a)", "look-around"),
        ("(?<!a)b", "look-around"),
        (r"(a)\1", "back-reference"),
        (r"\bx", "word boundary"),
        ("(?i)a", "group"),
        ("x{,3}", "least number"),
        (r"\Z", "unknown escape"),
        ("a(", "not closed"),
        ("a)", "not opened"),
        ("[b-a]", "range"),
        ("*a", "nothing to repeat"),
        ("a**", "repetition of a repetition"),
        ("a{3,2}", "larger least"),
        ("((a{100}){100}){100}", "too many"),
        ("(" * 60 + ")" * 60, "groups"),
        (r"\ud800", "surrogate"),
        (r"\p{Script=Latin}", "property"),
        ("x(^a)", r"'\^' within"),
        ("[", "end where more"),
    ],
)
def test_what_cannot_be_written(pattern: str, words: str) -> None:
    with pytest.raises(UnsupportedPattern, match=words):
        translate(pattern)


@pytest.mark.parametrize(
    ("pattern", "valid", "invalid"),
    [
        (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", ["1", "-1.5", ".5", "007."], ["", "-", ".", "1e5"]),
        (
            r"^(?!^[-+.]*$)[+-]?0*\d{0,5}\.?\d{0,2}0*$",
            ["1", "-1.5", ".5", "12345.67", "007"],
            ["", "-", ".", "+.", "12345.678"],
        ),
        (
            r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+"
            r"[A-Za-z]{2,}$",
            ["a@b.de", "a.b'c+d@x-y.z.com", "a.b@c.de"],
            [".a@b.de", "a..b@c.de", "a.@b.de", "a@b", "@b.de"],
        ),
    ],
    ids=["decimal", "decimal of digits", "email"],
)
def test_look_ahead_of_libraries_is_known(
    pattern: str, valid: list[str], invalid: list[str]
) -> None:
    vocabulary = Vocabulary.of_bytes()
    schema = read(json.dumps({"type": "string", "pattern": pattern}), strict=True)
    for text in (*valid, *invalid):
        assert bool(re.search(pattern, text)) == (text in valid)
        assert vocabulary.accepts(schema, json.dumps(text)) == (text in valid), text


@pytest.mark.filterwarnings("ignore:Possible")
@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet=r"ab1.^$*+?()[]{}|\-,d w", max_size=8), st.text(alphabet="ab1 .-{", max_size=4)
)
def test_any_pattern_is_refused_or_means_what_python_means(pattern: str, text: str) -> None:
    try:
        written = translate(pattern)
    except UnsupportedPattern:
        return
    rust = written.replace("(?s:.*)", r"[\s\S]*")
    python = re.sub(r"\\x\{([0-9a-f]+)\}", lambda m: re.escape(chr(int(m[1], 16))), rust)
    if re.search(r"[^\\]\[\^?\^?\[|p\{", python):
        return  # a class within a class, which Python does not know
    assert not re.fullmatch(python[1:-1], text) or re.search(pattern, text)
