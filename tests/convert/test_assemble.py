"""Every form of the same weights gives the same parameters."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import quants

from convert.convert import convert
from convert.source.read import Reader
from mixtral_jax.checkpoint import restore
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.parameters import CHUNK_BYTES
from mixtral_jax.config import ModelConfig
from mixtral_jax.hf_config import from_hf
from mixtral_jax.tokenization import tokenizer
from tests.support import parity, sources

CONFIGS = {"dense": sources.DENSE, "moe": sources.MOE}


@pytest.fixture(params=["whole", "cut small"])
def chunk_bytes(request: pytest.FixtureRequest) -> int:
    """Checkpoints of one chunk a parameter, and of several: 3, 3 and 2 of 8 heads in f32."""
    return 3 * 4 * sources.H * sources.D if request.param == "cut small" else CHUNK_BYTES


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), sources.BF16], ids=str)
@pytest.mark.parametrize(
    "form, kind",
    [
        ("one file", "dense"),
        ("index", "dense"),
        ("consolidated", "dense"),
        ("folder", "moe"),
        ("shards", "moe"),
        ("fused", "moe"),
        ("consolidated", "moe"),
    ],
)
def test_every_form_gives_the_same_parameters(
    tmp_path: Path, form: str, kind: str, dtype: np.dtype, chunk_bytes: int
) -> None:
    path, hf = sources.write(tmp_path / "src", form, CONFIGS[kind], dtype)
    card = convert(path, tmp_path / "dst", chunk_bytes=chunk_bytes)
    assert card.model == from_hf(CONFIGS[kind])
    assert card.dtype == dtype.name
    assert card == Card.read(tmp_path / "dst")
    sources.assert_same(sources.parameters(tmp_path / "dst"), sources.ours(hf))


@pytest.mark.parametrize("kind", CONFIGS)
def test_gguf(tmp_path: Path, kind: str, chunk_bytes: int) -> None:
    path, hf = sources.write(tmp_path / "src", "gguf", CONFIGS[kind], np.float32)
    card = convert(path, tmp_path / "dst", chunk_bytes=chunk_bytes)
    assert card.model == from_hf(CONFIGS[kind])
    sources.assert_same(sources.parameters(tmp_path / "dst"), sources.ours(hf))


def test_quantised_gguf_with_tied_embeddings(tmp_path: Path) -> None:
    hf = sources.tensors(sources.DENSE | dict(tie_word_embeddings=True))
    card = convert(sources.write_gguf(tmp_path / "a.gguf", hf, Q.Q8_0), tmp_path / "dst")
    assert card.model.tied_embeddings
    assert card.dtype == "float32"
    # Rows are quantised one by one, so their order does not matter to what is lost.
    lossy = {
        name: quants.dequantize(quants.quantize(value, Q.Q8_0), Q.Q8_0) if value.ndim > 1 else value
        for name, value in hf.items()
    }
    sources.assert_same(sources.parameters(tmp_path / "dst"), sources.ours(lossy))


@pytest.mark.slow
@pytest.mark.parametrize("kind", parity.MODELS)
def test_what_transformers_saves_computes_the_same(tmp_path: Path, kind: str) -> None:
    theirs = parity.huggingface(kind)
    theirs.save_pretrained(tmp_path / "src", max_shard_size="50KB")
    convert(tmp_path / "src", tmp_path / "dst")
    found = sources.parameters(tmp_path / "dst")
    want = parity.named_parameters(parity.twin(theirs))
    assert found.keys() == want.keys()
    for name, variable in want.items():
        np.testing.assert_array_equal(found[name], variable.get_value(), err_msg=name)


@pytest.mark.parametrize(
    "stored, asked, want",
    [
        (np.float32, None, "float32"),
        (sources.BF16, None, "bfloat16"),
        (np.float16, None, "float32"),
        (np.float32, "bfloat16", "bfloat16"),
        (sources.BF16, "float32", "float32"),
    ],
)
def test_dtypes(tmp_path: Path, stored: Any, asked: str | None, want: str) -> None:
    path, hf = sources.write(tmp_path / "src", "folder", sources.DENSE, stored)
    assert convert(path, tmp_path / "dst", dtype=asked).dtype == want
    rounded = {name: value.astype(want) for name, value in sources.ours(hf).items()}
    sources.assert_same(sources.parameters(tmp_path / "dst"), rounded)


def test_derived_constants_and_copies_of_tied_embeddings_are_passed_over(tmp_path: Path) -> None:
    config = sources.DENSE | dict(tie_word_embeddings=True)
    hf = sources.tensors(config)
    extra = {
        "lm_head.weight": hf["model.embed_tokens.weight"],
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    convert(sources.write_hf(tmp_path / "src", config, hf | extra), tmp_path / "dst")
    sources.assert_same(sources.parameters(tmp_path / "dst"), sources.ours(hf))


@pytest.mark.parametrize("form", ["hf", "consolidated"])
def test_tied_embeddings_may_be_stored_as_the_head(tmp_path: Path, form: str) -> None:
    """Of two names for one tensor, safetensors keeps the first in the alphabet: lm_head.weight."""
    config = sources.DENSE | dict(tie_word_embeddings=True)
    hf = sources.tensors(config)
    want = sources.ours(hf)
    hf["lm_head.weight"] = hf.pop("model.embed_tokens.weight")
    if form == "hf":
        path = sources.write_hf(tmp_path / "src", config, hf, shards=2)
    else:
        params = sources.PARAMS | dict(tied_embeddings=True)
        path = sources.write_consolidated(tmp_path / "src", params, hf)
    assert convert(path, tmp_path / "dst").model.tied_embeddings
    sources.assert_same(sources.parameters(tmp_path / "dst"), want)


@pytest.mark.slow
def test_upcycled_equals_dense(tmp_path: Path) -> None:
    path, hf = sources.write(tmp_path / "src", "index", sources.DENSE, np.float32)
    convert(path, tmp_path / "dense")
    card = convert(path, tmp_path / "moe", upcycle_experts=4, seed=1)
    assert (card.model.num_experts, card.model.experts_per_token) == (4, 2)
    dense, moe = (restore.load(tmp_path / name)[0] for name in ("dense", "moe"))
    gate = np.asarray(moe.layers[1].feed_forward.gate.weight[...])
    for expert in range(4):
        np.testing.assert_array_equal(gate[expert], hf["model.layers.1.mlp.gate_proj.weight"])
    router = np.asarray(moe.layers[0].feed_forward.router.weight[...])
    assert 0.015 < router.std() < 0.025
    ids = np.random.default_rng(0).integers(0, sources.V, (2, 20), np.int32)
    want, found = (jax.jit(lambda m, i: m(i))(model, jnp.asarray(ids)) for model in (dense, moe))
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)

    convert(path, tmp_path / "again", upcycle_experts=4, seed=1)
    sources.assert_same(
        sources.parameters(tmp_path / "again"), sources.parameters(tmp_path / "moe")
    )


def test_nothing_is_left_when_reading_fails_halfway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = sources.write(tmp_path / "src", "folder", sources.DENSE, np.float32)

    def fail(self: Any, tensor: Any, start: int, out: np.ndarray) -> None:
        if tensor.shape == (sources.F, sources.D):
            raise OSError("the disk is gone")
        out[...] = 0

    monkeypatch.setattr(Reader, "read", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        convert(path, tmp_path / "dst")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.soak
def test_the_real_smollm2_computes_what_transformers_computes(
    smollm2_gguf: Path, smollm2: Path
) -> None:
    torch = pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    model, card = restore.load(smollm2)
    assert card.model == ModelConfig.smollm2_135m()
    words = tokenizer.load(smollm2)
    ids = np.asarray([words.encode("The quick brown fox jumps over the lazy")], np.int32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids).long()).logits.numpy()
    found = np.asarray(jax.jit(lambda m, i: m(i))(model, jnp.asarray(ids)))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-3)
    assert words.decode([int(found[0, -1].argmax())]).strip() == "dog"
