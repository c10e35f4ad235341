"""GPU memory: the share of it that JAX takes at its start."""

from collections.abc import MutableMapping

# The rest is for CUDA, NCCL and cuBLAS. JAX's own default is three quarters.
_SHARE = "0.95"
# The variable of JAX, and the one of older versions, of which JAX takes one alone.
_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def take_gpu_memory(environment: MutableMapping[str, str]) -> None:
    """Lets JAX take nearly all of a GPU's memory, where the environment does not say how much.

    To be called before JAX looks for devices. It changes nothing on CPU and TPU.
    """
    if not any(environment.get(name) for name in _VARIABLES):
        environment[_VARIABLES[0]] = _SHARE
