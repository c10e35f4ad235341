"""The engine's flags, and what they come to: mesh, limits, programs and parameters.

With several hosts every process has the same flags, and so prepares the same.
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version

import jax
import jax.numpy as jnp

from mixtral_jax.cache import PAGE_SIZES, token_bytes
from mixtral_jax.checkpoint.pretrained import Pretrained
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.cpu import native
from mixtral_jax.model.transformer import Transformer, held_bytes
from mixtral_jax.sharding import ShardingRules, mesh_for, mesh_text
from mixtral_jax.step.buckets import Steps
from serving.engine.cache_memory import cache_bytes
from serving.engine.engine import compile_steps
from serving.scheduling.step_plan import Limits


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", help="float32, bfloat16 or int8; default: as stored")
    add(
        "--mesh",
        default="auto",
        metavar="SIZES",
        help="how devices share the model, such as data=1,expert=8,tensor=1; default: auto",
    )
    add(
        "--dp-attention",
        action="store_true",
        help="split sequences, not heads, over the mesh's expert axis",
    )
    add("--max-sequences", type=_positive, default=32, help="sequences per step")
    add("--max-step-tokens", type=_positive, default=128, help="tokens per step")
    add("--max-waiting", type=_positive, default=256, help="requests in the queue")
    add(
        "--kv-memory",
        type=_positive,
        help="MiB of keys and values on each device; default: most of what the weights leave of an "
        "accelerator, half of what they leave of a CPU's memory and at most 2048",
    )
    add(
        "--kv-dtype",
        choices=["int8"],
        help="int8: keys and values take a quarter of float32's memory, half of bfloat16's; "
        "default: as they are computed",
    )
    add("--no-prefix-reuse", action="store_true", help="compute every prompt from its beginning")
    add("--deterministic", action="store_true", help="equal answers whatever runs beside them")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def facts(options: argparse.Namespace, pretrained: Pretrained) -> dict[str, str]:
    """What must be the same in all processes of a group, by the name that a user knows it by."""
    card = pretrained.card
    flags = ("mesh", "dp_attention", "max_sequences", "max_step_tokens", "max_waiting", "kv_dtype")
    switches = ("no_prefix_reuse", "deterministic")
    return {
        "mixtral-jax": version("mixtral-jax"),
        "jax": jax.__version__,
        "the model": card.name,
        "the model's config": hashlib.sha256(repr(card.model).encode()).hexdigest()[:16],
        "--dtype": pretrained.loadable_dtype(options.dtype),
        **{
            f"--{name.replace('_', '-')}": str(given)
            for name in flags + switches
            if (given := getattr(options, name)) is not None
        },
    }


@dataclass(frozen=True)
class Prepared:
    """What an engine, or a runner, is made of."""

    model: Transformer
    limits: Limits  # of one part of the sequences
    steps: Steps
    mesh: str | None  # as `mesh_text` writes it


def prepare(
    options: argparse.Namespace,
    pretrained: Pretrained,
    say: Callable[[str], None],
    agree: Callable[[Limits], Limits] = lambda limits: limits,
) -> Prepared:
    """Loads and compiles, and says what it does. Raises ValueError for what cannot be.

    With several hosts `agree` turns what this process has room for into what all have.
    """
    config = pretrained.card.model
    dtype = pretrained.loadable_dtype(options.dtype)
    platform = jax.default_backend()
    mesh = mesh_for(config, options.mesh, options.dp_attention)
    if jax.process_count() > 1 and (mesh is None or mesh.size != jax.device_count()):
        raise ValueError(
            f"the mesh has {1 if mesh is None else mesh.size} devices; with several processes it "
            f"must have all {jax.device_count()} of them"
        )
    if options.deterministic:
        _check_deterministic(dtype, config, is_split=mesh is not None)
    if options.kv_dtype and platform == "tpu":
        raise ValueError("--kv-dtype int8 is for CPU and GPU: on TPU it takes more room, not less")
    # Between weights of int8, CPU computes in float32 and accelerators in bfloat16.
    activations = jnp.bfloat16 if dtype == "int8" and platform != "cpu" else None
    rules = None if mesh is None else ShardingRules.of(config, mesh, options.dp_attention)
    abstract = Transformer(
        config, dtype=dtype, activations=activations, rngs=None, mesh=mesh, rules=rules
    )
    limits = agree(_limits(abstract, options))
    if mesh is not None:
        say(f"{mesh.size} devices: {mesh_text(mesh)}")
    # Reading the weights and compiling for their shapes do not wait for one another.
    with ThreadPoolExecutor(1) as pool:
        say(f"loading {options.model}")
        model = pool.submit(pretrained.load, mesh, dtype, rules, activations)
        parts = 1 if abstract.layout is None else abstract.layout.parts
        tokens = parts * limits.num_pages * limits.page_size
        say(f"room for {tokens:,} tokens of all requests together")
        steps = compile_steps(abstract, limits, say, options.kv_dtype)
        named = None if mesh is None else mesh_text(mesh)
        return Prepared(model.result(), limits, steps, named)


def _check_deterministic(dtype: str, config: ModelConfig, is_split: bool) -> None:
    """Raises ValueError where equal bits are not promised."""
    if is_split:
        raise ValueError("--deterministic is promised on one device; leave out the flag or --mesh")
    if jax.default_backend() != "cpu" or dtype not in ("float32", "int8"):
        raise ValueError(
            f"--deterministic is promised on CPU for float32 and int8; this is {dtype} on "
            f"{jax.default_backend()}: leave the flag out, or give --dtype float32"
        )
    if config.head_size % native.LANES:
        raise ValueError(
            f"--deterministic needs heads of a multiple of {native.LANES} values; this model's "
            f"have {config.head_size}: leave the flag out"
        )
    if not native.available():
        raise ValueError(
            "--deterministic needs the CPU kernels, which were not built; install a C++ compiler"
        )


def _limits(model: Transformer, options: argparse.Namespace) -> Limits:
    """Of one part of the sequences; the flags are those of all parts together."""
    config, layout = model.config, model.layout
    parts, heads = 1, 1
    if layout is not None:
        parts, heads = layout.parts, layout.rules.ways("K", layout.mesh)
    per_token = token_bytes(config, options.kv_dtype or model.dtype) // heads
    max_sequences = -(-options.max_sequences // parts)
    if options.kv_memory is not None:
        memory = options.kv_memory << 20
    else:
        memory = cache_bytes(held_bytes(model))
    page_size = PAGE_SIZES["cpu" if layout is None else layout.platform]
    num_pages = max(1, min(max_sequences * config.max_context, memory // per_token) // page_size)
    limits = Limits(
        num_pages=num_pages,
        page_size=page_size,
        max_sequences=max_sequences,
        max_step_tokens=max(-(-options.max_step_tokens // parts), max_sequences),
        max_context=config.max_context,
        max_waiting=-(-options.max_waiting // parts),
        window=config.sliding_window,
        prefix_reuse=not options.no_prefix_reuse,
        deterministic=options.deterministic,
    )
    return dataclasses.replace(limits, max_context=limits.room)
