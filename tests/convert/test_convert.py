"""Every form of the same weights gives the same checkpoint; what is wrong is said, and undone."""

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import quants
from safetensors.numpy import load_file, save_file

from convert.convert import convert
from convert.errors import ConversionError
from convert.source.read import Reader
from mixtral_jax.checkpoint import restore
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.parameters import CHUNK_BYTES
from mixtral_jax.checkpoint.writer import ParameterReader, ParameterWriter
from mixtral_jax.config import ModelConfig, is_checkpoint
from mixtral_jax.hf_config import from_hf
from mixtral_jax.tokenization import tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support import parity, sources

CONFIGS = {"dense": sources.DENSE, "moe": sources.MOE}


@pytest.fixture(params=["whole", "cut small"])
def chunk_bytes(request: pytest.FixtureRequest) -> int:
    """Checkpoints of one chunk a parameter, and of several: 3, 3 and 2 of 8 heads in f32."""
    return 3 * 4 * sources.H * sources.D if request.param == "cut small" else CHUNK_BYTES


def source(folder: Path, form: str, config: dict[str, Any], dtype: Any) -> tuple[Path, Any]:
    """A source in the given form, and the tensors that it was made of."""
    hf = sources.tensors(config, dtype)
    params = sources.MOE_PARAMS if config is sources.MOE else sources.PARAMS
    makers: dict[str, Callable[[], Path]] = {
        "one file": lambda: sources.write_hf(folder, config, hf) / "model.safetensors",
        "folder": lambda: sources.write_hf(folder, config, hf),
        "index": lambda: sources.write_hf(folder, config, hf, shards=4),
        "shards": lambda: sources.write_hf(folder, config, hf, shards=3, index=False),
        "fused": lambda: sources.write_hf(folder, config, sources.fused(hf), shards=2),
        "consolidated": lambda: sources.write_consolidated(folder, params, hf),
        "gguf": lambda: sources.write_gguf(
            folder / "a.gguf", hf, llama__attention__sliding_window=5
        ),
    }
    return makers[form](), hf


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
    path, hf = source(tmp_path / "src", form, CONFIGS[kind], dtype)
    card = convert(path, tmp_path / "dst", chunk_bytes=chunk_bytes)
    assert card.model == from_hf(CONFIGS[kind])
    assert card.dtype == dtype.name
    assert card == Card.read(tmp_path / "dst")
    sources.assert_same(sources.parameters(tmp_path / "dst"), sources.ours(hf))


@pytest.mark.parametrize("kind", CONFIGS)
def test_gguf(tmp_path: Path, kind: str, chunk_bytes: int) -> None:
    path, hf = source(tmp_path / "src", "gguf", CONFIGS[kind], np.float32)
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
    path, hf = source(tmp_path / "src", "folder", sources.DENSE, stored)
    assert convert(path, tmp_path / "dst", dtype=asked).dtype == want
    rounded = {name: value.astype(want) for name, value in sources.ours(hf).items()}
    sources.assert_same(sources.parameters(tmp_path / "dst"), rounded)


def test_hugging_face_goes_before_consolidated(tmp_path: Path) -> None:
    path, hf = source(tmp_path / "src", "folder", sources.DENSE, np.float32)
    zeros = {name: np.zeros_like(value) for name, value in hf.items()}
    sources.write_consolidated(path, sources.PARAMS, zeros)
    convert(path, tmp_path / "dst")
    sources.assert_same(sources.parameters(tmp_path / "dst"), sources.ours(hf))


def test_derived_constants_and_copies_of_tied_embeddings_are_passed_over(tmp_path: Path) -> None:
    config = sources.DENSE | dict(tie_word_embeddings=True)
    hf = sources.tensors(config)
    extra = {
        "lm_head.weight": hf["model.embed_tokens.weight"],
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    convert(sources.write_hf(tmp_path / "src", config, hf | extra), tmp_path / "dst")
    sources.assert_same(sources.parameters(tmp_path / "dst"), sources.ours(hf))


def test_progress_and_names(tmp_path: Path) -> None:
    path, hf = source(tmp_path / "Mistral-7B-v0.1", "folder", sources.DENSE, np.float32)
    calls: list[tuple[int, int]] = []
    card = convert(path, tmp_path / "dst", progress=lambda *call: calls.append(call))
    assert (card.name, card.provider) == ("mistralai-Mistral-7B-v01", "MistralAI")
    total = sum(value.nbytes for value in hf.values())
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    card = convert(path, tmp_path / "other", name="mine", provider="me")
    assert (card.name, card.provider) == ("mine", "me")


def test_a_piece_may_change_once_it_is_written(tmp_path: Path) -> None:
    """Buffers are used again. The smallest arrays are kept elsewhere by the store: try both."""
    shapes = {
        name: jax.ShapeDtypeStruct((size,), jnp.float32)
        for name, size in dict(a=8, b=8, c=100_000, d=100_000).items()
    }
    writer = ParameterWriter(tmp_path, shapes)
    for number, (name, shape) in enumerate(shapes.items()):
        buffer = np.full(shape.shape, number, np.float32)
        writer.write(name, (slice(None),), buffer)
        buffer[...] = -1
    reader = ParameterReader(tmp_path)
    for number, (name, shape) in enumerate(shapes.items()):
        out = np.empty(shape.shape, np.float32)
        reader.read(name, (slice(None),), out)
        np.testing.assert_array_equal(out, number)


# --- the tokenizer beside the weights ---


def test_tokenizer_files_are_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = sources.DENSE | dict(vocab_size=ByteTokenizer().vocab_size)
    hf = sources.tensors(config)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        hf[name] = np.ones((config["vocab_size"], sources.D), np.float32)
    path = sources.write_hf(tmp_path / "src", config, hf)
    ByteTokenizer().save(path)
    convert(path, tmp_path / "dst")
    assert isinstance(tokenizer.load(tmp_path / "dst"), ByteTokenizer)
    assert not caplog.records


def test_a_missing_tokenizer_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = source(tmp_path / "src", "folder", sources.DENSE, np.float32)
    with caplog.at_level(logging.WARNING):
        convert(path, tmp_path / "dst")
    assert "without a tokenizer, the checkpoint cannot be served: found no" in caplog.text


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    path, _ = source(tmp_path / "src", "folder", sources.DENSE, np.float32)
    ByteTokenizer().save(path)
    with pytest.raises(ConversionError, match="model has 67; it belongs to another model"):
        convert(path, tmp_path / "dst")
    assert list(tmp_path.iterdir()) == [path]


# --- upcycling ---


def test_upcycled_equals_dense(tmp_path: Path) -> None:
    path, hf = source(tmp_path / "src", "index", sources.DENSE, np.float32)
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


@pytest.mark.parametrize("config, experts", [(sources.MOE, 4), (sources.DENSE, 1)])
def test_upcycling_that_makes_no_sense(
    tmp_path: Path, config: dict[str, Any], experts: int
) -> None:
    path, _ = source(tmp_path / "src", "folder", config, np.float32)
    with pytest.raises(ConversionError, match="upcycle_experts"):
        convert(path, tmp_path / "dst", upcycle_experts=experts)


# --- what can be wrong ---

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


def change(folder: Path, shard: str, edit: Callable[[sources.Tensors], Any]) -> None:
    content = load_file(folder / shard)
    edit(content)
    (folder / shard).unlink()
    save_file(content, folder / shard)


def holding(folder: Path, name: str) -> str:
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_json(folder: Path, file: str, edit: Callable[[Any], Any]) -> None:
    content = json.loads((folder / file).read_text())
    edit(content)
    (folder / file).write_text(json.dumps(content))


def unknown(folder: Path) -> None:
    bias = np.zeros(64, np.float32)
    change(folder, SHARDS[0], lambda c: c.update({"model.layers.0.self_attn.q_proj.bias": bias}))


def missing(folder: Path) -> None:
    change(folder, holding(folder, Q_PROJ), lambda c: c.pop(Q_PROJ))
    edit_json(folder, INDEX, lambda c: c["weight_map"].pop(Q_PROJ))


def duplicated(folder: Path) -> None:
    (other,) = [s for s in SHARDS[:2] if s != holding(folder, Q_PROJ)][:1]
    change(folder, other, lambda c: c.update({Q_PROJ: np.zeros((64, 32), np.float32)}))


def misshapen(folder: Path) -> None:
    shard = holding(folder, Q_PROJ)
    change(folder, shard, lambda c: c.update({Q_PROJ: c[Q_PROJ].T.copy()}))


def integers(folder: Path) -> None:
    shard = holding(folder, Q_PROJ)
    change(folder, shard, lambda c: c.update({Q_PROJ: c[Q_PROJ].astype(np.int8)}))


def truncated(folder: Path) -> None:
    (folder / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes()[:-1000])


def absent(folder: Path) -> None:
    (folder / SHARDS[2]).unlink()


def misplaced(folder: Path) -> None:
    change(folder, holding(folder, Q_PROJ), lambda c: c.pop(Q_PROJ))


def outside(folder: Path) -> None:
    edit_json(folder, INDEX, lambda c: c["weight_map"].update({Q_PROJ: "../secret.safetensors"}))


def garbage_index(folder: Path) -> None:
    (folder / INDEX).write_text("[]")


def strange_field(folder: Path) -> None:
    edit_json(folder, "config.json", lambda c: c.update(attention_sink=4))


def scaled(folder: Path) -> None:
    edit_json(folder, "config.json", lambda c: c.update(rope_scaling={"type": "yarn"}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_head(folder: Path) -> None:
    change(folder, holding(folder, "lm_head.weight"), lambda c: c.pop("lm_head.weight"))
    edit_json(folder, INDEX, lambda c: c["weight_map"].pop("lm_head.weight"))


def not_tied(folder: Path) -> None:
    edit_json(folder, "config.json", lambda c: c.update(tie_word_embeddings=True))


def pickles(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").touch()


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def two_ggufs(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "a.gguf").touch()
    (folder / "b.gguf").touch()


def rope_freqs(folder: Path) -> None:
    hf = sources.tensors(sources.DENSE) | {"rope_freqs.weight": np.ones(4, np.float32)}
    shutil.rmtree(folder)
    sources.write_gguf(folder / "a.gguf", hf)


@pytest.mark.parametrize(
    "damage, says",
    [
        (unknown, r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is not known"),
        (missing, rf"tensor {Q_PROJ} is missing"),
        (duplicated, rf"tensor {Q_PROJ} is in both .*safetensors and .*safetensors"),
        (misshapen, rf"tensor {Q_PROJ} has shape \[32, 64\] where .* \[64, 32\]"),
        (integers, rf"tensor {Q_PROJ} is stored as I8, .* fetch the weights as bf16"),
        (truncated, rf"{SHARDS[1]} has \d+ bytes where its header promises \d+: it was cut short"),
        (absent, rf"{INDEX} names {SHARDS[2]}, which is not in .*; fetch it"),
        (misplaced, rf"{INDEX} places {Q_PROJ} in .*, which lacks it"),
        (outside, r"names \.\./secret\.safetensors, which is not in"),
        (garbage_index, rf"{INDEX} is malformed"),
        (strange_field, r"config\.json: config field attention_sink=4 is not known"),
        (scaled, r"config\.json: config field rope_scaling=.* is not supported"),
        (no_config, r"has safetensors but no config\.json; fetch it"),
        (no_head, r"lm_head\.weight is missing; if embeddings are tied, the config must say so"),
        (not_tied, r"lm_head\.weight differs from .*correct tie_word_embeddings"),
        (pickles, r"pytorch_model-00001-of-00002\.bin is a pickle, .* as safetensors"),
        (nothing, r"does not exist"),
        (two_ggufs, r"several GGUF files; name one of them: a\.gguf, b\.gguf"),
        (rope_freqs, r"rope_freqs\.weight: it rescales the rotary frequencies"),
    ],
)
def test_one_fault_is_named_and_nothing_is_left(
    tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    path = sources.write_hf(
        tmp_path / "src", sources.DENSE, sources.tensors(sources.DENSE), shards=3
    )
    damage(path)
    with pytest.raises(ConversionError, match=says) as error:
        convert(path, tmp_path / "dst")
    assert len(error.value.problems) == 1
    assert {each.name for each in tmp_path.iterdir()} <= {"src"}


def test_many_faults_are_reported_together(tmp_path: Path) -> None:
    hf = sources.tensors(sources.MOE)
    for e in range(3):
        del hf[f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight"]
    renamed = {name.replace("layers.2", "layers.7"): value for name, value in hf.items()}
    with pytest.raises(ConversionError) as error:
        convert(sources.write_hf(tmp_path / "src", sources.MOE, renamed), tmp_path / "dst")
    # Layer 2 has six tensors and a router with three experts of three: 16, missing and left over.
    assert len(error.value.problems) == 3 + 16 + 16
    assert len(str(error.value).splitlines()) == 11
    assert str(error.value).endswith("and 25 more")


def test_a_destination_that_is_taken(tmp_path: Path) -> None:
    path, _ = source(tmp_path / "src", "folder", sources.DENSE, np.float32)
    (tmp_path / "dst").mkdir()
    convert(path, tmp_path / "dst")  # an empty folder is welcome
    before = sources.parameters(tmp_path / "dst")
    with pytest.raises(FileExistsError, match="not empty"):
        convert(path, tmp_path / "dst")
    sources.assert_same(sources.parameters(tmp_path / "dst"), before)
    with pytest.raises(ConversionError, match="is a mixtral-jax checkpoint already"):
        convert(tmp_path / "dst", tmp_path / "other")


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = source(tmp_path / "src", "folder", sources.DENSE, np.float32)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ConversionError, match="free there"):
        convert(path, tmp_path / "a" / "b" / "dst")
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_when_reading_fails_halfway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = source(tmp_path / "src", "folder", sources.DENSE, np.float32)

    def fail(self: Any, tensor: Any, start: int, out: np.ndarray) -> None:
        if tensor.shape == (sources.F, sources.D):
            raise OSError("the disk is gone")
        out[...] = 0

    monkeypatch.setattr(Reader, "read", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        convert(path, tmp_path / "dst")
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="dtype 'int4' is not supported"):
        convert(tmp_path, tmp_path / "dst", dtype="int4")


@pytest.mark.slow
def convert_and_die(source: Path, destination: Path, moment: int, seen: Any) -> None:
    """Killed at a file operation by its number; `seen` counts them."""

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            seen.value += 1
            if seen.value == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    convert(source, destination)


def test_killed_at_any_moment_it_leaves_all_or_nothing(tmp_path: Path) -> None:
    config = sources.MOE | dict(num_hidden_layers=12)
    one = sources.tensors(sources.MOE)
    hf = {name: value for name, value in one.items() if "layers" not in name}
    for i in range(12):
        for name, value in one.items():
            if "layers.0." in name:
                hf[name.replace("layers.0.", f"layers.{i}.")] = value
    path = sources.write_hf(tmp_path / "src", config, hf, shards=3)
    # Processes that have imported everything before they begin, so that little time is lost.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["convert.convert"])

    def attempt(folder: Path, moment: int) -> tuple[int | None, int]:
        seen = context.Value("q", 0, lock=False)
        process = context.Process(target=convert_and_die, args=(path, folder, moment, seen))
        process.start()
        process.join()
        return process.exitcode, seen.value

    code, moments = attempt(tmp_path / "whole", 0)
    assert code == 0
    want = sources.parameters(tmp_path / "whole")
    generator = random.Random(0)
    for turn in range(5):
        folder = tmp_path / f"dst{turn}"
        moment = int(moments * (turn + generator.random()) / 5)
        # Threads share the work: a run may have a few operations less than another.
        assert attempt(folder, moment)[0] == -signal.SIGKILL or turn == 4
        if not is_checkpoint(folder):
            assert not folder.exists()
            assert attempt(folder, 0)[0] == 0
        sources.assert_same(sources.parameters(folder), want)
        assert not list(tmp_path.glob(".*"))


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
