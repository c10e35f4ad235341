"""Traps of llguidance, each of which would end an answer wrongly or end the process."""

import json
import random
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from mixtral_jax.errors import ChatError, StructureError
from mixtral_jax.structure.form import form_of
from mixtral_jax.structure.matcher import Guide, Matcher
from mixtral_jax.structure.specification import Grammar
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer

EOS = 257  # of ByteTokenizer


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide(ByteTokenizer(), 300)


@pytest.fixture(scope="module")
def guides(vocabularies: Callable[[str], Tokenizer]) -> Callable[[str], Guide]:
    """Gives the guide of a tokenizer by its name."""
    return cache(lambda name: Guide(vocabularies(name), vocabularies(name).vocab_size))


def allowed(matcher: Matcher) -> list[int]:
    mask = np.zeros(matcher.words, np.int32)
    matcher.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def test_a_mask_has_a_bit_for_each_id(guide: Guide) -> None:
    """Bit i of word w stands for the id 32 w + i; ids beyond the tokenizer's are never allowed."""
    matcher = guide.matcher('start: "a" | "\\u00e9"')
    mask = np.zeros(guide.words, np.int32)
    matcher.fill(mask)
    expected = np.zeros(10, np.uint32)
    expected[ord("a") // 32] |= np.uint32(1 << ord("a") % 32)
    expected[0xC3 // 32] |= np.uint32(1 << 0xC3 % 32)
    assert np.array_equal(mask.view(np.uint32), expected)
    matcher = guide.matcher("start: /(?s:.*)/")
    assert max(allowed(matcher)) == EOS


def test_a_wrong_grammar_is_an_error(guide: Guide) -> None:
    """llguidance's constructor never raises."""
    with pytest.raises(StructureError, match="no start rule"):
        guide.matcher('other: "a"')


def test_a_matcher_in_error_allows_nothing(guide: Guide) -> None:
    """llguidance itself fills the mask with the end of the answer alone."""
    matcher = guide.matcher('start: "ab"')
    with pytest.raises(StructureError, match="grammar"):
        matcher.consume([ord("x")])
    for question in (
        lambda: matcher.fill(np.zeros(guide.words, np.int32)),
        lambda: matcher.has_ended,
        lambda: matcher.may_end,
        matcher.forced,
        matcher.check,
        lambda: matcher.consume([ord("a")]),
        lambda: matcher.consume([EOS]),
    ):
        with pytest.raises(StructureError):
            question()


def test_a_limit_that_is_reached_in_the_middle_of_an_answer_is_an_error(guide: Guide) -> None:
    """What follows a word of forty letters depends on each of them: more states than are kept."""
    matcher = guide.matcher("start: /(a|b)*a(a|b){40}/")
    rng = random.Random(0)
    with pytest.raises(StructureError):
        for _ in range(100):
            matcher.consume([rng.choice(b"ab") for _ in range(1000)])
            allowed(matcher)
        pytest.fail("no limit was reached")
    with pytest.raises(StructureError):
        allowed(matcher)


def test_the_end_is_taken_in_once_nothing_else_can_follow(guide: Guide) -> None:
    """llguidance stops there by itself, and takes the id that ends the answer for an error."""
    matcher = guide.matcher('start: "ab"')
    matcher.consume(list(b"ab"))
    assert matcher.has_ended and matcher.may_end
    assert allowed(matcher) == [EOS]
    matcher.consume([EOS])
    assert matcher.has_ended and matcher.may_end
    with pytest.raises(StructureError):
        matcher.consume([ord("a")])


def test_the_end_is_taken_in_where_more_could_follow(guide: Guide) -> None:
    matcher = guide.matcher("start: /ab*/")
    matcher.consume([ord("a")])
    assert matcher.may_end and not matcher.has_ended
    assert allowed(matcher) == [ord("b"), EOS]
    matcher.consume([ord("b"), EOS])
    assert matcher.has_ended


def test_the_end_is_refused_in_the_middle(guide: Guide) -> None:
    matcher = guide.matcher('start: "ab"')
    matcher.consume([ord("a")])
    with pytest.raises(StructureError):
        matcher.consume([EOS])


def test_every_id_that_ends_an_answer_is_allowed_at_its_end() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.eos_ids = frozenset({256, 257})
    matcher = Guide(tokenizer, 300).matcher('start: "a"')
    matcher.consume([ord("a")])
    assert allowed(matcher) == [256, 257]
    matcher.copy().consume([256])
    matcher.consume([257])


def test_a_copy_goes_its_own_way(guide: Guide) -> None:
    warm = form_of(Grammar("start: /[ab]{2}/"), guide)
    first, second = warm.matcher(), warm.matcher()
    first.consume(list(b"ab"))
    second.consume(list(b"b"))
    assert (first.has_ended, second.has_ended) == (True, False)
    assert allowed(warm.matcher()) == [ord("a"), ord("b")]


def test_several_threads_copy_one_form(guide: Guide) -> None:
    """llguidance refuses a matcher that two threads use at a time; copying does not use it."""
    form = form_of(Grammar("start: /[ab]{500}/"), guide)
    failures: list[BaseException] = []

    def answer() -> None:
        try:
            for _ in range(50):
                matcher = form.matcher()
                for _ in range(20):
                    assert allowed(matcher) == [ord("a"), ord("b")]
                    matcher.consume([ord("a")])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=answer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("name", ["v3", "tekken-v3", "byte-level", "sentencepiece", "metaspace"])
@pytest.mark.parametrize("text", ['{"name": "Zoë 🙂"}', " two  spaces", "\n\n {\n", "x", " "])
def test_forced_tokens_are_those_of_the_middle_of_a_text(
    name: str,
    text: str,
    vocabularies: Callable[[str], Tokenizer],
    guides: Callable[[str], Guide],
) -> None:
    """None of them begins with a space of its own, and what they spell is the text."""
    tokenizer, guide = vocabularies(name), guides(name)
    matcher = guide.matcher(f"start: {_quoted(text)} /[0-9]/")
    ids: list[int] = []
    while forced := matcher.forced():
        matcher.consume(forced)
        ids += forced
    spelled = b"".join(map(tokenizer.token_bytes, ids))
    assert text.encode().startswith(spelled)
    for place, token_id in enumerate(ids):
        other = guide.matcher(f"start: {_quoted(text)} /[0-9]/")
        other.consume(ids[:place])
        assert token_id in allowed(other)


def test_the_beginning_of_a_long_forced_text_is_forced(
    vocabularies: Callable[[str], Tokenizer], guides: Callable[[str], Guide]
) -> None:
    """A step costs no more for what comes later, and the tokens are those of the whole text."""
    tokenizer = vocabularies("v3")
    text = "The quick brown fox jumps over the lazy dog. " * 400
    matcher = guides("v3").matcher(f"start: {_quoted(' ' + text)} /[0-9]/")
    forced = matcher.forced()
    assert 80 <= len(forced) <= 200
    assert list(forced) == tokenizer.encode(text)[1 : 1 + len(forced)]


def test_a_tokenizer_that_refuses_a_text_ends_no_process() -> None:
    """An exception from it would be a panic in Rust: the longest pieces are taken instead."""

    class Refusing(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            raise ChatError("too long")

    matcher = Guide(Refusing(), 300).matcher('start: "héllo" /[0-9]/')
    assert bytes(matcher.forced()) == "héllo".encode()


def test_one_control_id_is_not_another() -> None:
    matcher = Guide(ByteTokenizer(), 300).matcher('start: <[259]> "a"')
    assert allowed(matcher) == [259]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
