"""What a compiled form accepts, for each kind and each vocabulary."""

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import CancelledError

import numpy as np
import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.matcher import Matcher
from mixtral_jax.structure.specification import Check, Grammar, Kind, Specification
from mixtral_jax.structure.tool_grammar import Mode, ToolUse
from mixtral_jax.structure.trial import process
from mixtral_jax.tokenization.messages import Tool
from mixtral_jax.tokenization.tokenizer import Tokenizer

NAMES = ["v1", "v2", "v3", "tekken-v3", "byte-level", "sentencepiece", "metaspace", "bytes"]
POINT = json.dumps(
    {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "label": {"type": "string"}},
        "required": ["x", "label"],
        "additionalProperties": False,
    }
)
LARK = 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]+/\n%ignore /[ ]{1,8}/'
ACCEPTED = [
    (Specification(Kind.JSON_OBJECT), '{"a": [1, 2.5, null], "é🙂": {"b": "\\n ü"}}'),
    (Specification(Kind.JSON_SCHEMA, POINT), '{"x": -12, "label": "grün 🙂 你好"}'),
    (Specification(Kind.JSON_SCHEMA, POINT), '{\n  "x": 0,\n  "label": ""\n}'),
    (Specification(Kind.REGEX, r"[a-z]+/[0-9]{2,4}"), "item/042"),
    (Specification(Kind.REGEX, r"^\w+ é?$"), "straße é"),
    (Specification(Kind.CHOICE, choices=("yes", "yes, sir", "né 🙂")), "yes"),
    (Specification(Kind.CHOICE, choices=("yes", "yes, sir", "né 🙂")), "yes, sir"),
    (Specification(Kind.CHOICE, choices=("yes", "yes, sir", "né 🙂")), "né 🙂"),
    (Specification(Kind.LARK, LARK), "1 + 22+3"),
    (Specification(Kind.GBNF, 'root ::= "<" [a-z]+ ">" root?'), "<a><bcd>"),
]
REFUSED = [
    (Specification(Kind.JSON_OBJECT), "[1]"),
    (Specification(Kind.JSON_OBJECT), '{"a": \x01}'),
    (Specification(Kind.JSON_SCHEMA, POINT), '{"x": 1.5, "label": ""}'),
    (Specification(Kind.REGEX, r"[a-z]+/[0-9]{2,4}"), "item/4"),
    (Specification(Kind.CHOICE, choices=("yes", "yes, sir")), "yes, "),
    (Specification(Kind.LARK, LARK), "1 +"),
]


def accepts(form: Form, ids: list[int]) -> bool:
    """Whether each id stands in the mask where it comes, and the answer may end after the last."""
    matcher = form.matcher()
    for token_id in ids:
        if token_id not in allowed(matcher):
            return False
        matcher.consume([token_id])
    return matcher.may_end


def allowed(matcher: Matcher) -> set[int]:
    mask = np.zeros(matcher.words, np.int32)
    matcher.fill(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of an answer as a model was trained to write it: those of the text, without bos."""
    ids = tokenizer.encode(text)
    return ids[len(tokenizer.encode("")) :]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("wanted", "text"), ACCEPTED)
def test_natural_tokens_are_accepted(
    name: str,
    wanted: Specification,
    text: str,
    vocabularies: Callable[[str], Tokenizer],
    compilers: Callable[[str], Compiler],
) -> None:
    form = compilers(name).compile(wanted, continues=False, salt=b"")
    ids = answer(vocabularies(name), text)
    assert vocabularies(name).decode(ids) == text
    assert accepts(form, ids)


@pytest.mark.parametrize("name", ["v3", "byte-level"])
@pytest.mark.parametrize(("wanted", "text"), REFUSED)
def test_other_texts_are_refused(
    name: str,
    wanted: Specification,
    text: str,
    vocabularies: Callable[[str], Tokenizer],
    compilers: Callable[[str], Compiler],
) -> None:
    form = compilers(name).compile(wanted, continues=False, salt=b"")
    assert not accepts(form, answer(vocabularies(name), text))


def test_a_continued_text_begins_without_the_space(
    compilers: Callable[[str], Compiler], vocabularies: Callable[[str], Tokenizer]
) -> None:
    tokenizer = vocabularies("v3")
    form = compilers("v3").compile(Specification(Kind.JSON_OBJECT), continues=True, salt=b"")
    middle = tokenizer.encode("x{}")[2:]
    assert tokenizer.token_bytes(middle[0]) == b"{}"
    assert accepts(form, middle)
    first = {tokenizer.token_bytes(token_id)[:1] for token_id in allowed(form.matcher())}
    assert first == {b"{"}


def test_a_grammar_of_our_own_begins_after_its_control_id(
    compilers: Callable[[str], Compiler], vocabularies: Callable[[str], Tokenizer]
) -> None:
    grammar = Grammar('start: <[5]> " [" /[0-9]/ "]"', begins_after=5, weakened=("#/a: not",))
    form = compilers("v3").compile(grammar, continues=False, salt=b"")
    assert (form.begins_after, form.weakened) == (5, ("#/a: not",))
    assert accepts(form, [5, *answer(vocabularies("v3"), "[7]")])


def test_refusals_say_what_is_wrong(tried: Compiler) -> None:
    for wanted, reason in [
        (Specification(Kind.REGEX, "(?=a)b"), "look-around"),
        (Specification(Kind.REGEX, "[^\\s\\S]"), "no text"),
        (Specification(Kind.REGEX, ""), "empty"),
        (Specification(Kind.CHOICE), "no texts"),
        (Specification(Kind.LARK, "start: <[3]>"), "control tokens"),
        (Specification(Kind.LARK, "a: 'x'"), "not understood"),
        (Specification(Kind.GBNF, "root ::= missing"), "missing"),
        (Specification(Kind.JSON_SCHEMA, "{"), "no JSON"),
    ]:
        for _ in range(2):  # the second time from the cache
            with pytest.raises(StructureError, match=reason):
                tried.compile(wanted, continues=False, salt=b"")


def test_a_form_is_made_once_for_each_caller(tried: Compiler) -> None:
    wanted = Specification(Kind.REGEX, "[a-f]{3}")
    forms = [tried.compile(wanted, continues=False, salt=salt) for salt in (b"a", b"b", b"a")]
    assert forms[0] is forms[2]
    assert forms[0] is not forms[1]


def test_a_grammar_that_kills_the_compiler_is_refused(
    tried: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain of 20,000 rules overflows the stack of the process that tries it."""
    monkeypatch.setattr(process, "LONGEST_TRIAL", 60.0)  # it must not be late first
    chain = "\n".join(f"r{i}: r{i + 1}" for i in range(20_000))
    with pytest.raises(StructureError, match="cannot be compiled"):
        tried.compile(Grammar(f'start: r0\n{chain}\nr20000: "x"'), continues=False, salt=b"")
    wanted = Specification(Kind.REGEX, "still alive")
    assert accepts(tried.compile(wanted, continues=False, salt=b""), list(b"still alive"))


@pytest.mark.slow
def test_a_grammar_that_never_ends_is_refused(tried: Compiler) -> None:
    endless = "start: A\nA: /(.*a.{12}.*)/ & /(.*b.{12}.*)/ & ~/(.*c.{13}.*)/"
    with pytest.raises(StructureError, match="2 seconds"):
        tried.compile(Grammar(endless), continues=False, salt=b"")


def test_a_model_without_an_end_of_answers_refuses_every_structure(
    vocabularies: Callable[[str], Tokenizer],
) -> None:
    tokenizer = vocabularies("bytes").__class__()
    tokenizer.eos_ids = frozenset()
    with Compiler(tokenizer, 300) as compiler, pytest.raises(StructureError, match="ends"):
        compiler.compile(Specification(Kind.JSON_OBJECT), continues=False, salt=b"")


def test_a_rule_that_the_compiler_refuses_is_left_out_or_named(tried: Compiler) -> None:
    short = {"type": "string", "format": "date", "maxLength": 3}  # no date is that short
    text = json.dumps({"type": "object", "properties": {"a": short}, "required": ["a"]})
    form = tried.compile(Specification(Kind.JSON_SCHEMA, text), continues=False, salt=b"")
    (entry,) = form.weakened
    assert entry.startswith("/properties/a/format: not enforced")
    strict = Specification(Kind.JSON_SCHEMA, text, strict=True)
    with pytest.raises(StructureError) as caught:
        tried.compile(strict, continues=False, salt=b"")
    assert caught.value.pointer == "/properties/a/format"


def test_tools_are_read_in_the_trial(
    tried: Compiler, vocabularies: Callable[[str], Tokenizer]
) -> None:
    """A form of tools says what it leaves out, and is kept as others are."""
    tokenizer = vocabularies("bytes")
    odd = '{"type": "object", "properties": {"a": {"type": "array", "uniqueItems": true}}}'

    def use(parameters: str, *, strict: bool = False) -> ToolUse:
        tools = (Tool("look", "", parameters, strict),)
        return ToolUse(tokenizer.tool_form, tools, Mode.REQUIRED)

    form = tried.compile(use(odd), continues=False, salt=b"")
    assert form.weakened and form.weakened[0].startswith("look#")
    assert tried.compile(use(odd), continues=False, salt=b"") is form
    assert tried.compile(use(POINT), continues=False, salt=b"").weakened == ()
    with pytest.raises(StructureError, match="parameters of the function look"):
        tried.compile(use(odd, strict=True), continues=False, salt=b"")


def test_answers_are_checked_by_the_processes_that_try_forms(
    vocabularies: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LONGEST_CHECK", 60.0)  # also on a busy machine
    unique = Check('{"uniqueItems": true}', "draft2020-12")
    with Compiler(vocabularies("bytes").__class__(), 300, processes=1) as compiler:
        assert compiler.check("[1]", unique, salt=b"") is None
        (trial,) = compiler.trials
        assert trial.pid is not None and trial.starts == 1
        os.kill(trial.pid, signal.SIGKILL)
        assert "equal" in (compiler.check("[1, 1]", unique, salt=b"") or "")
        assert trial.starts == 2
    with pytest.raises(CancelledError):
        compiler.check("[1]", unique, salt=b"")
    with pytest.raises(CancelledError):
        compiler.compile(Specification(Kind.JSON_OBJECT), continues=False, salt=b"")
