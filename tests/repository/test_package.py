"""Every imported distribution is declared, in the base install or in the extra of its room."""

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mixtral_jax
from mixtral_jax.cli import extras

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# Packages of ours, and the stubs that only type checkers see.
OWN = {"mixtral_jax", "convert", "serving", "_typeshed"}
# Which extras a folder may use beside the base install; the longest matching prefix decides.
ROOMS = {
    "mixtral_jax": set(),
    "mixtral_jax/cli/plan.py": {"plan"},
    "mixtral_jax/cli/train": {"train"},
    "mixtral_jax/training": {"train"},
    "convert": {"convert"},
    "serving": {"serve"},
    "serving/access/entra.py": {"serve", "entra"},
    "serving/access/jwks.py": {"serve", "entra"},
    "serving/observe/tracing.py": {"serve", "otel"},
    "serving/bench": {"serve", "bench"},
}


def declared(room_extras: set[str]) -> set[str]:
    """Names the distributions of the base install and of some extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in room_extras for line in EXTRAS[extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Yields the full names of modules that a file imports, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


@cache
def top_level_packages() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


@cache
def owners(top: str) -> list[tuple[str, frozenset[str]]]:
    """Lists the installed distributions with a top-level package, and their files."""
    names = sorted(set(top_level_packages().get(top, [])))
    return [
        (canonicalize_name(name), frozenset(map(str, metadata.files(name) or []))) for name in names
    ]


def distributions(module: str) -> set[str]:
    """Finds who brings a module: of a namespace such as `google` the one that has the file."""
    candidates = owners(module.partition(".")[0])
    assert candidates, f"{module} is imported and not installed"
    parents = module.split(".")
    while len(candidates) > 1 and parents:
        path = "/".join(parents)
        holding = {
            name for name, files in candidates if {f"{path}.py", f"{path}/__init__.py"} & files
        }
        if holding:
            return holding
        parents.pop()
    return {name for name, _ in candidates}


def extras_of(path: str) -> set[str]:
    return ROOMS[max((room for room in ROOMS if path.startswith(room)), key=len)]


@pytest.mark.parametrize("package", ["mixtral_jax", "convert", "serving"])
def test_every_imported_distribution_is_declared(package: str) -> None:
    undeclared = set()
    for file in sorted((ROOT / package).rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        allowed = declared(extras_of(path))
        for module in imported_modules(ast.parse(file.read_text(encoding="utf-8"))):
            top = module.partition(".")[0]
            if top in sys.stdlib_module_names or top in OWN:
                continue
            if not distributions(module) & allowed:
                undeclared.add(f"{path} imports {module} of {distributions(module)}")
    assert not undeclared


def test_a_namespace_is_told_apart() -> None:
    assert distributions("google.protobuf.message.Message") == {"protobuf"}
    assert distributions("opentelemetry.sdk.trace.TracerProvider") == {"opentelemetry-sdk"}


def test_commands_name_extras_that_bring_their_modules() -> None:
    for extra, modules in extras.MODULES.items():
        room_extras = {extra, "serve"} if "mixtral-jax[serve]" in EXTRAS[extra] else {extra}
        for module in modules:
            assert distributions(module) & declared(room_extras), module


def test_all_is_everything_that_needs_no_accelerator() -> None:
    (all_of_them,) = map(Requirement, EXTRAS["all"])
    assert all_of_them.extras == EXTRAS.keys() - {
        "all",
        "cuda",
        "docs",
        "notebook",
        "plan-gpu",
        "test",
        "test-library",
        "tpu",
    }


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None if module == "gguf" else module)
    extras.require("serve")
    with pytest.raises(extras.MissingExtraError) as error:
        extras.require("convert")
    assert str(error.value) == "this command needs gguf; run pip install 'mixtral-jax[convert]'"


def test_the_version_is_that_of_the_metadata() -> None:
    assert mixtral_jax.__version__ == PROJECT["version"]
