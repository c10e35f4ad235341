"""int4: weights make up for each other's rounding, and a model of them answers nearly as before."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.convert import convert
from convert.errors import ConversionError
from convert.pieces import ParameterPiece
from convert.quantize import compensation, int4
from convert.quantize.compensation import Rounder, moment
from convert.quantize.int4 import mixed, num_tokens, quantize
from mixtral_jax.checkpoint import restore
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.parameters import count_parameters, parameter_shapes
from mixtral_jax.checkpoint.pretrained import save
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.generation import generate_tokens
from mixtral_jax.model.adapter import Adapter, AdapterConfig
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.placement import WeightDtypes
from mixtral_jax.weight import QUANTIZED, Weight
from tests.support import sources
from tests.support.adapters import random_adapter
from tests.support.models import model_of

MOE = replace(
    ModelConfig.tiny(vocab_size=67), hidden_size=64, num_heads=2, num_kv_heads=1, head_size=32
)
CONFIGS = {"moe": MOE, "dense": replace(MOE, num_experts=0, experts_per_token=0)}
GENERATOR = np.random.default_rng(0)
IDS = GENERATOR.integers(0, 67, 700).tolist()
TOKENS = jnp.asarray(GENERATOR.integers(0, 67, (2, 24), np.int32))


def random_model(kind: str) -> Transformer:
    model = model_of(CONFIGS[kind])
    for variable in named_parameters(model).values():
        if variable.get_value().ndim > 1:
            variable.set_value(5 * variable.get_value())
    return model


def written(
    model: Transformer, folder: Path, *, compensates: bool, weight_dtypes: WeightDtypes = ()
) -> Transformer:
    """The model after `quantize`, from its checkpoint."""
    arrays = {name: np.asarray(v.get_value()) for name, v in named_parameters(model).items()}

    def fill(piece: ParameterPiece, out: np.ndarray) -> None:
        out[...] = arrays[piece.parameter].reshape(-1)[piece.start : piece.start + piece.size]

    folder.mkdir()
    shapes = parameter_shapes(model.config, "int4", weight_dtypes)
    calls: list[tuple[int, int]] = []
    writer = ParameterWriter(folder, shapes)
    done = lambda *call: calls.append(call)  # noqa: E731
    quantize(model.config, fill, IDS, writer, done, compensates=compensates)
    total = sum(array.size * array.dtype.itemsize for array in shapes.values())
    assert (calls[0], calls[-1]) == ((0, total), (total, total))
    card = Card(model=model.config, dtype="int4", name="toy", provider="nobody")
    replace(card, weight_dtypes=weight_dtypes).write(folder)
    return restore.load(folder)[0]


def logits(model: Transformer) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, t: m(t))(model, TOKENS))


def test_a_mixed_model_keeps_v_and_down_of_half_of_its_layers() -> None:
    """Of 16: the first two, the last two, and each third between, from the fifth on."""
    config = replace(CONFIGS["dense"], num_layers=16)
    layers = sorted({int(name.split(".")[1]) for name in mixed(config)})
    assert layers == [0, 1, 4, 7, 10, 13, 14, 15]
    kinds = {name.split(".", 2)[2] for name in mixed(config)}
    assert kinds == {"attention.v", "feed_forward.down"}
    assert set(mixed(config).values()) == {"int8"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=pytest.mark.soak)])
def test_a_model_is_near_its_floats(tmp_path: Path, kind: str) -> None:
    model = random_model(kind)
    spread = np.std(logits(model))

    def lost(rounded: Transformer) -> float:
        return float(np.sqrt(np.mean((logits(rounded) - logits(model)) ** 2)) / spread)

    made_up = written(model, tmp_path / "compensated", compensates=True)
    assert made_up.placement.dtype == "int4" and made_up.dtype == jnp.float32
    assert lost(made_up) < 0.3
    assert lost(made_up) < lost(written(model, tmp_path / "nearest", compensates=False))


@pytest.mark.slow
def test_layers_make_up_for_what_those_before_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the calibration text, of which they know it; of other texts less."""
    model = model_of(replace(CONFIGS["dense"], num_layers=3))
    text = jnp.asarray(IDS[:350])[None]

    def lost(folder: str) -> float:
        rounded = written(model, tmp_path / folder, compensates=True)
        return float(np.std(np.asarray(rounded(text)) - np.asarray(model(text))))

    beside_floats = lost("beside")
    monkeypatch.setattr(compensation, "_SHARE", 0.0)
    assert beside_floats < 0.5 * lost("alone")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe", pytest.param("dense", marks=pytest.mark.soak)])
def test_some_weights_are_int8(tmp_path: Path, kind: str) -> None:
    """They are rounded as in an int8 model; the folder, loaded and saved again, says which."""
    names = ("layers.0.attention.v", "layers.1.feed_forward.down")
    dtypes = tuple(zip(names, ("int8", "int8x16"), strict=True))
    model = random_model(kind)
    mixed = written(model, tmp_path / "mixed", compensates=False, weight_dtypes=dtypes)
    plain = written(model, tmp_path / "plain", compensates=False)
    for name, variable in named_parameters(plain).items():
        if variable.get_value().dtype == QUANTIZED["int4"]:
            own = named_parameters(mixed)[name].get_value().dtype
            assert own == QUANTIZED["int8" if name.rpartition(".")[0] in names else "int4"]
    assert np.std(logits(mixed) - logits(model)) < np.std(logits(plain) - logits(model))
    save(mixed, None, tmp_path / "saved")
    assert Card.read(tmp_path / "saved").weight_dtypes == dtypes
    again = restore.load(tmp_path / "saved")[0]
    np.testing.assert_array_equal(logits(again), logits(mixed))


@pytest.mark.soak
def test_the_plain_loop_draws_what_the_full_form_finds_best() -> None:
    mixed = (("layers.0.feed_forward.down", "int8"),)
    model, ids = model_of(MOE, "int4", weight_dtypes=mixed), IDS[:9]
    for drawn in generate_tokens(model, ids, max_tokens=6):
        best = int(np.argmax(np.asarray(model(jnp.asarray([ids], jnp.int32)))[0, -1]))
        assert drawn == best
        ids = [*ids, best]


def test_an_adapter_runs_beside_int4_and_learns() -> None:
    """It gives about what it gives beside the same weights as floats, and its gradients too."""
    settings = AdapterConfig(targets=("q", "gate", "down"), rank=2, alpha=8.0)
    adapter = random_adapter(MOE, settings)
    rounded, floats = model_of(MOE, "int4"), model_of(MOE)
    stored = named_parameters(rounded)
    for name, variable in named_parameters(floats).items():
        value = stored[name].get_value()
        if name.removesuffix("weight") + "scale" in stored:
            scale = stored[name.removesuffix("weight") + "scale"].get_value()
            is_int4 = value.dtype == QUANTIZED["int4"]
            value = (
                Weight(value, scale).widened(jnp.float32)
                if is_int4
                else value.astype(jnp.float32) * scale[:, None]
            )
        variable.set_value(value.astype(jnp.float32))

    def loss(adapter: Adapter, model: Transformer) -> jax.Array:
        return jnp.mean(jnp.square(model(TOKENS, adapter)))

    got, want = (jax.jit(jax.value_and_grad(loss))(adapter, m) for m in (rounded, floats))
    np.testing.assert_allclose(got[0], want[0], rtol=0.02)
    for ours, theirs in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        cosine = jnp.vdot(ours, theirs) / jnp.linalg.norm(ours) / jnp.linalg.norm(theirs)
        assert cosine > 0.99


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = model_of(CONFIGS["dense"])
    query = model.layers[1].attention.q.weight
    query.set_value(query[...].at[0, 3, 5].set(1e14))
    with pytest.raises(ConversionError, match=r"q\.weight has values .* --dtype bfloat16"):
        written(model, tmp_path / "far", compensates=False)


def test_parameters_and_bytes_are_counted() -> None:
    """By hand: five bits for a weight, a byte for those of embedding and head, and their scales."""
    config = replace(CONFIGS["dense"], num_layers=1)
    D, F, V = config.hidden_size, config.feed_forward_size, config.vocab_size
    of_layer = D * 64 + 2 * D * 32 + 64 * D + 3 * D * F
    count, nbytes = count_parameters(config, "int4")
    assert count == of_layer + 2 * V * D + 3 * D
    assert nbytes == of_layer * 5 // 8 + 2 * V * (D + 4) + 3 * D * 4
    shapes = parameter_shapes(config, "int4")
    assert shapes["layers.0.attention.o.weight"].shape == (D, 2, 16)
    assert shapes["layers.0.attention.o.scale"].shape == (D, 2, 1, 2)
    assert shapes["layers.0.attention.o.weight"].dtype == QUANTIZED["int4"]
    same, more = count_parameters(config, "int4", {"layers.0.feed_forward.down": "int8"})
    assert (same, more - nbytes) == (count, D * F * 3 // 8 + 4 * D)


def test_what_int4_is_not_for(tmp_path: Path) -> None:
    """Heads that are no whole groups, and a source without a tokenizer."""
    with pytest.raises(ConfigError, match="groups of 32 inputs.*16 along their last axis.*int8"):
        model_of(ModelConfig.tiny(vocab_size=67), "int4")
    path = sources.write_hf(tmp_path / "hf", sources.DENSE, sources.tensors(sources.DENSE))
    with pytest.raises((ConversionError, ConfigError), match="int4"):
        convert(path, tmp_path / "ours", dtype="int4")
    with pytest.raises(ConversionError, match="mixed is for .* int4 here; leave --mixed out$"):
        convert(path, tmp_path / "ours", dtype="int8", mixed=True)
    assert not (tmp_path / "ours").exists()


def test_smaller_models_are_rounded_by_more_tokens() -> None:
    """As many as 2^27 elements of down's rows hold, within bounds: 2^27 / 14336 is 9362.3."""
    config = ModelConfig.mistral_7b_v01()
    assert num_tokens(config) == 9362
    assert num_tokens(ModelConfig.mixtral_8x7b_v01()) == 8192
    assert num_tokens(replace(config, feed_forward_size=1536)) == 32768


def test_experts_are_rounded_for_rows_of_their_own() -> None:
    """An expert that no token has chosen meets none."""
    config = CONFIGS["moe"]
    D, F = config.hidden_size, config.feed_forward_size
    drawn = GENERATOR.standard_normal((config.num_experts, D, F)).astype(np.float32)
    rows = [jnp.asarray(GENERATOR.standard_normal((n, F)), jnp.float32) for n in (90, 0, 60)]
    rows += [rows[0]] * (config.num_experts - len(rows))
    name = "feed_forward.down.weight"
    ((_, weight),) = int4._rounded([name], {name: drawn}, int4._Met(rows), config, True)
    assert weight.values.shape == (config.num_experts, D, F // 2)
    for expert, own in enumerate(rows):
        alone = Rounder(own).rounded(drawn[expert])
        np.testing.assert_array_equal(weight.values[expert], alone.values)


def test_what_products_lack_is_found_by_moments() -> None:
    """The rows lack `drift`, and the products are to have `added` besides."""
    rows, drift, added, matrix = (
        jnp.asarray(GENERATOR.standard_normal(shape), jnp.float32)
        for shape in ((50, 8), (50, 8), (50, 4), (4, 8))
    )
    met = int4._Met([rows], moment(drift, rows), moment(added, rows))
    lacking = met.lacking(np.asarray(matrix))
    want = moment(drift @ matrix.T + added, rows)
    np.testing.assert_allclose(lacking, want, rtol=1e-4, atol=1e-5)
