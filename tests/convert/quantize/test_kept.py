"""What is published as fp8, int8 or int4 is kept bit by bit, everything else is rounded once."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from convert.convert import convert
from convert.errors import ConversionError
from convert.export import export
from convert.merge import MergedReader
from convert.source import gguf_blocks
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.pretrained import load
from mixtral_jax.errors import ConfigError
from mixtral_jax.generation import generate_tokens
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import LAYER_WEIGHTS
from mixtral_jax.weight import Weight, unpacked
from tests.support import fp8_sources, gguf_files, packed_sources, sources
from tests.support.packed_sources import LAYOUTS, Folder
from tests.support.sources import DENSE, MOE


@pytest.mark.parametrize("layout", ["channel", "tensor", "autofp8"])
def test_published_weights_are_kept(tmp_path: Path, layout: str) -> None:
    """By default and bit by bit; the scale of a tensor is repeated for each output."""
    path, wide, stored = fp8_sources.write(tmp_path / "published", layout, MOE)
    card = convert(path, tmp_path / "ours")
    assert card.dtype == "fp8" == Card.read(tmp_path / "ours").dtype
    have = sources.parameters(tmp_path / "ours")
    sources.assert_same(fp8_sources.widened(have), sources.ours(wide))
    expert = stored["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    kept = have["layers.1.feed_forward.up.weight"][2]
    assert kept.dtype == fp8_sources.FP8
    np.testing.assert_array_equal(kept.view(np.uint8), expert.view(np.uint8))


def test_small_pieces_give_the_same(tmp_path: Path) -> None:
    path, wide, _ = fp8_sources.write(tmp_path / "published", "channel", MOE)
    convert(path, tmp_path / "ours", chunk_bytes=2048)
    have = sources.parameters(tmp_path / "ours")
    sources.assert_same(fp8_sources.widened(have), sources.ours(wide))


def test_floats_are_rounded_by_the_largest_of_each_output(tmp_path: Path) -> None:
    hf = sources.tensors(MOE)
    path = sources.write_hf(tmp_path / "floats", MOE, hf)
    convert(path, tmp_path / "ours", dtype="fp8")
    have, want = sources.parameters(tmp_path / "ours"), sources.ours(hf)
    for name in ("embed.weight", "head.weight", "layers.0.feed_forward.router.weight"):
        np.testing.assert_array_equal(have[name], want[name])
    # Values of three bits of fraction: at most 1/16 off, or half of the smallest step, 2^-10.
    for name, outputs in {"feed_forward.down": 2, "attention.q": 2, "attention.o": 1}.items():
        weight = want[f"layers.1.{name}.weight"]
        scale = have[f"layers.1.{name}.scale"]
        axes = tuple(range(outputs, weight.ndim))
        np.testing.assert_allclose(scale, np.abs(weight).max(axis=axes) / 448, rtol=1e-6)
        step = np.expand_dims(scale, axes)
        off = np.abs(fp8_sources.widened(have)[f"layers.1.{name}.weight"] - weight)
        assert (off <= np.maximum(np.abs(weight) / 16, step * 2**-10) * (1 + 1e-6)).all()


def test_scales_of_blocks_are_widened_unless_fp8_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And then it is said how much the second rounding loses: some 2 % of the weights' size."""
    path, wide, _ = fp8_sources.write(tmp_path / "published", "block", DENSE)
    with caplog.at_level(logging.WARNING):
        assert convert(path, tmp_path / "wide").dtype == "bfloat16"
        assert "--dtype fp8 rounds those anew" in caplog.text
        convert(path, tmp_path / "ours", dtype="fp8")
    (message,) = (r.getMessage() for r in caplog.records if "were rounded anew" in r.getMessage())
    want = {name: value for name, value in sources.ours(wide).items() if "norm" not in name}
    have = fp8_sources.widened(sources.parameters(tmp_path / "ours"))
    names = [name for name in want if name.startswith("layers.")]
    off = sum(float(np.sum((have[name] - want[name]) ** 2)) for name in names)
    size = sum(float(np.sum(want[name] ** 2)) for name in names)
    assert f"{100 * (off / size) ** 0.5:.1f} %" in message
    assert 0.01 < (off / size) ** 0.5 < 0.03
    assert message.startswith(f"{7 * sources.L} parameters")


def test_a_layer_that_stays_float_is_not_rounded_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, wide, stored = fp8_sources.write(tmp_path / "published", "channel", DENSE)
    name = "model.layers.0.mlp.down_proj.weight"
    del stored[name.removesuffix("weight") + "weight_scale"]
    stored[name] = sources.tensors(DENSE, sources.BF16)[name]
    config = DENSE | {"quantization_config": fp8_sources.compressed_tensors("channel")}
    path = sources.write_hf(tmp_path / "mixed", config, stored)
    assert convert(path, tmp_path / "wide").dtype == "bfloat16"
    convert(path, tmp_path / "ours", dtype="fp8")
    assert "1 parameters are not FP8" in caplog.text


def test_what_fp8_is_not_for(tmp_path: Path) -> None:
    path, _, _ = fp8_sources.write(tmp_path / "published", "channel", DENSE)
    ours = tmp_path / "ours"
    card = convert(path, ours)
    with pytest.raises(ConfigError, match="stored as fp8 and cannot be loaded as bfloat16"):
        load(ours, dtype="bfloat16")
    with pytest.raises(ConversionError, match="stored as fp8 and only floats are exported"):
        export(ours, tmp_path / "hf")
    with pytest.raises(ConversionError, match="stored as fp8, where W"):
        MergedReader.open(ours, tmp_path)
    assert card.dtype == "fp8"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout", "dtype"),
    [("moe", "channel", "fp8"), ("dense", "tensor", "fp8"), ("moe", "deepseek", "float32")],
)
def test_tokens_are_those_of_transformers(
    tmp_path: Path, kind: str, layout: str, dtype: str
) -> None:
    """With the weights widened; those of blocks, transformers reads and widens by itself."""
    torch = pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
    import transformers

    config = {"moe": MOE, "dense": DENSE}[kind]
    theirs, wide, _ = fp8_sources.write(tmp_path / "published", layout, config)
    convert(theirs, tmp_path / "ours", dtype=dtype)
    if layout != "deepseek":
        theirs = sources.write_hf(tmp_path / "wide", config, wide)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        theirs, dtype=torch.float32, attn_implementation="eager"
    )
    reference = reference.float().eval()
    model, _ = load(tmp_path / "ours", mesh=None)
    assert model.placement.dtype == dtype
    prompt = np.random.default_rng(3).integers(0, sources.V, (1, 9))
    with torch.no_grad():
        want = reference(torch.from_numpy(prompt)).logits.numpy()
        answer = reference.generate(
            torch.from_numpy(prompt), max_new_tokens=32, do_sample=False, eos_token_id=None
        )
    have = model(jnp.asarray(prompt, jnp.int32))
    np.testing.assert_allclose(have, want, rtol=0, atol=1e-4)
    tokens = list(generate_tokens(model, prompt[0].tolist(), temperature=0.0, max_tokens=32))
    assert tokens == answer[0, prompt.shape[1] :].tolist()


KEPT = {layout: dtype for layout, (_, dtype) in LAYOUTS.items() if dtype}


def converted(
    tmp_path: Path, layout: str, kind: str, dtype: str | None = None, chunk_bytes: int = 32 << 20
) -> tuple[Folder, Path]:
    """A published folder and what it becomes."""
    folder = Folder(tmp_path / "published", layout, packed_sources.CONFIGS[kind])
    ours = tmp_path / str(dtype)
    card = convert(folder.path, ours, dtype=dtype, chunk_bytes=chunk_bytes)
    assert card.dtype == (dtype or KEPT[layout])
    return folder, ours


@pytest.mark.parametrize(
    ("kind", "layout", "chunk_bytes"),
    [
        *(("moe", layout, 4096) for layout in KEPT),
        ("dense", "gptq", 32 << 20),
        ("dense", "awq", 32 << 20),
    ],
)
def test_published_integers_are_kept(
    tmp_path: Path, kind: str, layout: str, chunk_bytes: int
) -> None:
    """Codes and scales bit by bit; a minimum is zero times scale, rounded to float16."""
    folder, path = converted(tmp_path, layout, kind, chunk_bytes=chunk_bytes)
    have = sources.parameters(path)
    wide = packed_sources.ours(folder.wide)
    codes = packed_sources.ours(folder.wide | folder.codes)
    zeros = packed_sources.ours(folder.wide | folder.zeros)
    num_rounded = 0
    for name, value in have.items():
        scale = have.get(name.removesuffix("weight") + "scale")
        if name.endswith(".scale"):
            continue
        if scale is None:
            np.testing.assert_array_equal(value, wide[name])
        elif not name.startswith("layers."):  # embedding and head
            rounded = Weight.quantized(jnp.asarray(wide[name]))
            np.testing.assert_array_equal(value, rounded.values)
            np.testing.assert_array_equal(scale, rounded.scale)
        elif KEPT[layout] == "int8":
            matrix = value.reshape(codes[name].shape)
            np.testing.assert_array_equal(matrix, codes[name] - 128)
            np.testing.assert_array_equal(matrix * scale.reshape(*matrix.shape[:-1], 1), wide[name])
            num_rounded += 1
        else:
            shape = codes[name].shape
            levels = np.asarray(unpacked(jnp.asarray(value.reshape(*shape[:-1], -1))))
            np.testing.assert_array_equal(levels, codes[name])
            pairs = scale.reshape(*shape[:-1], -1, 2).astype(np.float32).repeat(32, axis=-2)
            of_levels = np.float32(1) * (codes[name] - zeros[name])
            step = np.divide(wide[name], of_levels, where=of_levels != 0, out=pairs[..., 0].copy())
            np.testing.assert_array_equal(pairs[..., 0], step)
            minimum = (-zeros[name] * pairs[..., 0]).astype(np.float16)
            np.testing.assert_array_equal(pairs[..., 1], minimum)
            if layout in ("gptq", "packed"):  # a zero of 8, so that the minimum is exact
                np.testing.assert_array_equal(levels * pairs[..., 0] + pairs[..., 1], wide[name])
            num_rounded += 1
    assert num_rounded == 7 * packed_sources.L


def logits(model: Transformer) -> np.ndarray:
    ids = np.random.default_rng(3).integers(0, packed_sources.V, (2, 24))
    return np.asarray(jax.jit(lambda m, t: m(t))(model, jnp.asarray(ids, jnp.int32)))


@pytest.mark.parametrize(("kind", "layout"), [("moe", "gptq"), ("dense", "awq"), ("dense", "int8")])
def test_a_kept_model_answers_as_its_floats(tmp_path: Path, kind: str, layout: str) -> None:
    """Within 5 % of the logits' spread: rows are rounded to int8, and so are embedding and head."""
    folder, path = converted(tmp_path, layout, kind)
    convert(folder.path, tmp_path / "wide", dtype="float32")
    have = logits(load(path, mesh=None)[0])
    want = logits(load(tmp_path / "wide", mesh=None)[0])
    assert np.sqrt(np.mean((have - want) ** 2)) < 0.05 * np.std(want)


def test_a_layer_that_is_float_beside_integers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays float by default, and is rounded to the nearest where int4 is asked for."""
    folder = Folder(tmp_path / "published", "packed", packed_sources.DENSE)
    stem = "model.layers.0.mlp.down_proj."
    for ending in ("weight_packed", "weight_scale", "weight_shape"):
        del folder.stored[stem + ending]
    folder.stored[stem + "weight"] = folder.wide[stem + "weight"].astype(sources.BF16)
    path = sources.write_hf(tmp_path / "mixed", folder.config, folder.stored)
    assert convert(path, tmp_path / "wide").dtype == "bfloat16"
    assert "some weights are not integers of 4 bits" in caplog.text
    convert(path, tmp_path / "ours", dtype="int4", chunk_bytes=4096)
    assert "1 parameters are not integers of 4 bits in groups of 32" in caplog.text
    have = sources.parameters(tmp_path / "ours")
    want = Weight.quantized(
        jnp.asarray(folder.stored[stem + "weight"].astype(np.float32)), dtype="int4"
    )
    np.testing.assert_array_equal(have["layers.0.feed_forward.down.weight"], want.values)
    np.testing.assert_array_equal(have["layers.0.feed_forward.down.scale"], want.scale)


def test_integers_that_no_dtype_keeps_stay_floats(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(tmp_path / "published", "gptq in the order of sizes", packed_sources.DENSE)
    assert convert(folder.path, tmp_path / "wide").dtype == "float32"
    assert "consecutive inputs or a multiple: all are widened to float32" in caplog.text
    with pytest.raises(ConversionError, match="int4 is calibrated with a text.*tokenizer"):
        convert(folder.path, tmp_path / "ours", dtype="int4")


def test_a_scale_beyond_float16(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "published", "packed", packed_sources.DENSE)
    name = "model.layers.1.self_attn.o_proj.weight_scale"
    scale = folder.stored[name].copy()
    scale[3] = 1e5
    path = folder.write(tmp_path / "far", **{name.replace(".", "__"): scale})
    with pytest.raises(ConversionError, match=r"attention\.o\.scale has values that float16"):
        convert(path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_experts_made_of_a_dense_layer_are_kept(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "published", "awq", packed_sources.DENSE)
    assert convert(folder.path, tmp_path / "ours", upcycle_experts=2).dtype == "int4"
    convert(folder.path, tmp_path / "dense")
    have, want = (sources.parameters(tmp_path / name) for name in ("ours", "dense"))
    for end in ("weight", "scale"):
        name = f"layers.1.feed_forward.up.{end}"
        np.testing.assert_array_equal(have[name], np.stack([want[name]] * 2))


# Every type that int4 keeps, and others beside them, as files of mixed types have them.
MIXED = {
    "": Q.Q4_K,
    "attn_q": Q.Q4_0,
    "attn_k": Q.Q4_1,
    "attn_v": Q.Q6_K,
    "1.ffn_down": Q.Q5_K,
    "token_embd": Q.Q8_0,
    "output": Q.Q6_K,
}


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "moe"])
def test_a_gguf_file_of_four_bits_is_kept(
    tmp_path: Path, experts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Levels, scales and minima as they are, but those of Q4_K and Q6_K in float16; types that no
    dtype of ours has are rounded by groups of 16, and so many are named."""
    file = gguf_files.File(tmp_path / "mixed.gguf", MIXED, experts=experts)
    card = convert(file.path, tmp_path / "ours", dtype="int4", chunk_bytes=1 << 16)
    beside = [f"layers.{i}.attention.v" for i in range(2)] + ["layers.1.feed_forward.down"]
    assert card.weight_dtypes == tuple((name, "int8x16") for name in sorted(beside))
    assert "1 parameters are not GGUF's Q4_0, Q4_1, Q4_K, Q6_K or Q8_0" in caplog.text
    have = sources.parameters(tmp_path / "ours")
    for name, wide in file.wide.items():
        stem = name.removesuffix(".weight")
        scale = have.get(f"{stem}.scale")
        if scale is None:
            np.testing.assert_array_equal(have[name], wide)
        elif not name.startswith("layers."):  # embedding and head
            rounded = Weight.quantized(jnp.asarray(wide))
            np.testing.assert_array_equal(have[name], rounded.values)
            np.testing.assert_array_equal(scale, rounded.scale)
        else:
            weight = Weight(jnp.asarray(have[name]), jnp.asarray(scale))
            assert weight.is_int8_groups == (stem in beside)
            if stem == "layers.1.feed_forward.down":  # Q5_K
                # Half a step; at a group's end also what float16, whose smallest numbers are 2^-24
                # apart, takes from 127 of them.
                step = np.repeat(np.asarray(scale, np.float32), 16, axis=-1)
                off = step * (0.5 + 127 * 2**-11) + 127 * 2**-25
            elif "attention.q" in name or "attention.k" in name:
                off = np.zeros(())
            else:
                # Parts of Q4_K are at most 3e-4 * 63 * 15 and 1e-3 * 63, those of Q6_K 1e-4 * 30 *
                # 32, and they lose 2^-11 of that.
                off = np.asarray(0.35 * 2**-11)
            assert (np.abs(np.asarray(weight.widened(jnp.float32)) - wide) <= off).all()
    # A GGUF file stays floats unless it is asked for.
    assert convert(file.path, tmp_path / "wide").dtype == "float32"
    floats, kept = (load(tmp_path / name, mesh=None)[0] for name in ("wide", "ours"))
    off = logits(kept) - logits(floats)
    assert np.sqrt(np.mean(off**2)) < 0.05 * np.std(logits(floats))


def test_a_gguf_file_of_eight_bits_is_kept(tmp_path: Path) -> None:
    """As int8 in groups; a few weights of four bits are rounded to that, and int4 needs a text."""
    file = gguf_files.File(tmp_path / "a.gguf", {"": Q.Q8_0, "0.ffn_up": Q.Q4_0})
    card = convert(file.path, tmp_path / "ours", dtype="int8")
    assert (card.dtype, dict(card.weight_dtypes).keys()) == (
        "int8",
        {f"layers.{i}.{name}" for i in range(2) for name in LAYER_WEIGHTS},
    )
    have = sources.parameters(tmp_path / "ours")
    for name in ("layers.0.attention.q", "layers.1.feed_forward.up"):
        weight = Weight(*(jnp.asarray(have[f"{name}.{end}"]) for end in ("weight", "scale")))
        np.testing.assert_array_equal(weight.widened(jnp.float32), file.wide[f"{name}.weight"])
    with pytest.raises(ConversionError, match="int4 is calibrated with a text.*tokenizer"):
        convert(file.path, tmp_path / "int4", dtype="int4")


@pytest.mark.parametrize(
    ("dtype", "option", "remedy"),
    [
        (None, "mixed", "leave --mixed out; --dtype int4 keeps what this source is already"),
        ("bfloat16", "mixed", "leave --mixed out; --dtype int4 keeps what this source is already"),
        ("int8", "mixed", "leave --mixed out; --dtype int4 keeps what this source is already"),
        ("int4", "mixed", "this source is int4 already, leave --mixed out"),
        (None, "calibration", "give --dtype int8"),
        ("bfloat16", "calibration", "give --dtype int8"),
        (
            "int4",
            "calibration",
            "this source is int4 already, leave --calibration out or give --dtype int8",
        ),
    ],
)
def test_what_rounds_by_a_text_is_refused_where_all_is_kept(
    dtype: str | None, option: str, remedy: str, tmp_path: Path
) -> None:
    """With a remedy for each dtype: this file is int4 already."""
    file = gguf_files.File(tmp_path / "a.gguf", {"": Q.Q4_0})
    given: Any = {"mixed": True} if option == "mixed" else {"calibration": tmp_path / "text"}
    with pytest.raises(ConversionError, match=f"{option} is for .* here; {remedy}$"):
        convert(file.path, tmp_path / "ours", dtype=dtype, **given)


def test_a_gguf_scale_beyond_float16(tmp_path: Path) -> None:
    blocks = np.zeros((1, 18), np.uint8)
    blocks[0, :2] = np.frombuffer(np.float16(60_000).tobytes(), np.uint8)
    assert np.isinf(gguf_blocks.pairs(blocks, "Q4_0")[0, 0, 1])  # -8 d: the writer refuses it
