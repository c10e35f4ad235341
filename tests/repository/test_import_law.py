"""The import law of the house: which room may import which, held against every import there is.

A room is a folder; the files that stand directly in `mixtral_jax/` and `serving/` are rooms of one
file each. A room may import itself and what its row names. The rows are an order, lowest first, and
a row may name only rooms above it, so that circles cannot be written down.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mixtral_jax", "convert", "serving", "benchmarks", "tests")
MOST_FILES = 15  # in one folder: a folder that holds more is two subjects

# Room -> the rooms that it may import. "*" behind a name means that room and all rows before it in
# the same package.
# --8<-- [start:law]
_LAW_TEXT = """
mixtral_jax.errors
mixtral_jax.paths
mixtral_jax.sampling_params  | mixtral_jax.errors
mixtral_jax.devices          | mixtral_jax.errors
mixtral_jax.axes             | mixtral_jax.devices*
mixtral_jax.config           | mixtral_jax.axes*
mixtral_jax.hf_config        | mixtral_jax.config*
mixtral_jax.sharding         | mixtral_jax.hf_config*
mixtral_jax.layout           | mixtral_jax.sharding*
mixtral_jax.weight           | mixtral_jax.layout*
mixtral_jax.cache            | mixtral_jax.weight*
mixtral_jax.compilation      | mixtral_jax.cache*
mixtral_jax.kernels          | mixtral_jax.compilation*
mixtral_jax.placement        | mixtral_jax.kernels*
mixtral_jax.model            | mixtral_jax.placement*
mixtral_jax.roofline         | mixtral_jax.model*
mixtral_jax.step             | mixtral_jax.roofline*
mixtral_jax.tokenization     | mixtral_jax.errors
mixtral_jax.structure        | mixtral_jax.errors mixtral_jax.tokenization
mixtral_jax.checkpoint       | mixtral_jax.model* mixtral_jax.tokenization
mixtral_jax.generation       | mixtral_jax.step* mixtral_jax.tokenization mixtral_jax.structure
mixtral_jax.scoring          | mixtral_jax.generation*
mixtral_jax.training         | mixtral_jax.scoring* mixtral_jax.checkpoint
mixtral_jax.planning         | mixtral_jax.training*
mixtral_jax                  | mixtral_jax.scoring*
convert                      | mixtral_jax.model* mixtral_jax.tokenization mixtral_jax.checkpoint mixtral_jax
serving.errors
serving.channel
serving.parent
serving.child                | serving.errors serving.parent
serving.open_files
serving.ports
serving.flags
serving.proto
serving.command_line         | serving.errors serving.flags
serving.observe              | serving.errors
serving.access               | serving.errors
serving.accounting           | serving.errors serving.proto serving.access serving.observe
serving.scheduling           | serving.errors mixtral_jax.sampling_params
serving.engine               | serving.scheduling serving.errors mixtral_jax.step* mixtral_jax.checkpoint mixtral_jax.tokenization mixtral_jax.structure
serving.service              | serving.engine serving.scheduling serving.access serving.accounting serving.observe serving.proto serving.errors mixtral_jax.errors mixtral_jax.sampling_params mixtral_jax.tokenization mixtral_jax.structure
serving.cluster              | serving.engine serving.scheduling serving.access serving.proto serving.errors serving.parent mixtral_jax.checkpoint mixtral_jax.compilation mixtral_jax.sampling_params
serving.texts                | serving.engine serving.scheduling serving.cluster serving.proto serving.errors mixtral_jax.errors mixtral_jax.structure
serving.client               | serving.proto serving.errors serving.channel
serving.bench                | serving.engine serving.scheduling serving.errors serving.parent mixtral_jax.planning* mixtral_jax
serving.gateway.dialect      | serving.proto serving.errors
serving.gateway.http         | serving.gateway.dialect serving.accounting serving.observe serving.proto serving.errors
serving.gateway.processes    | serving.gateway.http serving.errors serving.parent serving.child serving.accounting serving.observe
serving.gateway              | serving.gateway.dialect serving.gateway.http serving.gateway.processes serving.access serving.accounting serving.observe serving.channel serving.parent serving.open_files serving.flags serving.command_line serving.proto serving.errors
serving.launch               | serving.errors serving.channel serving.parent serving.child serving.open_files serving.ports serving.flags serving.command_line serving.proto serving.observe serving.access serving.accounting serving.scheduling serving.engine serving.service serving.cluster serving.texts serving.client mixtral_jax.planning* mixtral_jax
serving                      | serving.launch
mixtral_jax.cli              | everything
benchmarks                   | everything
tests                        | everything
"""  # noqa: E501
# --8<-- [end:law]

# Files whose row is shorter than their room's. A row here may name other such files.
_FILES = {
    "serving.launch.supervisor": {
        "serving.channel",
        "serving.errors",
        "serving.flags",
        "serving.child",
        "serving.parent",
        "serving.ports",
    },
}
STARTS_WITHOUT_JAX = [
    "mixtral_jax",
    "mixtral_jax.cli.main",
    "mixtral_jax.tokenization.tokenizer",
    "mixtral_jax.structure.compiler",
    "serving.scheduling.scheduler",
    "serving.flags",
    "serving.command_line",
    "serving.engine.config",
    "serving.engine.worker",
    "serving.cluster.rank",
    "serving.launch.config",
    "serving.gateway.config",
    "serving.access.credentials",
    "serving.access.config",
    "serving.accounting.ledger",
    "serving.client",
    "serving.gateway.app",
    "serving.launch.supervisor",
    "serving.launch.text_process",
]
# Rooms and files that import none of ACCELERATED, not even in a function, nor a room that does.
WITHOUT_JAX = {
    "mixtral_jax.errors",
    "mixtral_jax.paths",
    "mixtral_jax.sampling_params",
    "mixtral_jax.tokenization",
    "mixtral_jax.structure",
    "serving.errors",
    "serving.channel",
    "serving.parent",
    "serving.open_files",
    "serving.ports",
    "serving.flags",
    "serving.proto",
    "serving.command_line",
    "serving.observe",
    "serving.access",
    "serving.accounting",
    "serving.scheduling",
    "serving.client",
    "serving.gateway.dialect",
    "serving.gateway.http",
    "serving.gateway.processes",
    "serving.gateway",
    "serving.child",
    "serving.launch.supervisor",
}
ACCELERATED = ("jax", "jaxlib", "flax", "orbax", "optax")


def law() -> dict[str, set[str]]:
    """The rows of the law, in their order."""
    rows: dict[str, set[str]] = {}
    everything = {"*everything*"}
    # Rooms that those on the way from arrays to a step do not need.
    beside = {"mixtral_jax.tokenization", "mixtral_jax.structure", "mixtral_jax.checkpoint"}
    for line in _LAW_TEXT.strip().splitlines():
        room, _, names = (part.strip() for part in line.partition("|"))
        allowed: set[str] = set()
        for name in names.split():
            if name == "everything":
                allowed |= everything
                continue
            below = name.removesuffix("*")
            assert below in rows, f"the row of {room} names {below}, which is not above it"
            if name.endswith("*"):
                package = below.partition(".")[0]
                allowed |= {
                    row
                    for row in list(rows)[: list(rows).index(below) + 1]
                    if row.partition(".")[0] == package and row not in beside
                }
                if below in (
                    "mixtral_jax.generation",
                    "mixtral_jax.scoring",
                    "mixtral_jax.training",
                    "mixtral_jax.planning",
                ):
                    allowed |= beside
            allowed.add(below)
        rows[room] = allowed
    return rows


def modules(packages: Iterable[str] = PACKAGES) -> dict[str, Path]:
    """Every module of ours by its dotted name; generated ones by name alone."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported_names(text: str, known: Iterable[str] = ()) -> set[str]:
    """Dotted names that a module's text imports anywhere, by statement or by `import_module`.

    Those in functions and for type checking count too. `from a import b` gives `a.b` where that is
    one of the `known` modules, and `a` otherwise. A name that is computed is not seen.
    """
    known = set(known)
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in known else node.module)
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func).rpartition(".")[2]
            if function in ("import_module", "__import__"):
                arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
                texts = [value.value for value in arguments if isinstance(value, ast.Constant)]
                names |= {name for name in texts if isinstance(name, str)}
    return names


def imports(path: Path, known: Iterable[str]) -> set[str]:
    """Modules of ours that a file imports anywhere; see `imported_names`."""
    names = imported_names(path.read_text(encoding="utf-8"), known)
    return {name for name in names if name.partition(".")[0] in PACKAGES}


def room_of(module: str, rows: Iterable[str]) -> str:
    """The row that a module falls under: the longest that is its beginning."""
    matching = [row for row in rows if module == row or module.startswith(row + ".")]
    assert matching, f"{module} stands in a room without a row"
    room = max(matching, key=len)
    # A file beside the rooms is no part of the public face.
    assert room != "mixtral_jax" or module == "mixtral_jax", f"{module} has no row"
    assert room != "serving" or module in ("serving", "serving.__main__"), f"{module} has no row"
    return room


def forbidden() -> set[tuple[str, str]]:
    """Every import that breaks the law, as (importing module, imported module)."""
    rows, found = law(), modules()
    broken = set()
    for module, path in found.items():
        if "_pb2" in path.name:
            continue
        room = room_of(module, rows)
        allowed = _FILES.get(module, rows[room] | {room})
        if "*everything*" in allowed:
            continue
        broken |= {
            (module, target)
            for target in imports(path, found) - {module}
            if target not in allowed and room_of(target, rows) not in allowed
        }
    return broken


def test_the_import_law() -> None:
    assert len(modules()) > 200  # the walk itself works
    assert not forbidden()


def test_imports_in_functions_and_by_name_are_seen() -> None:
    text = """
def hidden():
    import jax.numpy
    from mixtral_jax import config, load
    importlib.import_module("serving.engine.engine")
    import_module(name="flax.nnx")
    __import__("orbax")
    importlib.import_module(f"{computed}.module")
"""
    names = {"jax.numpy", "mixtral_jax.config", "mixtral_jax", "serving.engine.engine"}
    assert imported_names(text, ["mixtral_jax.config"]) == names | {"flax.nnx", "orbax"}


def test_rooms_without_jax_import_it_nowhere() -> None:
    rows, files = law() | _FILES, modules(("mixtral_jax", "serving"))
    for room in WITHOUT_JAX:
        assert rows[room] <= WITHOUT_JAX, room
    for module, path in files.items():
        if module not in _FILES and room_of(module, rows) not in WITHOUT_JAX:
            continue
        names = imported_names(path.read_text(encoding="utf-8"))
        assert not {name for name in names if name.partition(".")[0] in ACCELERATED}, module


def test_nobody_imports_the_command_line_benchmarks_or_tests() -> None:
    found = modules(("mixtral_jax", "convert", "serving"))
    for module, path in found.items():
        top = ("mixtral_jax.cli.", "benchmarks", "tests")
        if not module.startswith("mixtral_jax.cli"):
            assert not [name for name in imports(path, found) if name.startswith(top)], module


def test_no_circle_between_files() -> None:
    """Files of one room may import each other, never in a circle."""
    found = modules(("mixtral_jax", "convert", "serving"))
    arrows = {
        module: imports(path, found) & set(found) - {module}
        for module, path in found.items()
        if "_pb2" not in path.name
        # The public faces import lazily what imports nothing of theirs.
        and path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for target in arrows.get(module, ()):
                visit(target, [*way, module])
            done.add(module)

    for module in arrows:
        visit(module, [])


def test_a_folder_is_one_subject() -> None:
    folders: dict[Path, int] = {}
    for path in modules(("mixtral_jax", "convert", "serving", "benchmarks")).values():
        if path.name != "__init__.py" and "_pb2" not in path.name:
            folders[path.parent] = folders.get(path.parent, 0) + 1
    assert not {str(folder): n for folder, n in folders.items() if n > MOST_FILES}


def test_every_test_folder_is_a_package() -> None:
    """Without, pytest puts `tests/` on the path, and `tests/serving` hides `serving`."""
    for path in (ROOT / "tests").rglob("*.py"):
        if path.parent.name not in ("clients",):
            assert (path.parent / "__init__.py").exists(), path


@pytest.mark.parametrize("module", STARTS_WITHOUT_JAX)
def test_these_start_without_jax(module: str) -> None:
    """Also through others: what they import must not import it either."""
    code = f"import {module}, sys; print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
