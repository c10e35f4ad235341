"""The cost of small keys and values: python -m benchmarks.kv_error CHECKPOINT TEXT...

Reads windows of each text against pages in float32, and again with every key and value rounded as
pages of int8 and fp8 hold them, a TPU's words of int8 included, whose scales have eight bits. It
prints the perplexity of each, and by layer how far the hidden states behind it are from those of
float32: the root of the summed squares of the differences over that of the states.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx

import mixtral_jax
from mixtral_jax import cache
from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.kernels.tpu import word_pages
from mixtral_jax.kernels.xla import attention
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.weight import round_by

_PAGE = 16


def _as_words(x: jax.Array) -> jax.Array:
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    scale = word_pages.scale_of(word_pages.scale_code(scale))
    return round_by(x, scale).astype(jnp.float32) * scale[..., None]


def _as_pages(dtype: str) -> Callable[[jax.Array], jax.Array]:
    return lambda x: cache.read(cache.round_heads(x, jnp.dtype(dtype)), jnp.float32)


_FORMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "float32": lambda x: x,
    "int8": _as_pages("int8"),
    "int8, TPU's words": _as_words,
    "fp8": _as_pages("float8_e4m3fn"),
}


class _Reader:
    """A model that reads windows of text with keys and values of one form."""

    def __init__(self, model: Transformer, form: Callable[[jax.Array], jax.Array]) -> None:
        def attend(q, k, v, *rest):  # type: ignore[no-untyped-def]
            return attention.attend(q, form(k), form(v), *rest)

        self.model = model
        self.blocks, _ = model.apart()
        for block in self.blocks:
            block.attention.kernels = replace(model.placement.kernels, attend=attend)
        self._graph = nnx.split(self.blocks[0])[0]
        self._block = jax.jit(
            lambda state, *given: nnx.merge(self._graph, state).paged(*given), donate_argnums=3
        )
        self._losses = jax.jit(self._loss)

    def read(self, tokens: np.ndarray) -> tuple[list[jax.Array], jax.Array]:
        """The hidden states behind each layer, and each next token's negative log-probability."""
        size, pages = len(tokens), -(-len(tokens) // _PAGE)
        integers = (tokens, np.arange(size), [size], [0, size], [np.arange(pages)], 0, 1)
        batch = RaggedBatch(*(jnp.asarray(x, jnp.int32) for x in integers))
        layers = PagedCache.empty(self.model.config, pages, _PAGE, jnp.float32).layers
        x, rotary = self.model.begin(batch)
        states = []
        for block, layer in zip(self.blocks, layers, strict=True):
            x, _ = self._block(nnx.split(block)[1], x, rotary, layer, batch)
            states.append(x)
        return states, self._losses(x, batch.tokens)

    def _loss(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = self.model.logits(self.model.norm.full(x[None]))[0, :-1]
        chances = jax.nn.log_softmax(logits, axis=-1)
        return -jnp.take_along_axis(chances, tokens[1:, None], axis=-1)[:, 0]


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of float32 weights.")],
    texts: Annotated[list[Path], typer.Argument(help="Files of text.")],
    window: Annotated[int, typer.Option(help="Tokens that are read together.")] = 512,
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 4,
) -> None:
    """Prints both tables."""
    model, tokenizer = mixtral_jax.load(checkpoint, dtype="float32", mesh=None)
    assert tokenizer is not None
    readers = {name: _Reader(model, form) for name, form in _FORMS.items()}
    losses: dict[str, list[list[float]]] = {name: [] for name in readers}
    squares = {name: np.zeros((2, model.config.num_layers)) for name in readers}
    for text in texts:
        ids = np.asarray(tokenizer.encode(text.read_text(encoding="utf-8")))
        count = min(windows, len(ids) // window)
        sums: dict[str, list[float]] = {name: [] for name in readers}
        for start in range(0, count * window, window):
            tokens = ids[start : start + window]
            exact, _ = readers["float32"].read(tokens)
            for name, reader in readers.items():
                states, loss = reader.read(tokens)
                sums[name].append(float(jnp.mean(loss)))
                for i, (state, want) in enumerate(zip(states, exact, strict=True)):
                    squares[name][0, i] += float(jnp.sum((state - want) ** 2))
                    squares[name][1, i] += float(jnp.sum(want**2))
        for name, values in sums.items():
            losses[name].append(values)
    print(
        f"| perplexity | {' | '.join(text.name for text in texts)} |\n|{'---|' * (len(texts) + 1)}"
    )
    base = [float(np.exp(np.mean(values))) for values in losses["float32"]]
    for name, by_text in losses.items():
        cells = []
        for exact_one, values in zip(base, by_text, strict=True):
            perplexity = float(np.exp(np.mean(values)))
            cells.append(f"{perplexity:.3f} ({100 * (perplexity / exact_one - 1):+.2f} %)")
        print(f"| {name} | {' | '.join(cells)} |")
    names = [name for name in readers if name != "float32"]
    print(f"\n| layer | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for i in range(model.config.num_layers):
        errors = [100 * np.sqrt(squares[name][0, i] / squares[name][1, i]) for name in names]
        print(f"| {i + 1} | {' | '.join(f'{error:.2f} %' for error in errors)} |")


if __name__ == "__main__":
    typer.run(main)
