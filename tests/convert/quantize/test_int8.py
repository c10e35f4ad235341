"""int8: smoothing changes nothing but what rounding loses, and real text loses little."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mixtral_jax
from convert.convert import convert
from convert.errors import ConversionError
from convert.export import export
from convert.pieces import ParameterPiece
from convert.quantize.int8 import ALPHA, quantize, smoothing
from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.checkpoint import restore
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.parameters import CHUNK_BYTES, count_parameters, parameter_shapes
from mixtral_jax.checkpoint.pretrained import TINY_RANDOM
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.errors import ConfigError
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.layers import Rotary
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support import sources
from tests.support.models import model_of

CONFIGS = {
    "dense": from_hf(sources.DENSE),
    "moe": from_hf(sources.MOE),
}
GENERATOR = np.random.default_rng(0)
IDS = GENERATOR.integers(0, sources.V, 642).tolist()  # two windows of the whole context
TOKENS = GENERATOR.integers(0, sources.V, (2, 24), np.int32)
ALICE = Path(__file__).parents[2] / "golden" / "alice.txt"

both = pytest.mark.parametrize("kind", CONFIGS)


def random_model(kind: str, outliers: float = 1) -> Transformer:
    """Weights large enough for logits that differ, norms that are not 1.

    `outliers` makes a few channels larger in all activations that smoothing is about, and the
    weights behind them smaller: the model computes the same.
    """
    model = model_of(CONFIGS[kind])
    generator = np.random.default_rng(1)
    for variable in named_parameters(model).values():
        value = np.array(variable.get_value())
        value = value + generator.uniform(0, 0.5, value.shape) if value.ndim == 1 else 10 * value
        variable.set_value(jnp.asarray(value, jnp.float32))

    def scale(variable: nnx.Param, index: Any, factor: float) -> None:
        variable.set_value(variable[...].at[index].multiply(factor))

    for block in model.layers:
        attention, feed_forward = block.attention, block.feed_forward
        scale(block.attention_norm.weight, np.s_[3], outliers)
        for part in (attention.q, attention.k, attention.v):
            scale(part.weight, np.s_[..., 3], 1 / outliers)
        scale(attention.v.weight, np.s_[1, 2], outliers)
        scale(attention.o.weight, np.s_[:, sources.N // sources.K :, 2], 1 / outliers)
        scale(block.feed_forward_norm.weight, np.s_[5], outliers)
        for name in ("gate", "up", "router"):
            if hasattr(feed_forward, name):
                scale(getattr(feed_forward, name).weight, np.s_[..., 5], 1 / outliers)
        scale(feed_forward.up.weight, np.s_[..., 7, :], outliers)
        scale(feed_forward.down.weight, np.s_[..., 7], 1 / outliers)
    scale(model.norm.weight, np.s_[4], outliers)
    scale(model.head.weight, np.s_[:, 4], 1 / outliers)
    return model


def written(
    model: Transformer,
    folder: Path,
    dtype: str,
    alpha: float | None = ALPHA,
    chunk_bytes: int = CHUNK_BYTES,
) -> Transformer:
    """The model after `quantize`, from its checkpoint; with float32, only smoothed."""
    arrays = {name: np.asarray(v.get_value()) for name, v in named_parameters(model).items()}

    def fill(piece: ParameterPiece, out: np.ndarray) -> None:
        out[...] = arrays[piece.parameter].reshape(-1)[piece.start : piece.start + piece.size]

    folder.mkdir()
    shapes = parameter_shapes(model.config, dtype)
    calls: list[tuple[int, int]] = []
    writer = ParameterWriter(folder, shapes, chunk_bytes)
    quantize(model.config, fill, IDS, writer, lambda *call: calls.append(call), alpha)
    total = sum(array.size * array.dtype.itemsize for array in shapes.values())
    assert (calls[0], calls[-1]) == ((0, total), (total, total))
    Card(model=model.config, dtype=dtype, name="toy", provider="nobody").write(folder)
    return restore.load(folder)[0]


def logits(model: Transformer) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, t: m(t))(model, jnp.asarray(TOKENS)))


def error(found: Transformer, want: Transformer) -> float:
    """Of the logits, relative to how far they spread."""
    wanted = logits(want)
    return float(np.sqrt(np.mean((logits(found) - wanted) ** 2)) / np.std(wanted))


@pytest.mark.slow
@both
@pytest.mark.parametrize("chunk_bytes", [1 << 25, 3 * 4 * sources.H * sources.D])
def test_smoothing_alone_changes_no_logits(tmp_path: Path, kind: str, chunk_bytes: int) -> None:
    model = random_model(kind, outliers=30)
    smooth = written(model, tmp_path / "smooth", "float32", chunk_bytes=chunk_bytes)
    np.testing.assert_allclose(logits(smooth), logits(model), rtol=0, atol=1e-4)
    changed = {
        name
        for (name, a), b in zip(
            named_parameters(smooth).items(), named_parameters(model).values(), strict=True
        )
        if not np.allclose(a.get_value(), b.get_value())
    }
    assert changed == named_parameters(model).keys() - {"embed.weight"}


@pytest.mark.slow
@both
def test_int8_is_near_and_with_outliers_only_when_smoothed(tmp_path: Path, kind: str) -> None:
    # Random layers amplify what is lost, and where experts are about equal others may be chosen.
    near = 0.1 if kind == "dense" else 0.2
    model = random_model(kind)
    assert error(written(model, tmp_path / "even", "int8"), model) < near
    model = random_model(kind, outliers=100)
    smooth = error(written(model, tmp_path / "smooth", "int8"), model)
    plain = error(written(model, tmp_path / "plain", "int8", alpha=None), model)
    assert smooth < near
    assert plain > 5 * smooth


@both
def test_calibration_computes_what_the_model_computes(tmp_path: Path, kind: str) -> None:
    """Seen from its end: the last norm is divided by what the size of its channels makes of it."""
    model = random_model(kind)
    smooth = written(model, tmp_path / "smooth", "float32")
    tokens = jnp.asarray(IDS).reshape(2, 321)
    rotary = Rotary.at(jnp.arange(321)[None, :], model.config)
    x = model.embed.full(tokens)
    for block in model.layers:
        x = block.full(x, rotary)
    size = jnp.sqrt(jnp.mean(jnp.square(model.norm.full(x)), axis=(0, 1)))
    columns = jnp.sqrt(jnp.mean(jnp.square(model.head.weight[...]), axis=0))
    s = smoothing(np.asarray(size), np.asarray(columns), ALPHA)
    assert s.max() > 1.1 and s.min() < 0.9
    np.testing.assert_allclose(smooth.norm.weight[...] * s, model.norm.weight[...], rtol=1e-4)


def test_smoothing_by_hand() -> None:
    """sqrt(16 / 1) = 4 and sqrt(1 / 4) = 0.5, over their mean sqrt(4 * 0.5); unseen ones are 1."""
    inputs, columns = np.array([16, 1, 0, 5]), np.array([1, 4, 2, 0])
    s = smoothing(inputs.astype(np.float32), columns.astype(np.float32), 0.5)
    np.testing.assert_allclose(s, [math.sqrt(8), math.sqrt(1 / 8), 1, 1], rtol=1e-6)


# --- from the command to the checkpoint ---


def hugging_face(folder: Path, base: dict[str, Any] = sources.MOE, tied: bool = False) -> Path:
    """A source with a tokenizer."""
    config = base | dict(vocab_size=ByteTokenizer().vocab_size, tie_word_embeddings=tied)
    hf = sources.tensors(config)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & hf.keys():
        generator = np.random.default_rng(7)
        shape = (config["vocab_size"], sources.D)
        hf[name] = 0.2 * generator.standard_normal(shape, np.float32)
    sources.write_hf(folder, config, hf, shards=2)
    ByteTokenizer().save(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_converted_to_int8_and_loaded(tmp_path: Path, tied: bool) -> None:
    source = hugging_face(tmp_path / "src", tied=tied)
    card = convert(source, tmp_path / "int8", dtype="int8")
    assert card == Card.read(tmp_path / "int8")
    # A tied head could not be smoothed: it gets weights of its own.
    assert (card.dtype, card.model.tied_embeddings) == ("int8", False)
    model, tokenizer = mixtral_jax.load(tmp_path / "int8", mesh=None)
    assert isinstance(tokenizer, ByteTokenizer)
    assert model.layers[0].feed_forward.down.weight.get_value().dtype == jnp.int8
    convert(source, tmp_path / "float")
    assert error(model, restore.load(tmp_path / "float")[0]) < 0.2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_upcycled_and_quantised(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "src", sources.DENSE)
    convert(source, tmp_path / "float")
    convert(source, tmp_path / "int8", dtype="int8", upcycle_experts=4)
    found, want = (restore.load(tmp_path / name)[0] for name in ("int8", "float"))
    assert found.config.num_experts == 4
    assert error(found, want) < 0.1


def test_without_a_tokenizer_there_is_nothing_to_calibrate_with(tmp_path: Path) -> None:
    source = sources.write_hf(tmp_path / "src", sources.DENSE, sources.tensors(sources.DENSE))
    with pytest.raises(ConversionError, match="needs the model's tokenizer"):
        convert(source, tmp_path / "dst", dtype="int8")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.slow
def test_no_way_from_one_kind_to_the_other_but_converting(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "src")
    for dtype in ("int8", "float32"):
        convert(source, tmp_path / dtype, dtype=dtype)
    with pytest.raises(ConfigError, match="stored as int8 .* anew with --dtype bfloat16"):
        mixtral_jax.load(tmp_path / "int8", dtype="bfloat16", mesh=None)
    with pytest.raises(ConfigError, match="stored as float32 .* anew with --dtype int8"):
        mixtral_jax.load(tmp_path / "float32", dtype="int8", mesh=None)
    mixtral_jax.load(tmp_path / "int8", dtype=jnp.int8, mesh=None)
    with pytest.raises(ConversionError, match="stored as int8 and .* with --dtype bfloat16"):
        export(tmp_path / "int8", tmp_path / "hf")
    toy = mixtral_jax.load(TINY_RANDOM, mesh=None, dtype="int8")[0]
    assert toy.embed.weight.get_value().dtype == jnp.int8


def test_weights_and_bytes_are_counted() -> None:
    config = replace(CONFIGS["dense"], num_layers=1)
    D, F, V, NH, KH = sources.D, sources.F, sources.V, 64, 16
    outputs = NH + 2 * KH + D + 2 * F + D + 2 * V
    matrices = D * (NH + 2 * KH) + D * NH + 3 * D * F + 2 * D * V
    assert count_parameters(config, "float32") == (matrices + 3 * D, 4 * (matrices + 3 * D))
    assert count_parameters(config, "int8") == (
        matrices + 3 * D,
        matrices + 4 * 3 * D + 4 * outputs,
    )


# --- real weights, real text ---


def full(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def through_int8_pages(model: Transformer, tokens: jax.Array) -> jax.Array:
    """Logits [1 T V] of one sequence [1 T] whose keys and values are rounded."""
    length = tokens.shape[1]
    batch = RaggedBatch(
        tokens=tokens[0],
        positions=jnp.arange(length),
        lengths=jnp.asarray([length]),
        query_starts=jnp.asarray([0, length]),
        page_table=jnp.arange(length // 16)[None],
        num_decodes=jnp.int32(0),
        num_sequences=jnp.int32(1),
    )
    cache = PagedCache.empty(model.config, length // 16, 16, jnp.int8)
    return model.paged_logits(model.paged(batch, cache)[0])[None]


def perplexity(
    folder: Path, text: str, logits: Callable[[Transformer, jax.Array], jax.Array] = full
) -> tuple[float, int]:
    """Over windows of 512 tokens, and how many tokens there were."""
    model, tokenizer = mixtral_jax.load(folder, mesh=None)
    ids = tokenizer.encode(text)
    windows = np.asarray(ids[: len(ids) // 512 * 512], np.int32).reshape(-1, 1, 512)

    @jax.jit
    def surprise(model: Transformer, tokens: jax.Array) -> jax.Array:
        logprobs = jax.nn.log_softmax(logits(model, tokens)[:, :-1], axis=-1)
        return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))

    return math.exp(np.mean([surprise(model, jnp.asarray(row)) for row in windows])), windows.size


@pytest.mark.soak
def test_perplexity_of_the_real_smollm2(smollm2_gguf: Path, smollm2: Path, tmp_path: Path) -> None:
    """The first two chapters of Alice in Wonderland, which the calibration text is not from."""
    convert(smollm2_gguf, tmp_path / "int8", dtype="int8")
    convert(smollm2_gguf, tmp_path / "int4", dtype="int4")  # kept as the file has them
    text = ALICE.read_text()
    want, count = perplexity(smollm2, text)
    weights, _ = perplexity(tmp_path / "int8", text)
    kept, _ = perplexity(tmp_path / "int4", text)
    pages, _ = perplexity(smollm2, text, through_int8_pages)
    found = {"float32": want, "int8": weights, "int4, kept": kept, "int8 pages": pages}
    print(json.dumps({"tokens": count, **found}))
    assert count >= 4000
    assert 20 < want < 35
    assert weights < 1.02 * want
    assert kept < 1.015 * want
    assert pages < 1.005 * want
