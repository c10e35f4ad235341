"""quantize: from float weights to int8 with one scale for each output (W8A8), smoothed.

A few channels of a model's activations are far larger than the others, and one scale for a whole
row of them leaves the others few steps. SmoothQuant (arXiv:2211.10438) divides channel j by

    s_j = |x_j|^alpha / |w_j|^(1 - alpha)

and multiplies column j of the weights that it meets by the same, which changes no product. |.| is
the root mean square, where the paper takes the largest: its scales are for whole tensors, ours for
rows and outputs, and a third less is lost (Kullback-Leibler divergence 0.010 instead of 0.015 from
SmolLM2-135M's answers in float32). Those of x come from a short text of ours. Dividing costs
nothing when the model runs, for it is done to the weights of whatever makes the activations:

    q, k, v              the norm before them
    o                    the rows of v; query heads that share a head of v share its s
    gate, up of all      the norm before them; the router is multiplied to make up for it
      experts, router
    down                 the rows of up, in each expert
    head                 the last norm; so a head tied to the embedding becomes one of its own

The text goes through one layer after the other in f32, each computed before it is rounded. Weights
come in blocks of 32 MiB, a layer's twice: to compute it and see their columns, then to be written.
So memory grows with a model's width alone, by the activations of at most 2,048 tokens.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.pieces import Fill, ParameterPiece, filled, pieces
from convert.progress import Progress
from mixtral_jax.checkpoint.parameters import parameter_shapes, stored_bytes
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.model.layers import Rotary
from mixtral_jax.model.moe import route
from mixtral_jax.weight import Weight

ALPHA = 0.5  # the paper's, for most models
_TOKENS = 2048  # of the text
_WINDOW = 512  # at most so many of them see each other
_FLOAT = np.dtype(np.float32)


def calibration_text() -> str:
    """Prose, dialogue, code, a chat: 8,000 characters that were written for this."""
    return Path(__file__).with_name("calibration.txt").read_text(encoding="utf-8")


def quantize(
    config: ModelConfig,
    fill: Fill,
    ids: list[int],
    writer: ParameterWriter,
    progress: Progress = lambda done, total: None,
    alpha: float | None = ALPHA,
) -> None:
    """Reads all float weights by `fill` and writes those of an int8 model.

    Args:
        config: of the model, its embeddings not tied.
        fill: where the weights come from; called from another thread.
        ids: of the calibration text, at least one; the first 2,048 are used.
        writer: of parameters of an int8 model; for float32 ones, smooths and does not round.
        progress: called with bytes written and bytes in all.
        alpha: how much of the difficulty goes from activations to weights; None does not smooth.
    """
    _Walk(config, fill, writer, progress, alpha).run(ids)


class _Seen(NamedTuple):
    """What the product of calibration tokens with a weight showed."""

    out: np.ndarray  # [R O]
    inputs: np.ndarray  # [I], how large each channel of x is
    columns: np.ndarray  # [I], and each column of the weight

    def smoothing(self, alpha: float | None) -> np.ndarray:
        return smoothing(self.inputs, self.columns, alpha)


def channels(x: np.ndarray) -> np.ndarray:
    """The root mean square of each channel of x [R I]: [I]; of no rows, 0."""
    return np.sqrt(_squares(x) / max(1, x.shape[0]))


def _squares(x: np.ndarray) -> np.ndarray:
    """x [R I] -> [I], summed, without an array of the size of x."""
    return np.einsum("RI,RI->I", x, x)


def smoothing(inputs: np.ndarray, columns: np.ndarray, alpha: float | None) -> np.ndarray:
    """What channels are divided by: 1 in the (geometric) mean, and where nothing was seen."""
    s = np.ones_like(inputs)
    seen = (inputs > 0) & (columns > 0)
    if alpha is not None and seen.any():
        logs = alpha * np.log(inputs[seen]) - (1 - alpha) * np.log(columns[seen])
        s[seen] = np.exp(logs - logs.mean())
    return s


class _Walk:
    """The way through the model: compute a layer, smooth and write it, go on with its output."""

    def __init__(
        self,
        config: ModelConfig,
        fill: Fill,
        writer: ParameterWriter,
        progress: Progress,
        alpha: float | None,
    ) -> None:
        self.config = config
        self.fill = fill
        self.writer = writer
        self.progress = progress
        self.alpha = alpha
        self.floats = parameter_shapes(config, "float32")
        self.done, self.total = 0, stored_bytes(writer.shapes)
        progress(self.done, self.total)

    def run(self, ids: list[int]) -> None:
        ids = ids[:_TOKENS]
        windows = -(-len(ids) // min(_WINDOW, self.config.max_context))
        tokens = np.asarray(ids[: len(ids) // windows * windows]).reshape(windows, -1)
        x = self._embedded(tokens)
        self._write("embed")
        for i in range(self.config.num_layers):
            x += self._attention(f"layers.{i}.", x)
            x += self._feed_forward(f"layers.{i}.", x)
        norm = self._small("norm.weight")
        # Of the head's outputs nobody asks: one row, as large in each channel as all, will do.
        row = channels(self._normed(norm, x))[None, :]
        s = self._product("head", row).smoothing(self.alpha)
        self._put("norm.weight", norm / s)
        self._write("head", s)

    def _attention(self, layer: str, x: np.ndarray) -> np.ndarray:
        """Writes it; what it adds to x [B T D]."""
        config, own = self.config, layer + "attention."
        norm = self._small(layer + "attention_norm.weight")
        h = self._normed(norm, x)
        q, k, v = (self._product(own + part, h) for part in "qkv")
        o = self._product(own + "o", _mixed(q.out, k.out, v.out, x.shape[:2], config))

        columns = np.maximum.reduce([q.columns, k.columns, v.columns])
        s = smoothing(q.inputs, columns, self.alpha)
        groups = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_size)
        inputs, columns = (np.max(a.reshape(groups), axis=1) for a in (o.inputs, o.columns))
        s_v = smoothing(inputs, columns, self.alpha)
        s_o = np.broadcast_to(s_v[:, None], groups)

        self._put(layer + "attention_norm.weight", norm / s)
        self._write(own + "q", s)
        self._write(own + "k", s)
        self._write(own + "v", s, s_v.reshape(1, -1))
        self._write(own + "o", s_o.reshape(-1))
        return o.out.reshape(x.shape)

    def _feed_forward(self, layer: str, x: np.ndarray) -> np.ndarray:
        """Writes it; what it adds to x [B T D]. A dense one is an expert that all tokens choose."""
        own = layer + "feed_forward."
        norm = self._small(layer + "feed_forward_norm.weight")
        h = self._normed(norm, x)
        router = self._small(own + "router.weight") if self.config.is_moe else None
        shares = _shares(h, router, self.config.experts_per_token)
        out, columns, s_down = np.zeros_like(h), np.zeros_like(norm), []
        for expert in range(shares.shape[1]):
            (rows,) = np.nonzero(shares[:, expert])
            gate, up = (self._product(own + part, h[rows], expert) for part in ("gate", "up"))
            columns = np.maximum.reduce([columns, gate.columns, up.columns])
            up.out[...] *= jax.nn.silu(gate.out)
            down = self._product(own + "down", up.out, expert)
            s_down.append(down.smoothing(self.alpha))
            out[rows] += shares[rows, expert, None] * down.out

        s = smoothing(channels(h), columns, self.alpha)
        self._put(layer + "feed_forward_norm.weight", norm / s)
        if router is not None:
            self._put(own + "router.weight", router * s)
        self._write(own + "gate", s)
        self._write(own + "up", s, np.stack(s_down))
        self._write(own + "down", np.stack(s_down))
        return out.reshape(x.shape)

    # --- computing ---

    def _embedded(self, tokens: np.ndarray) -> np.ndarray:
        """[B T] -> [B T D]."""
        x = np.empty((*tokens.shape, self.config.hidden_size), np.float32)
        for block in self._blocks("embed"):
            here = (tokens >= block.rows.start) & (tokens < block.rows.stop)
            x[here] = block.values[tokens[here] - block.rows.start]
        return x

    def _normed(self, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
        """[B T D] -> [R D]."""
        normed = xla.norm(jnp.asarray(x), jnp.asarray(weight), self.config.norm_eps)
        return np.asarray(normed).reshape(-1, x.shape[-1])

    def _product(self, name: str, x: np.ndarray, expert: int = 0) -> _Seen:
        """x [R I] with the weight of that name."""
        out = np.empty((x.shape[0], self._sizes(name)[1]), np.float32)
        squares = np.zeros(x.shape[1], np.float32)
        for block in self._blocks(name, expert):
            out[:, block.rows] = x @ block.values.T
            squares += _squares(block.values)
        return _Seen(out, channels(x), np.sqrt(squares / out.shape[1]))

    # --- reading and writing ---

    def _small(self, name: str) -> np.ndarray:
        """A parameter that is not rounded."""
        whole = {name: self.floats[name]}
        parts = [values.copy() for _, values in filled(pieces(whole), _FLOAT, self.fill)]
        return np.concatenate(parts).reshape(whole[name].shape)

    def _blocks(self, name: str, expert: int = 0) -> Iterator["_Block"]:
        """A matrix [O I], of one expert where there are several, in blocks as they are stored."""
        experts, _, inputs = self._sizes(name)
        name += ".weight"
        shape = self.floats[name].shape
        start = expert * (math.prod(shape) // experts)
        of_one = jax.ShapeDtypeStruct(shape if experts == 1 else shape[1:], _FLOAT)
        cut = pieces({name: of_one}, self.writer.chunk_bytes)
        if experts > 1:
            index = slice(expert, expert + 1)
            cut = (
                ParameterPiece(p.parameter, (index, *p.index), (1, *p.shape), start + p.start)
                for p in cut
            )
        for piece, values in filled(cut, _FLOAT, self.fill):
            first = (piece.start - start) // inputs
            rows = slice(first, first + piece.size // inputs)
            yield _Block(piece, rows, values.reshape(-1, inputs))

    def _write(
        self, name: str, columns: np.ndarray | None = None, divisors: np.ndarray | None = None
    ) -> None:
        """Writes a weight, its columns multiplied, [I] or [E I], and its rows divided, [E O]."""
        experts, outputs, inputs = self._sizes(name)
        rounds = name + ".scale" in self.writer.shapes
        scale = np.ones((experts, outputs), np.float32)
        if divisors is not None:
            scale /= divisors
        if columns is None:
            columns = np.ones(1, np.float32)
        columns = np.broadcast_to(columns, (experts, inputs))
        for expert in range(experts):
            for block in self._blocks(name, expert):
                values = block.values * columns[expert]
                own = scale[expert, block.rows]
                if rounds:
                    rounded = Weight.quantized(jnp.asarray(values))
                    values, own[...] = np.asarray(rounded.values), own * np.asarray(rounded.scale)
                else:
                    values *= own[:, None]
                self._put(name + ".weight", values.reshape(block.piece.shape), block.piece.index)
        if rounds:
            self._put(name + ".scale", scale.reshape(self.writer.shapes[name + ".scale"].shape))

    def _put(self, name: str, values: np.ndarray, index: Any = ...) -> None:
        self.writer.write(name, index, values)
        self.done += values.nbytes
        self.progress(self.done, self.total)

    def _sizes(self, name: str) -> tuple[int, int, int]:
        """Experts, outputs and inputs of a weight that is rounded."""
        # `o` has its inputs in two axes, the others have one.
        shape = self.floats[name + ".weight"].shape
        inputs = math.prod(shape[1:]) if name.endswith(".o") else shape[-1]
        experts = shape[0] if self.config.is_moe and ".feed_forward." in name else 1
        return experts, math.prod(shape) // inputs // experts, inputs


class _Block(NamedTuple):
    """Some rows of a matrix."""

    piece: ParameterPiece
    rows: slice
    values: np.ndarray  # [R I] f32, valid until the next one is asked for


def _mixed(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: tuple[int, ...], config: ModelConfig
) -> np.ndarray:
    """Attention between the projections, as attention.py has it: [R N*H], [R K*H] -> [R N*H]."""
    rotary = Rotary.at(jnp.arange(rows[1], dtype=jnp.int32)[None, :], config)
    window = None if config.sliding_window is None else (config.sliding_window - 1, 0)
    out = np.empty((*rows, *q.shape[1:]), np.float32)
    for row, parts in enumerate(zip(*(part.reshape(*rows, -1) for part in (q, k, v)), strict=True)):
        # One by one, because the scores are large.
        heads = (jnp.asarray(part).reshape(1, rows[1], -1, config.head_size) for part in parts)
        query, key, value = heads
        with jax.numpy_dtype_promotion("standard"):
            mixed = jax.nn.dot_product_attention(
                rotary.rotate(query),
                rotary.rotate(key),
                value,
                is_causal=True,
                local_window_size=window,
            )
        out[row] = mixed.reshape(rows[1], -1)
    return out.reshape(q.shape)


def _shares(h: np.ndarray, router: np.ndarray | None, picks: int) -> np.ndarray:
    """What each expert weighs in the sum for each token: h [R D] -> [R E]."""
    if router is None:
        return np.ones((h.shape[0], 1), np.float32)
    choice, weights = route(jnp.asarray(h @ router.T), picks)
    shares = np.zeros((h.shape[0], router.shape[0]), np.float32)
    np.put_along_axis(shares, np.asarray(choice), np.asarray(weights), axis=1)
    return shares
