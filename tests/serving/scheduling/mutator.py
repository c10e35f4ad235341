"""Mutants of a module: copies with one small fault each, and whether tests notice it.

A process is forked for each mutant, so that pytest is imported once. Mutants that make a test hang
count as noticed. mutmut and cosmic-ray do the same on copies of the whole project, at ten times the
cost a mutant, and have no list of explained survivors.
"""

import ast
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import hypothesis.strategies
import pytest

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
}
_Place = tuple[Any, Callable[[], None]]  # a node, and what changes it
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """A module with one fault; `number` counts the places of the module that can be changed."""

    module: str
    number: int

    def build(self) -> tuple[ast.Module, str]:
        """Returns the changed module, and what was changed: the code before and after."""
        tree = _tree(self.module)
        node, change = next(islice(_places(tree), self.number, None))
        before = _statement(tree, node)
        change()
        ast.fix_missing_locations(tree)
        return tree, f"{self.module}: {before} -> {_statement(tree, node)}"


def mutants(module: str) -> list[Mutant]:
    """Returns all mutants of a module."""
    count = sum(1 for _ in _places(_tree(module)))
    return [Mutant(module, number) for number in range(count)]


def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _statement(tree: ast.Module, node: ast.stmt | ast.expr) -> str:
    """Returns the first line of the smallest statement around a node, as code."""
    around = [
        other
        for other in ast.walk(tree)
        if isinstance(other, ast.stmt)
        and other.lineno <= node.lineno <= (other.end_lineno or other.lineno)
    ]
    smallest = min(
        around, key=lambda other: ((other.end_lineno or 0) - other.lineno, -other.lineno)
    )
    lines = ast.unparse(smallest).splitlines()
    return lines[0] if isinstance(smallest, ast.If | ast.For | ast.While) else " ".join(lines)


def _places(tree: ast.Module) -> Iterator[_Place]:
    """Yields (node, function that changes it) for every place that can be changed."""
    for parent in ast.walk(tree):
        if isinstance(parent, ast.Assert | ast.Raise | ast.AnnAssign | ast.JoinedStr):
            _mark(parent)
        for decorator in getattr(parent, "decorator_list", []):
            _mark(decorator)
    for node in ast.walk(tree):
        if getattr(node, "is_skipped", False):
            continue
        yield from _changes(node)


def _mark(node: ast.AST) -> None:
    """Leaves out a node with all below: assertions, texts of errors, annotations."""
    value = node.value if isinstance(node, ast.AnnAssign) else None
    for below in ast.walk(node):
        below.is_skipped = True  # type: ignore[attr-defined]
    for below in ast.walk(value) if value is not None else ():
        below.is_skipped = False  # type: ignore[attr-defined]


def _changes(node: ast.AST) -> Iterator[_Place]:
    match node:
        case ast.Compare(ops=[comparison]) if type(comparison) in _COMPARISONS:
            yield node, lambda: setattr(node, "ops", [_COMPARISONS[type(comparison)]()])
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator) if type(operator) in _OPERATORS:
            yield node, lambda: setattr(node, "op", _OPERATORS[type(operator)]())
        case ast.BoolOp(op=operation):
            other = ast.And() if isinstance(operation, ast.Or) else ast.Or()
            yield node, lambda: setattr(node, "op", other)
        case ast.UnaryOp(op=ast.Not()):
            yield node, lambda: setattr(node, "op", ast.UAdd())
        case ast.Constant(value=bool() as value):
            yield node, lambda: setattr(node, "value", not value)
        case ast.Constant(value=int() as value):
            yield node, lambda: setattr(node, "value", value + 1)
        case ast.Call(func=ast.Name(id=name) as function) if name in _NAMES:
            yield node, lambda: setattr(function, "id", _NAMES[name])
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            negated = ast.UnaryOp(op=ast.Not(), operand=test)
            yield node, lambda: setattr(node, "test", negated)
        case ast.Expr(value=ast.Call()):
            yield node, lambda: setattr(node, "value", ast.Constant(value=None))


def survives(mutant: Mutant | None, tests: Sequence[str], seconds: float) -> bool:
    """Returns True if no test notices a mutant.

    Args:
        mutant: a mutant; None for the code as it is, which survives if the tests pass.
        tests: arguments of pytest; those that fail soonest come first.
        seconds: time after which a mutant hangs.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = _run(mutant, tests)
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _run(mutant: Mutant | None, tests: Sequence[str]) -> int:
    """Runs the tests on a mutant, in this process, which is of no other use afterwards."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for name in list(sys.modules):
        if name.startswith(("serving", "tests.serving")):
            del sys.modules[name]
    if mutant is not None:
        sys.meta_path.insert(0, _Finder(mutant.module, mutant.build()[0]))
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, phases=[hypothesis.Phase.generate]
    )
    hypothesis.settings.load_profile("mutants")
    warning = "ignore::pytest.PytestAssertRewriteWarning"  # pytest is imported already
    # Without the settings of the project, which import jax.
    bare = ["-c", os.devnull, "--rootdir", os.getcwd(), "--noconftest", "-p", "no:cacheprovider"]
    return int(pytest.main([*bare, "-x", "-q", "-W", warning, *tests]))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a mutant in place of its module."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        self._module = module
        self._tree = tree

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._tree, self._module, "exec"), module.__dict__)
