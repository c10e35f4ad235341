"""The environment of the process that compiles."""

from mixtral_jax.planning.topology import environment
from mixtral_jax.roofline.chips import topologies


def test_the_compilers_environment_has_nothing_of_our_devices() -> None:
    (tpu,), (cpu,) = topologies("tpu:v5e:2x2"), topologies("cpu:4")
    given = {"PATH": "/bin", "XLA_FLAGS": "--odd", "JAX_PLATFORMS": "cuda", "TPU_NAME": "mine"}
    assert environment(cpu, given) == {
        "PATH": "/bin",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
    }
    assert environment(tpu, given).keys().isdisjoint({"XLA_FLAGS", "TPU_NAME"})
