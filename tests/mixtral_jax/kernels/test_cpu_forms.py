"""Each form of the CPU kernels: chosen by what a machine has, apart from the others, and right."""

import bisect
import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.errors import ConfigError
from mixtral_jax.kernels.cpu import build, prebuilt
from mixtral_jax.kernels.cpu.forms import FORMS, Form, choose, forms_of, supported

HERE = Path(__file__).parent
MACHINE = "x86_64" if forms_of()[0].name == FORMS["x86_64"][0].name else "aarch64"
LAPTOP = ["v3", "avxvnni"]  # a processor without AVX-512
SERVER = ["v3", "v4", "avx512vnni"]


def names(forms: list[Form]) -> list[str]:
    return [form.name for form in forms]


def test_the_best_form_of_a_machine_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXTRAL_JAX_ISA", raising=False)
    assert names(choose([], "x86_64")) == ["portable"]
    assert names(choose(["v3"], "AMD64")) == ["avx2", "portable"]
    assert names(choose(LAPTOP, "x86_64")) == ["avxvnni", "avx2", "portable"]
    assert names(choose(SERVER, "x86_64"))[:2] == ["avx512vnni", "avx512vnni256"]
    assert names(choose([*SERVER, "avx512bf16"], "x86_64"))[0] == "avx512bf16"
    assert names(choose(["dotprod"], "aarch64")) == ["dotprod", "neon"]
    assert names(choose(["dotprod", "i8mm"], "arm64"))[0] == "i8mm"
    assert names(choose([], "riscv64")) == ["portable"]


def test_a_form_is_forced_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_JAX_ISA", "avx2")
    assert names(choose(SERVER, "x86_64")) == ["avx2"]
    with pytest.raises(ConfigError, match="avx2 needs .* more than this .*runs portable$"):
        choose([], "x86_64")
    with pytest.raises(ConfigError, match="avx2 is no instruction set.*runs dotprod, neon$"):
        choose(["dotprod"], "aarch64")


def test_every_symbol_of_a_form_is_made_local() -> None:
    """By hand: a merged section loses its group; an undefined weak symbol must stay one."""
    assembly = """\
\t.section\t.text._ZSt3maxv,"axG",@progbits,_ZSt3maxv,comdat
\t.weak\t_ZSt3maxv   # -- Begin function
_ZSt3maxv:
\t.section\t.rodata.x,"aMSG",@progbits,1,x,comdat
\t.globl\tmixtral_jax_norm_avx2
mixtral_jax_norm_avx2:
\t.weak\telsewhere
"""
    assert (
        prebuilt.localized(assembly, r"mixtral_jax_\w+_avx2")
        == """\
\t.section\t.text._ZSt3maxv,"ax",@progbits
_ZSt3maxv:
\t.section\t.rodata.x,"aMS",@progbits,1
\t.globl\tmixtral_jax_norm_avx2
mixtral_jax_norm_avx2:
\t.weak\telsewhere
"""
    )


# ---- The library of a wheel --------------------------------------------------------------------

needs_zig = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None or not sys.platform.startswith("linux"),
    reason="the compiler of wheels is not installed",
)


@pytest.fixture(scope="module")
def shipped() -> Path:
    return prebuilt.build(f"{MACHINE}-linux")


@pytest.fixture(scope="module")
def features(shipped: Path) -> list[str]:
    return build.features_of(ctypes.CDLL(str(shipped)))


def places(library: Path) -> list[tuple[int, str]]:
    """Address and form of each function, in order; the form of shared ones is empty."""
    # In the order of the table, local symbols stand behind the name of their file.
    table = subprocess.run(["nm", "-ap", library], capture_output=True, text=True, check=True)
    forms = {form.name for form in forms_of(MACHINE)}
    file, found = "", []
    for line in table.stdout.splitlines():
        *address, kind, name = line.split(maxsplit=2)
        if kind == "a":
            file = name
        if kind in "tT":
            form = file if kind == "t" else name.rpartition("_")[2]
            found.append((int(address[0], 16), form if form in forms else ""))
    return sorted(found)


@needs_zig
@pytest.mark.slow  # the whole library is compiled
@pytest.mark.skipif(MACHINE != "x86_64", reason="registers of another processor")
def test_no_form_has_code_of_another(shipped: Path) -> None:
    """Wide registers are in wide forms only, and no call leads from one form into another."""
    library = prebuilt.with_symbols(shipped)
    starts, forms = zip(*places(library), strict=True)
    assert {form.name for form in forms_of(MACHINE)} < set(forms)

    def form_at(address: int) -> str:
        return forms[bisect.bisect_right(starts, address) - 1]

    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    )
    wide, calls = set(), 0
    for line in code.stdout.splitlines():
        found = re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line)
        if found is None:
            continue
        form = form_at(int(found[1], 16))
        if "%zmm" in found[3]:
            wide.add(form)
        assert "%ymm" not in found[3] or form not in ("", "portable"), line
        target = re.match(r"([0-9a-f]+) <", found[3])
        if form and target and found[2].startswith(("call", "j")):
            calls += 1
            assert form_at(int(target[1], 16)) in (form, ""), line
    assert wide == {"avx512bf16", "avx512vnni"}
    assert calls > 10_000


@pytest.fixture(scope="module")
def registered(shipped: Path, features: list[str]) -> Iterator[list[str]]:
    """The names of the forms that run here; FORM_linear is a target of jax.ffi for each."""
    library = ctypes.CDLL(str(shipped))
    forms = names(supported(features))
    for form in forms:
        for name in ("linear", "grouped"):
            handler = jax.ffi.pycapsule(getattr(library, f"mixtral_jax_{name}_{form}"))
            jax.ffi.register_ffi_target(f"{form}_{name}", handler, "cpu")
    return forms


@needs_zig
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 31, 33, 130])
def test_int8_products_have_the_bits_of_the_least_form(registered: list[str], rows: int) -> None:
    """Depths of a part of a register and of several panels; outputs that fill none."""
    for outs, n in [(1, 1), (5, 16), (70, 131), (33, 576), (20, 4100)]:
        dice = np.random.default_rng(rows * n)
        x = dice.normal(size=(rows, n)).astype(np.float32)
        w = dice.integers(-128, 128, (outs, n)).astype(np.int8)
        scale = dice.random(outs, np.float32)
        sizes = np.array([rows // 3, 0, rows - rows // 3], np.int32)
        three = [np.stack([a, a[::-1], -a]) for a in (w, scale)]
        shape = jax.ShapeDtypeStruct((rows, outs), jnp.float32)
        results = {
            form: (
                jax.ffi.ffi_call(f"{form}_linear", [shape])(x, w, scale)[0],
                jax.ffi.ffi_call(f"{form}_grouped", shape)(x, sizes, *three),
            )
            for form in registered
        }
        least = results[registered[-1]]
        for form, got in results.items():
            for a, b in zip(got, least, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{form}: {outs} x {n}")


@needs_zig
@pytest.mark.soak  # a minute for each form; the driver of test_cpu_build.py compares them in CI
def test_every_form_passes_the_tests_of_the_kernels(
    shipped: Path, features: list[str], tmp_path: Path
) -> None:
    """The tests of test_cpu.py with each form that runs here, from the wheel's library."""
    (tmp_path / "as_installed.py").write_text(
        "import pathlib\ndef pytest_configure(config):\n"
        "    from mixtral_jax.kernels.cpu import build\n"
        f"    build.SHIPPED = pathlib.Path({str(shipped)!r})\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "as_installed"]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for form in supported(features):
        done = subprocess.run(
            [*command, str(HERE / "test_cpu.py")],
            capture_output=True,
            text=True,
            env={**given, "MIXTRAL_JAX_ISA": form.name, "CXX": "no-compiler"},
        )
        assert done.returncode == 0, f"{form.name}\n{done.stdout[-4000:]}"
