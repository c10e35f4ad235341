"""README and docs/ say only what is there: commands, flags, files, links, code; and all that is."""

import ast
import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import mixtral_jax
import serving.client
from mixtral_jax.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "deploy/README.md", *PAGES]
}
EVERYTHING = "\n".join(TEXTS.values())
MODULES = ("serving", "serving.gateway")
# Flags of other programs that the pages mention.
FOREIGN_FLAGS = {
    "--logdir",
    "--wheels",
    "--install",
    "--size-gb",
    "--repeats",
    "--processes",
    "--streams",
    "--step-ms",
    "--build-arg",
    "--python",
    "--only",  # benchmarks.engine
    "--random",  # benchmarks.device
    "--kept",  # benchmarks.rounding
    *("--parts", "--print"),  # benchmarks.cpu_kernels
    *("--our", "--peers"),  # benchmarks.peers
    "--layout",  # benchmarks.convert_memory
    "--layers",  # benchmarks.rounding.layers
    *("--draft", "--experts", "--noise", "--kinds", "--answers"),  # benchmarks.speculation
}
# Flags of the tools that one page is about.
FOREIGN_FLAGS_OF = {
    "docs/serve.md": {"--tasks", "--batch"},  # lm_eval
    "docs/devices.md": {"--long-prefill-token-threshold", "--chunked-prefill-size"},
    "docs/clients.md": {
        *("--backend", "--constraint", "--data", "--profile"),  # guidellm
        *("--endpoint-type", "--streaming", "--tokenizer", "--url"),  # aiperf
        *("--base-url", "--dataset-name", "--endpoint"),  # vllm bench serve
    },
}


def fences(text: str) -> Iterator[tuple[str, str]]:
    """Yields the language and the lines of each block of code."""
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield match.group(1), match.group(2)


@functools.cache
def flags_of_the_command() -> dict[str, set[str]]:
    """Maps each command of `mixtral-jax`, such as `keys add`, to its flags."""

    def walk(command: typer.core.TyperCommand, name: str) -> Iterator[tuple[str, set[str]]]:
        if children := getattr(command, "commands", None):
            for child, below in children.items():
                yield from walk(below, f"{name} {child}".strip())
            return
        options = (option for parameter in command.params for option in parameter.opts)
        yield name, {option for option in options if option.startswith("--")}

    return dict(walk(typer.main.get_command(app), ""))  # type: ignore[arg-type]


@functools.cache
def flags_of_module(module: str) -> set[str]:
    """Asks `python -m MODULE --help` for its flags."""
    wide = {**os.environ, "COLUMNS": "300", "TERM": "dumb"}
    call = [sys.executable, "-m", module, "--help"]
    out = subprocess.run(call, capture_output=True, text=True, check=True, env=wide).stdout
    return set(re.findall(r"--[a-z][a-z-]+", out)) - {"--help"}


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_every_command_is_in_the_readme_and_has_a_page() -> None:
    pages = "\n".join(text for name, text in TEXTS.items() if name != "README.md")
    for command in flags_of_the_command():
        group = command.split()[0]
        assert f"mixtral-jax {group}" in TEXTS["README.md"], command
        assert re.search(rf"mixtral-jax {group}\b|`{group}`", pages), command
    for module in MODULES:
        assert f"python -m {module}" in pages


def test_every_flag_of_the_servers_is_documented() -> None:
    flags = set().union(*map(flags_of_module, MODULES)) | flags_of_the_command()["serve"]
    assert len(flags) > 40
    missing = {flag for flag in flags if not re.search(rf"{flag}(?![\w-])", EVERYTHING)}
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_every_flag_that_is_mentioned_exists(name: str) -> None:
    known = {"--version"}.union(*map(flags_of_module, MODULES), *flags_of_the_command().values())
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXTS[name]))
    assert not mentioned - known - FOREIGN_FLAGS - FOREIGN_FLAGS_OF.get(name, set())


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_line_is_one_that_runs(name: str) -> None:
    """Holds each line `mixtral-jax ...` in a block against that command's own flags."""
    for language, block in fences(TEXTS[name]):
        if language in ("python", "text", "toml"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"\s#.*", "", line).split()
            if "mixtral-jax" not in words:
                continue
            words = words[words.index("mixtral-jax") + 1 :]
            commands = flags_of_the_command()
            command = words[0] if words[0] in commands else " ".join(words[:2])
            assert command in commands, line
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert flags <= commands[command], line


@pytest.mark.parametrize("name", TEXTS)
def test_every_target_and_module_that_is_mentioned_exists(name: str) -> None:
    text = TEXTS[name]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)(?:[A-Z]+=\S+ )*make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for module in re.findall(r"python -m ([a-z_.]+)", text):
        assert importlib.util.find_spec(module), f"python -m {module}"
    paths = r"`((?:mixtral_jax|convert|serving|tests|benchmarks|deploy|docs|notebooks)/[\w./-]*)`"
    for path in re.findall(paths, text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", TEXTS)
def test_every_variable_that_is_mentioned_is_read(name: str) -> None:
    code = [*ROOT.glob("mixtral_jax/**/*.py"), *ROOT.glob("serving/**/*.py")]
    code += [ROOT / "tests/conftest.py"]
    read = "\n".join(path.read_text(encoding="utf-8") for path in code)
    for variable in set(re.findall(r"MIXTRAL_JAX_[A-Z_]+", TEXTS[name])):
        assert f'"{variable}"' in read, variable


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_has_a_target(name: str) -> None:
    """Follows links to files and to headings; `make docs` does the same within docs/."""
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
            assert anchor in anchors, target


@pytest.mark.parametrize("name", TEXTS)
def test_every_block_of_python_imports_what_is_there(name: str) -> None:
    for language, block in fences(TEXTS[name]):
        if language != "python" or "--8<--" in block:
            continue
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), block
            is_ours = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if is_ours and node.value.id == "mixtral_jax":
                assert hasattr(mixtral_jax, node.attr), node.attr


def test_the_library_page_has_every_public_name() -> None:
    entries = set(re.findall(r"^::: ([\w.]+)$", TEXTS["docs/library.md"], re.MULTILINE))
    public = {f"mixtral_jax.{name}" for name in mixtral_jax.__all__ if name != "__version__"}
    assert public <= entries
    assert {f"serving.client.{name}" for name in serving.client.__all__} <= entries


def test_every_page_is_in_the_navigation_and_on_the_front_page() -> None:
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    listed = [page for entry in config["project"]["nav"] for page in entry.values()]
    assert sorted(listed) == [path.name for path in PAGES]
    links = set(re.findall(r"\]\(([\w-]+\.md)\)", TEXTS["docs/index.md"]))
    assert links == set(listed) - {"index.md"}


def test_the_tree_has_every_folder() -> None:
    """Compares the folders of the three packages with the tree in docs/architecture.md."""
    (tree,) = (block for _, block in fences(TEXTS["docs/architecture.md"]) if "kernels/" in block)
    drawn, parents = set(), list[str]()
    for line in tree.splitlines():
        match = re.match(r"( *)([\w/]+)/ ", f"{line} ")
        assert match, line
        depth = len(match.group(1)) // 2
        parents[depth:] = [match.group(2)]
        drawn.add("/".join(parents))
    packages = {
        folder.relative_to(ROOT).as_posix()
        for package in ("mixtral_jax", "convert", "serving")
        for folder in [ROOT / package, *(ROOT / package).rglob("*")]
        if folder.is_dir() and list(folder.glob("*.py"))
    }
    assert packages == {path for path in drawn if path.split("/")[0] in packages}
