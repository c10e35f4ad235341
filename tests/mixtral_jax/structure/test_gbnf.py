"""Grammars in llama.cpp's notation, and the texts that they accept."""

import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.form import form_of
from mixtral_jax.structure.gbnf import lark_of
from mixtral_jax.structure.grammar import grammar_of
from mixtral_jax.structure.matcher import Guide
from mixtral_jax.structure.specification import Kind, Specification
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer

JSON = r"""
# An object of JSON, as llama.cpp's own example has it.
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide(ByteTokenizer(), 261)


def accepts(guide: Guide, grammar: str, text: str) -> bool:
    wanted = Specification(Kind.GBNF, grammar)
    matcher = form_of(grammar_of(wanted, space=False), guide).matcher()
    try:
        matcher.consume(list(text.encode()))
        return matcher.may_end
    except StructureError:
        return False


@pytest.mark.parametrize(
    ("grammar", "accepted", "refused"),
    [
        (JSON, ['{"a": [1, 2.5, "x\\n"], "b": {}}', '{"é":"🙂"}'], ["[1]", '{"a"}', '{"a": 01}']),
        (r'root ::= "\x41\u0042" [\x43-\u0045\U0001F642]+', ["ABC", "ABD🙂"], ["AB", "ABF"]),
        ("root ::= [a&&b]+", ["a&b"], ["c"]),  # no operators of sets
        (r"root ::= [+\--]", ["+", "-"], [","]),
        ("root ::= .+", ["a\nb"], [""]),
        (r'root ::= [^\]/]+ "/"', ["ab/"], ["a]/", "/"]),
        (r'root ::= "a/b" "\t"', ["a/b\t"], ["a/bt"]),
        ('root ::= word "abc"\nword ::= [a-z]+', ["xabc", "abcabc"], ["abc"]),
        ('root ::= ("a" | "ab") "c"', ["ac", "abc"], ["bc"]),
        ('root ::= [0-9]{0} "a"', ["a"], ["1a"]),
        ('root ::= [0-9]{,2} "a" "b"{2} "c"{1,}', ["1abbc", "abbccc"], ["123abbc", "abc", "abb"]),
        ('root ::= ("ab"? "c")*', ["", "abcc"], ["ab"]),
        ('root ::= "a" # first\n  | "b" |\n "c"\n\nother ::= "d"', ["a", "b", "c"], ["d"]),
        ('root ::= fooBar foo-bar\nfooBar ::= "x"\nfoo-bar ::= "y"', ["xy"], ["yx"]),
        ('root ::= "(" root? ")"', ["()", "((()))"], ["(()"]),
    ],
)
def test_texts(guide: Guide, grammar: str, accepted: list[str], refused: list[str]) -> None:
    for text in accepted:
        assert accepts(guide, grammar, text), text
    for text in refused:
        assert not accepts(guide, grammar, text), text


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ('start ::= "a"', "no rule named root"),
        ('root ::= "a" other', "root uses other"),
        ("root ::= <[3]>", "line 1 .*not understood"),
        ("root ::= !<think>", "not understood"),
        ('root ::= "a"\nroot ::= "b"', "line 2 .*second rule named root"),
        ('root := "a"', "not understood"),
        ('root "a"', "instead of ::="),
        ('root ::= ("a"', "not closed"),
        ('root ::= "a")', r"'\)' where a rule should end"),
        ("root ::= []", "an empty set"),
        ("root ::= [z-a]", "the range z-a"),
        (r'root ::= "\q"', r"the escape \\q"),
        (r'root ::= "\uD800"', "no character"),
        ('root ::= "a"{3,1}', "the repetition"),
        ('root ::= "a"{1,99999999}', "the repetition"),
        ("root ::= " + "(" * 300 + '"a"' + ")" * 300, "nests more than 100"),
    ],
)
def test_errors(grammar: str, reason: str) -> None:
    with pytest.raises(StructureError, match=reason):
        lark_of(grammar)
