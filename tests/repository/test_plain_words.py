"""Docstrings and names are plain: convention 10 of the design, as far as a program can see it.

Every public definition has a docstring that begins with a verb or a noun; no docstring and no
comment begins with a word that leans on something else (What, Whether, Of, As, See ...); a list of
names that say nothing is not used for variables.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("mixtral_jax", "convert", "serving", "benchmarks")
LEANING = {
    *("what", "whether", "of", "as", "how", "who", "whose", "whom", "where", "when", "which"),
    *("see", "so", "and", "but", "or", "nor", "then", "than", "because", "such", "likewise", "if"),
    *("with", "for", "from", "to", "in", "on", "at", "by", "about", "besides", "also", "first"),
}
BANNED_NAMES = {
    *("one", "found", "said", "told", "left", "each", "part", "thing", "stuff", "here", "there"),
    *("bed", "alarm", "hired", "asleep", "coming", "both", "cell", "most"),
}
# Rooms that are still to be read; an entry that has nothing to mend any more fails the test.
TO_BE_READ: set[str] = set()


def _files() -> list[Path]:
    return [
        path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if "_pb2" not in path.name
    ]


def _public(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and public methods of its public classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    top = [node for node in tree.body if isinstance(node, kinds)]
    classes = [node for node in top if isinstance(node, ast.ClassDef)]
    inner = [
        node
        for owner in classes
        if not owner.name.startswith("_")
        for node in owner.body
        if isinstance(node, kinds) and not _is_override(node)
    ]
    return [node for node in [*top, *inner] if not node.name.startswith("_")]


def _is_override(node: ast.AST) -> bool:
    """Overloads, setters and overrides are described where the first of them stands."""
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(d).endswith(("overload", ".setter", "override")) for d in decorators)


def _first_word(text: str) -> str:
    match = re.match(r"\W*([\w'-]+)", text)
    return match[1].lower() if match else ""


def problems(path: Path) -> list[str]:
    """Everything in one file that the convention forbids, a line each."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    name = path.relative_to(ROOT)
    rows = []
    for node in _public(tree):
        if ast.get_docstring(node) is None:
            rows.append(f"{name}:{node.lineno} {node.name} has no docstring")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            text = ast.get_docstring(node) or ""
            line = getattr(node, "lineno", 1)
            if _first_word(text) in LEANING:
                rows.append(
                    f"{name}:{line} docstring begins with {_first_word(text)!r}: {text[:50]!r}"
                )
        stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        if stored and node.id in BANNED_NAMES:
            rows.append(f"{name}:{node.lineno} a variable is named {node.id!r}")
        if isinstance(node, ast.arg) and node.arg in BANNED_NAMES:
            rows.append(f"{name}:{node.lineno} a parameter is named {node.arg!r}")
    rows += [f"{name}:{line} comment begins with {word!r}" for line, word in _comments(source)]
    return rows


def _comments(source: str) -> list[tuple[int, str]]:
    """Comments of a line of their own that begin with a leaning word, those inside a block too."""
    rows = []
    before = -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.strip() != token.string:
            continue
        line = token.start[0]
        word = _first_word(token.string)
        # The second line of a comment goes on with the sentence of the first.
        if line != before + 1 and word in ("what", "whether", "of", "as", "who", "whose", "see"):
            rows.append((line, word))
        before = line
    return rows


def _room(path: Path) -> str | None:
    """The longest entry of TO_BE_READ that a file falls under."""
    name = path.relative_to(ROOT).as_posix()
    rooms = [room for room in TO_BE_READ if name == room or name.startswith(f"{room}/")]
    return max(rooms, key=len, default=None)


def test_words_are_plain() -> None:
    rows = [row for path in _files() if _room(path) is None for row in problems(path)]
    assert not rows, "\n" + "\n".join(rows)


def test_no_room_waits_in_vain() -> None:
    waiting = {_room(path) for path in _files() if problems(path)}
    assert not TO_BE_READ - waiting


if __name__ == "__main__":
    import sys

    # python -m tests.repository.test_plain_words serving/access ...: what is to be mended there.
    for path in _files():
        if any(str(path.relative_to(ROOT)).startswith(wanted) for wanted in sys.argv[1:] or [""]):
            print(*problems(path), sep="\n", end="\n" if problems(path) else "")
