"""Every kernel of the device beside XLA's form on the same device, at the shapes of Mistral-7B."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mixtral_jax.cache import RaggedBatch
from mixtral_jax.kernels import Kernels, kernels_for
from mixtral_jax.weight import Weight

_HEADS, _KV_HEADS, _HEAD_SIZE = 32, 8, 128
_WIDTH, _INNER, _EXPERTS = 1024, 2048, 8
# Largest difference over the oracle's largest value, for sums of bfloat16, which has 8 bits.
_LIMIT = 0.02


@dataclass(frozen=True)
class Parity:
    """One kernel beside its oracle.

    Attributes:
        name: of the function and its case.
        error: the largest difference over the oracle's largest value; NaN where it failed.
        note: the error that it raised, or nothing.
    """

    name: str
    error: float
    note: str = ""

    @property
    def holds(self) -> bool:
        """True if the kernel computes what its oracle does."""
        return self.error <= _LIMIT


def kernel_parities(kernels: Kernels) -> Iterator[Parity]:
    """Compares every function of a record with XLA's form, which rounds rows as the record does."""
    oracle = kernels_for("xla", multiplies_fp8=kernels.multiplies_fp8)
    # Kernels for CPU are of float32, those of accelerators of bfloat16.
    kind = jnp.float32 if kernels.platform == "cpu" else jnp.bfloat16
    cases = _Cases(kind, kernels.page_size)
    for name, function, given in chain(cases.products(), cases.others(), cases.attention()):
        try:
            got = jax.jit(lambda *x, f=function: f(kernels, *x))(*given)
            with jax.default_matmul_precision("highest"):
                want = jax.jit(lambda *x, f=function: f(oracle, *x))(*given)
            yield Parity(name, _error(got, want))
        except Exception as error:  # one kernel that a device refuses must not hide the others
            yield Parity(name, float("nan"), str(error).partition("\n")[0][:160])


def _error(got: Any, want: Any) -> float:
    errors = []
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(array.astype(jnp.float32)) for array in (ours, theirs))
        errors.append(float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-9)))
    return max(errors)


_Case = tuple[str, Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True)
class _Cases:
    """Cases of every function; `kind` is the dtype of activations, a page holds `page` tokens."""

    kind: DTypeLike
    page: int

    def normal(self, seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(self.kind)

    def weight(self, seed: int, dtype: str, *shape: int) -> Weight:
        values = self.normal(seed, *shape)
        if dtype == "float":
            return Weight(values, None)
        return Weight.quantized(values.astype(jnp.float32), dtype)

    def products(self) -> Iterator[_Case]:
        """Products of dense weights, and of experts: two rows of two, and many rows of all."""
        for dtype in ("float", "int8", "fp8", "int4"):
            dense = self.weight(1, dtype, _INNER, _WIDTH)
            for rows in (1, 32, 256):
                x = self.normal(0, rows, _WIDTH)
                yield f"linear {dtype} {rows} rows", lambda k, x, w: k.linear(x, [w]), (x, dense)
            experts = self.weight(2, dtype, _EXPERTS, _INNER, _WIDTH)
            for sizes in ([0, 1, 0, 0, 1, 0, 0, 0], [40, 0, 100, 3, 200, 60, 97, 12]):
                x = self.normal(3, sum(sizes), _WIDTH)
                given = (x, jnp.asarray(sizes, jnp.int32), experts)
                name = f"grouped {dtype} {sum(sizes)} rows"
                yield name, lambda k, x, s, w: k.grouped(x, s, w), given
        group = jnp.asarray(np.random.default_rng(0).integers(-1, 4, 64), jnp.int32)
        lows = (self.normal(8, 4, 16, _WIDTH), self.normal(9, 4, 16, _INNER))
        yield (
            "add_low_rank",
            lambda k, y, x, g, a, b: k.add_low_rank([y], x, g, [(a, b)]),
            (self.normal(10, 64, _INNER), self.normal(4, 64, _WIDTH), group, *lows),
        )

    def others(self) -> Iterator[_Case]:
        """The norm and the activation."""
        x, scale = self.normal(4, 64, _WIDTH), self.normal(5, _WIDTH)
        yield "norm", lambda k, x, s: k.norm(x, s, 1e-5), (x, scale)
        gate, up = self.normal(6, 64, _INNER), self.normal(7, 64, _INNER)
        yield "swiglu", lambda k, gate, up: k.swiglu(gate, up), (gate, up)

    def attention(self) -> Iterator[_Case]:
        """Decodes and prompts over pages of each dtype, and whole rows, with and without window."""
        old, new = _batch(_LENGTHS, _LENGTHS, self.page), _batch(_LENGTHS, _NEW, self.page)
        given: list[Any] = [old, *self.heads(old, 14), new, *self.heads(new, 17)]
        for dtype in (self.kind, jnp.int8, jnp.float8_e4m3fn):
            for window in (None, 200):
                function = partial(_attended, dtype, window, self.page)
                yield f"attend {jnp.dtype(dtype).name}, window {window}", function, tuple(given)
        rows = [self.normal(11, 2, 256, _HEADS, _HEAD_SIZE)]
        rows += [self.normal(seed, 2, 256, _KV_HEADS, _HEAD_SIZE) for seed in (12, 13)]
        for window in (None, 100):

            def whole(kernels: Any, *given: Any, w: int | None = window) -> Any:
                return kernels.full_attention(*given, w, None, None)

            yield f"full_attention, window {window}", whole, tuple(rows)

    def heads(self, batch: RaggedBatch, seed: int) -> list[jax.Array]:
        """Queries, keys and values of a batch's tokens."""
        tokens = int(batch.tokens.shape[0])
        heads = (_HEADS, _KV_HEADS, _KV_HEADS)
        return [self.normal(seed + i, tokens, n, _HEAD_SIZE) for i, n in enumerate(heads)]


def _attended(
    dtype: DTypeLike, window: int | None, page: int, kernels: Any, *given: Any
) -> jax.Array:
    """Fills pages of the kernels' own form by a step of whole sequences; returns one behind it."""
    form = kernels.page_form(page, _KV_HEADS, _HEAD_SIZE, dtype)
    pages = jnp.zeros((given[0].page_table.size, *form.shape), form.dtype)
    for batch, *heads in (given[:4], given[4:]):
        mixed, pages = kernels.attend(*heads, pages, batch, window)
    attended: jax.Array = mixed[: sum(_NEW)]
    return attended


# Cached tokens of each sequence, and how many of them are new: four decodes and two prompts.
_LENGTHS, _NEW = [1, 33, 700, 512, 300, 450], [1, 1, 1, 1, 40, 300]


def _batch(lengths: list[int], new: list[int], page: int) -> RaggedBatch:
    starts = np.concatenate([[0], np.cumsum(new)])
    room = -(-sum(new) // 128) * 128
    ranges = [np.arange(end - count, end) for end, count in zip(lengths, new, strict=True)]
    positions = np.pad(np.concatenate(ranges), (0, room - sum(new)))
    width = -(-max(lengths) // page)
    table = np.random.default_rng(1).permutation(len(lengths) * width)
    return RaggedBatch(
        tokens=jnp.zeros(room, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        query_starts=jnp.asarray(starts, jnp.int32),
        page_table=jnp.asarray(table.reshape(len(lengths), width), jnp.int32),
        num_decodes=jnp.asarray(new.count(1), jnp.int32),
        num_sequences=jnp.asarray(len(lengths), jnp.int32),
    )
