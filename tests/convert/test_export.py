"""There and back again: bit for bit, and transformers computes with it what it did before."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.convert import convert
from convert.errors import ConversionError
from convert.export import INDEX_FILE, cut, export
from convert.source.safetensors import safetensors_header
from mixtral_jax.checkpoint import writer
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.writer import ParameterReader
from mixtral_jax.errors import ConfigError
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.transformer import named_parameters
from mixtral_jax.tokenization import tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support import parity, sources
from tests.support.models import model_of


def everything(folder: Path) -> sources.Tensors:
    """All tensors of a Hugging Face folder, by the library; each must be where the index says."""
    placed = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(placed.values())}
    assert {path.name for path in folder.glob("*.safetensors")} == files.keys()
    found = {name: files[file][name] for name, file in placed.items()}
    assert sum(map(len, files.values())) == len(found)
    return found


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), sources.BF16], ids=str)
@pytest.mark.parametrize("form", ["experts one by one", "fused", "dense", "tied"])
@pytest.mark.parametrize("chunk_bytes", [1 << 25, 3 * 4 * sources.H * sources.D])
def test_there_and_back_is_bit_equal(
    tmp_path: Path, form: str, dtype: Any, chunk_bytes: int
) -> None:
    tie = dict(tie_word_embeddings=form == "tied")
    config = (sources.DENSE if form in ("dense", "tied") else sources.MOE) | tie
    hf = sources.tensors(config, dtype)
    source = sources.fused(hf) if form == "fused" else hf
    sources.write_hf(tmp_path / "src", config, source, shards=2)
    convert(tmp_path / "src", tmp_path / "ours", chunk_bytes=chunk_bytes)
    export(tmp_path / "ours", tmp_path / "back", shard_bytes=40_000, chunk_bytes=chunk_bytes)
    sources.assert_same(everything(tmp_path / "back"), hf)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert from_hf(back) == from_hf(config)


@pytest.mark.parametrize("kind", parity.MODELS)
def test_transformers_computes_the_same(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
    import transformers

    theirs = parity.huggingface(kind)
    theirs.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager"
    )
    assert again.dtype == torch.float32
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_a_model_saved_from_memory(tmp_path: Path) -> None:
    """As training saves it: Orbax chose the chunks, and compressed them."""
    config = from_hf(sources.MOE)
    model = model_of(config, dtype="bfloat16")
    card = Card(model=config, dtype="bfloat16", name="mine", provider="me")
    writer.save(tmp_path / "ours", model, card, [])
    assert export(tmp_path / "ours", tmp_path / "hf") == card
    convert(tmp_path / "hf", tmp_path / "again")
    want = {name: np.asarray(v.get_value()) for name, v in named_parameters(model).items()}
    sources.assert_same(sources.parameters(tmp_path / "again"), want)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    vocab_size = ByteTokenizer().vocab_size
    config = from_hf(sources.MOE | dict(vocab_size=vocab_size))
    model = model_of(config, dtype="float32")
    card = Card(model=config, dtype="float32", name="mine", provider="me")
    (tmp_path / "words").mkdir()
    ByteTokenizer().save(tmp_path / "words")
    writer.save(tmp_path / "ours", model, card, tokenizer.files(tmp_path / "words"))
    return tmp_path / "ours"


def test_tokenizer_and_progress(ours: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    export(ours, tmp_path / "hf", progress=lambda *call: calls.append(call))
    assert isinstance(tokenizer.load(tmp_path / "hf"), ByteTokenizer)
    total = sum(value.nbytes for value in everything(tmp_path / "hf").values())
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert json.loads((tmp_path / "hf" / INDEX_FILE).read_text())["metadata"] == {
        "total_size": total
    }


def test_shards_are_cut_by_size() -> None:
    """Float32: 40, 40, 120 and 4 bytes into files of at most 100, where one tensor needs more."""
    shards = cut({"a": (10,), "b": (5, 2), "c": (30,), "d": (1,)}, 4, 100)
    assert [dict(shard.offsets) for shard in shards] == [{"a": 0, "b": 40}, {"c": 0}, {"d": 0}]
    assert [shard.nbytes for shard in shards] == [80, 120, 4]
    assert shards[2].file == "model-00003-of-00003.safetensors"


def test_our_header_reads_as_ours(tmp_path: Path) -> None:
    (shard,) = cut({"a": (10,), "b": (5, 2)}, 4, 100)
    path = tmp_path / "a.safetensors"
    path.write_bytes(shard.header("float32") + bytes(80))
    found = safetensors_header(path)
    assert {name: (t.shape, t.encoding) for name, t in found.items()} == {
        "a": ((10,), "F32"),
        "b": ((5, 2), "F32"),
    }
    assert found["a"].offset % 8 == 0


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(ConfigError, match="is not a mixtral-jax checkpoint"):
        export(tmp_path / "src", tmp_path / "hf")


def test_nothing_is_left_of_a_failed_export(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, name: str, index: Any, out: np.ndarray) -> None:
        if "router" in name:
            raise OSError("the disk is gone")
        out[...] = 0

    before = set(tmp_path.iterdir())
    monkeypatch.setattr(ParameterReader, "read", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        export(ours, tmp_path / "hf")
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    with pytest.raises(ConversionError, match="free there"):
        export(ours, tmp_path / "hf")
    assert set(tmp_path.iterdir()) == before


def test_a_checkpoint_that_contradicts_its_config(ours: Path, tmp_path: Path) -> None:
    content = json.loads((ours / "config.json").read_text())
    content["dtype"] = "bfloat16"
    (ours / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="embed.weight is .*float32"):
        export(ours, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
