"""Proves an installed wheel, in an environment and a folder where nothing else of ours is.

`make smoke` runs it there: `python smoke.py`. It needs the base install alone, and holds that a
command without its extra says which one to install.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

PROMPT = "Once upon a time"
DATA = {
    "mixtral_jax": ["py.typed", "kernels/cpu/*.cc", "kernels/cpu/*.h", "kernels/cpu/kernels.so"],
    "convert.quantize": ["calibration.txt"],
    "serving": ["proto/*.proto", "proto/*.pyi", "gateway/page/index.html", "gateway/page/*.js"],
}


def check_installed_outside_the_repository() -> None:
    """Holds that the package comes from this environment, with its licence and its data."""
    import mixtral_jax

    home = Path(mixtral_jax.__file__ or "").resolve()
    assert home.is_relative_to(Path(sys.prefix).resolve()), home
    about = metadata.metadata("mixtral-jax")
    assert mixtral_jax.__version__ == about["Version"]
    assert about["License-Expression"] == "Apache-2.0"
    files = metadata.files("mixtral-jax") or []
    assert any(file.name == "LICENSE" for file in files)
    for package, patterns in DATA.items():
        root = Path(str(resources.files(package)))
        for pattern in patterns:
            assert list(root.glob(pattern)), f"{package}/{pattern} is not in the wheel"


def check_the_library() -> None:
    """Generates with the toy, which is repeatable when greedy, and takes logits of its tokens."""
    import jax

    import mixtral_jax

    model, tokenizer = mixtral_jax.load("tiny-random")
    texts = [
        "".join(mixtral_jax.generate(model, tokenizer, PROMPT, max_tokens=8, temperature=0))
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    ids = tokenizer.encode(PROMPT)
    logits = model(jax.numpy.array([ids]))
    assert logits.shape == (1, len(ids), model.config.vocab_size)
    print(f"generated {texts[0]!r} with jax {jax.__version__}")


def command(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs the installed `mixtral-jax`."""
    path = Path(sys.executable).with_name("mixtral-jax")
    given = {**os.environ, **environment}
    return subprocess.run(
        [path, *arguments], capture_output=True, text=True, timeout=300, env=given
    )


def check_the_kernels() -> None:
    """Holds that the wheel's kernels run without a compiler, and that XLA does without them."""
    import mixtral_jax
    from mixtral_jax.kernels.cpu import build

    assert not any(map(shutil.which, ("c++", "g++", "clang++", "cc"))), "a compiler is in PATH"
    form = build.form()
    assert form is not None, "the wheel's library is not used"
    first, line = command("--version").stdout.splitlines()
    assert first == f"mixtral-jax {mixtral_jax.__version__}"
    assert line == f"kernels for CPU: {form.name} (built in)", line
    least = {"x86_64": "portable", "aarch64": "neon"}[os.uname().machine]
    assert f" {least} (built in)" in command("--version", MIXTRAL_JAX_ISA=least).stdout
    wrong = command("--version", MIXTRAL_JAX_ISA="mmx")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1, wrong
    assert "MIXTRAL_JAX_ISA=mmx" in wrong.stderr and form.name in wrong.stderr, wrong

    away = build.SHIPPED.with_name("away.so")
    build.SHIPPED.rename(away)
    try:
        assert "xla (no C++ compiler)" in command("--version").stdout
        code = "from mixtral_jax.kernels import kernels_for; print(kernels_for('cpu').isa)"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert out.stdout == "xla\n", out
        assert out.stderr.count("\n") == 1 and "no C++ compiler was found" in out.stderr, out
    finally:
        away.rename(build.SHIPPED)
    print(f"kernels: {form.name}")


def check_the_command() -> None:
    """Asks the command for its help, and for what the base install cannot do."""
    out = command("--help")
    assert out.returncode == 0 and "serve" in out.stdout, out
    assert command("info", "tiny-random", "--json").returncode == 0
    for module, extra, arguments in [
        ("grpc", "serve", ["serve", "--model", "tiny-random"]),
        ("gguf", "convert", ["convert", "source", "destination"]),
        ("httpx", "bench", ["bench", "tiny-random"]),
    ]:
        assert importlib.util.find_spec(module) is None, f"{module} is in the base install"
        out = command(*arguments)
        assert out.returncode == 1, out
        assert out.stderr.count("\n") == 1 and f"'mixtral-jax[{extra}]'" in out.stderr, out.stderr


if __name__ == "__main__":
    check_installed_outside_the_repository()
    check_the_kernels()
    check_the_library()
    check_the_command()
    print(f"ok on Python {sys.version.split()[0]}")
