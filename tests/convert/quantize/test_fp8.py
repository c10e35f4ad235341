"""fp8: what is published so is kept bit by bit, everything else is rounded once and counted."""

import logging
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from convert.convert import convert
from convert.errors import ConversionError
from convert.export import export
from convert.merge import MergedReader
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.pretrained import load
from mixtral_jax.errors import ConfigError
from mixtral_jax.generation import generate_tokens
from tests.support import fp8_sources, sources
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
