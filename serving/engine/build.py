"""From an EngineConfig to a loaded model, its limits and its compiled programs.

In a group of processes all have the same config, and so prepare the same.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mixtral_jax.cache import PAGE_SIZES, token_bytes
from mixtral_jax.checkpoint.pretrained import Pretrained
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError, TopologyError
from mixtral_jax.kernels.cpu import native
from mixtral_jax.model.transformer import Transformer, held_bytes
from mixtral_jax.sharding import ShardingRules, mesh_for, mesh_text
from mixtral_jax.step.buckets import Steps
from serving.engine.cache_memory import cache_bytes
from serving.engine.config import EngineConfig
from serving.engine.engine import compile_steps
from serving.scheduling.step_plan import Limits

# Each process may have the checkpoint elsewhere, and its own memory.
_OF_ONE_PROCESS = {"model", "kv_memory"}


def facts(config: EngineConfig, pretrained: Pretrained) -> dict[str, str]:
    """Returns what must be the same in all processes of a group, by the name that users know."""
    card = pretrained.card
    values = dataclasses.asdict(config)
    values["dtype"] = pretrained.loadable_dtype(config.dtype)
    values["no_prefix_reuse"] = not values.pop("prefix_reuse")
    return {
        "mixtral-jax": version("mixtral-jax"),
        "jax": jax.__version__,
        "the model": card.name,
        "the model's config": hashlib.sha256(repr(card.model).encode()).hexdigest()[:16],
        **{
            f"--{name.replace('_', '-')}": str(value)
            for name, value in values.items()
            if name not in _OF_ONE_PROCESS and value is not None
        },
    }


@dataclass(frozen=True)
class Prepared:
    """A loaded model and its compiled programs, of which an engine or a runner is made."""

    model: Transformer
    limits: Limits
    """Limits of one partition of the sequences."""
    steps: Steps
    mesh: str | None
    """The mesh as `mesh_text` writes it; None on one device."""


class _Placement(NamedTuple):
    """Where the model stands: its mesh and what follows from the kind of device."""

    mesh: jax.sharding.Mesh | None
    rules: ShardingRules | None
    activations: DTypeLike | None
    page_size: int


def prepare(
    config: EngineConfig,
    pretrained: Pretrained,
    say: Callable[[str], None],
    agree: Callable[[Limits], Limits] = lambda limits: limits,
) -> Prepared:
    """Loads the model and compiles its programs.

    Args:
        config: What the operator asked for.
        pretrained: The checkpoint.
        say: Called with a line for each stage.
        agree: In a group of processes, turns the limits that this process has room for into those
            that all have room for.

    Raises UserError if the model cannot be run so.
    """
    dtype = pretrained.loadable_dtype(config.dtype)
    mesh, rules, activations, page_size = _placement(config, pretrained.card.model, dtype)
    abstract = Transformer(
        pretrained.card.model,
        dtype=dtype,
        activations=activations,
        rngs=None,
        mesh=mesh,
        rules=rules,
    )
    limits = agree(_limits(abstract, config, page_size))
    if mesh is not None:
        say(f"{mesh.size} devices: {mesh_text(mesh)}")
    # Reading the weights and compiling for their shapes do not wait for one another.
    with ThreadPoolExecutor(1) as pool:
        say(f"loading {config.model}")
        model = pool.submit(pretrained.load, mesh, dtype, rules, activations)
        parts = 1 if abstract.layout is None else abstract.layout.parts
        tokens = parts * limits.num_pages * limits.page_size
        say(f"room for {tokens:,} tokens of all requests together")
        steps = compile_steps(abstract, limits, say, config.kv_dtype)
        text = None if mesh is None else mesh_text(mesh)
        return Prepared(model.result(), limits, steps, text)


def _placement(config: EngineConfig, model: ModelConfig, dtype: str) -> _Placement:
    """Decides everything that depends on the devices. Raises UserError if they cannot be used."""
    platform = jax.default_backend()
    mesh = mesh_for(model, config.mesh, config.dp_attention)
    if jax.process_count() > 1 and (mesh is None or mesh.size != jax.device_count()):
        raise TopologyError(
            f"the mesh has {1 if mesh is None else mesh.size} devices; with several processes it "
            f"must have all {jax.device_count()} of them"
        )
    if config.deterministic:
        _check_deterministic(dtype, model, is_split=mesh is not None)
    if config.kv_dtype and platform == "tpu":
        raise ConfigError("--kv-dtype int8 is for CPU and GPU: on TPU it takes more room, not less")
    # Between weights of int8, CPU computes in float32 and accelerators in bfloat16.
    activations = jnp.bfloat16 if dtype == "int8" and platform != "cpu" else None
    rules = None if mesh is None else ShardingRules.of(model, mesh, config.dp_attention)
    # Without a mesh the kernels are those of CPU.
    page_size = PAGE_SIZES["cpu" if mesh is None else platform]
    return _Placement(mesh, rules, activations, page_size)


def _check_deterministic(dtype: str, config: ModelConfig, is_split: bool) -> None:
    """Raises ConfigError if equal bits are not promised for this model on these devices."""
    if is_split:
        raise ConfigError("--deterministic is promised on one device; leave out the flag or --mesh")
    if jax.default_backend() != "cpu" or dtype not in ("float32", "int8"):
        raise ConfigError(
            f"--deterministic is promised on CPU for float32 and int8; this is {dtype} on "
            f"{jax.default_backend()}: leave the flag out, or give --dtype float32"
        )
    if config.head_size % native.LANES:
        raise ConfigError(
            f"--deterministic needs heads of a multiple of {native.LANES} values; this model's "
            f"have {config.head_size}: leave the flag out"
        )
    if not native.available():
        raise ConfigError(
            "--deterministic needs the CPU kernels, which were not built; install a C++ compiler"
        )


def _limits(model: Transformer, config: EngineConfig, page_size: int) -> Limits:
    """Returns the limits of one partition of the sequences; `config` has those of all together."""
    layout = model.layout
    parts, heads = 1, 1
    if layout is not None:
        parts, heads = layout.parts, layout.rules.ways("K", layout.mesh)
    per_token = token_bytes(model.config, config.kv_dtype or model.dtype) // heads
    max_sequences = -(-config.max_sequences // parts)
    if config.kv_memory is not None:
        memory = config.kv_memory << 20
    else:
        memory = cache_bytes(held_bytes(model))
    max_context = model.config.max_context
    num_pages = max(1, min(max_sequences * max_context, memory // per_token) // page_size)
    limits = Limits(
        num_pages=num_pages,
        page_size=page_size,
        max_sequences=max_sequences,
        max_step_tokens=max(-(-config.max_step_tokens // parts), max_sequences),
        max_context=max_context,
        max_waiting=-(-config.max_waiting // parts),
        window=model.config.sliding_window,
        prefix_reuse=config.prefix_reuse,
        deterministic=config.deterministic,
    )
    return dataclasses.replace(limits, max_context=limits.room)
