"""What may stand in a caller's Lark grammar."""

import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.lark import DEEPEST, checked


def same(schema: str) -> str:
    return schema


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("start: <[3]>", "control tokens"),
        ("start: <[*]>", "control tokens"),
        ("start: <[^3]>", "control tokens"),
        ("start: a\na: <|im_start|>", "line 2 .*control tokens"),
        ('start: "x" </s>', "control tokens"),
        ("start: A\nA: /a/ & /b/", "`&`"),
        ("start: A\nA: ~/a/", "`~`"),
        ("start: A\nA: /b/ ~ /a/", "`~`"),
        ("start: A ~B\nA: /b/\nB: /a/", "`~`"),
        ('%llguidance {"no_forcing": true}\nstart: "a"', "%llguidance"),
        ('start: @other "a"', "other grammars"),
        ('start: @{ "a" @}', "other grammars"),
        ('%override start: "a"', "%override"),
        ("%declare A\nstart: A", "%declare"),
        ('start: "a', "not understood"),
        ("start: 'a'", "not understood"),
        ('start: "a" %json {"type": ', "no[t] followed by JSON"),
        ('start: %json {"maximum": NaN}', "no[t] followed by JSON"),
        ('begin: "a"', "no rule named start"),
        ("start: a\na[max_tokens=5]: /.*/", "max_tokens"),
        ('start: a\na[stop="x"]: /.*/', "attribute stop"),
        ("start: a\na[lazy, temperature=0.5]: /.*/", "temperature"),
    ],
)
def test_refused(grammar: str, reason: str) -> None:
    with pytest.raises(StructureError, match=reason):
        checked(grammar, same)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "<[3]>" /<s>/ // a comment with <[3]> & ~\n',
        'start: "a"~2..3 "b"~4 # ~"x"',
        'start: ["<"] a\na[lazy]: /<[^>]*>/',
        '%ignore /[ ]+/\n%import common.INT\n?start: INT ("," INT)*',
        'start: "a".."f" | ("x" | "y")+ "z"{2,3} "i"i',
        'start: "\\"<[3]>\\"" /\\/<[3]>/i',
        "start: a-b\na-b: /x/ -> name\n",
    ],
)
def test_accepted(grammar: str) -> None:
    """It is written anew with the same tokens, without comments."""
    text = checked(grammar, same)
    assert checked(text, same).split() == text.split()
    assert "comment" not in text


def test_schemas_are_read() -> None:
    text = checked('start: %json {"a": [1,\n2]} "x"\nA: /y/', lambda schema: f"<{schema}>")
    assert text.splitlines()[0] == 'start : %json <{"a": [1,\n2]}> "x" '.splitlines()[0]
    assert '2]}> "x"' in text


def test_errors_name_the_line() -> None:
    with pytest.raises(StructureError, match="line 4 "):
        checked('start: %json {"a":\n1}\n\n  | <[3]>', same)


def test_rules_in_rules() -> None:
    def chain(length: int) -> str:
        rules = "\n".join(f"r{i}: r{i + 1}" for i in range(length))
        return f'start: r0\n{rules}\nr{length}: "x"'

    checked(chain(DEEPEST - 5), same)
    with pytest.raises(StructureError, match="deep"):
        checked(chain(DEEPEST + 5), same)
    checked('start: "a" start | "b" start "c"', same)  # recursion is not depth
