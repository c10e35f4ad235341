"""Each fault of a source is named, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.convert import convert
from convert.errors import ConversionError
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support import sources


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    path, _ = sources.write(tmp_path / "src", "folder", sources.DENSE, np.float32)
    ByteTokenizer().save(path)
    with pytest.raises(ConversionError, match="model has 67; it belongs to another model"):
        convert(path, tmp_path / "dst")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("config, experts", [(sources.MOE, 4), (sources.DENSE, 1)])
def test_upcycling_that_makes_no_sense(
    tmp_path: Path, config: dict[str, Any], experts: int
) -> None:
    path, _ = sources.write(tmp_path / "src", "folder", config, np.float32)
    with pytest.raises(ConversionError, match="upcycle_experts"):
        convert(path, tmp_path / "dst", upcycle_experts=experts)


@pytest.mark.parametrize(
    ("config", "field", "experts"),
    [
        (sources.DENSE, "num_hidden_layers", 0),
        (sources.MOE, "num_local_experts", 0),
        (sources.DENSE, "upcycle_experts", 10**9),
    ],
)
def test_a_size_beyond_all_tensors_is_refused_at_once(
    tmp_path: Path, config: dict[str, Any], field: str, experts: int
) -> None:
    path, hf = sources.write(tmp_path / "src", "folder", config, np.float32)
    if not experts:
        edit_json(path, "config.json", lambda content: content.update({field: 10**9}))
    with pytest.raises(ConversionError, match=rf"{field}=1000000000") as error:
        convert(path, tmp_path / "dst", upcycle_experts=experts)
    assert len(error.value.problems) == 1
    assert experts or f"the {len(hf)} tensors" in str(error.value)


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


def ggml_type(folder: Path) -> None:
    """A tensor of a type that was removed from GGML, Q4_0_4_4."""
    shutil.rmtree(folder)
    path = sources.write_gguf(folder / "a.gguf", sources.tensors(sources.DENSE))
    name = b"blk.1.attn_q.weight"
    content = path.read_bytes()
    place = content.index(name) + len(name) + 4 + 2 * 8
    path.write_bytes(content[:place] + (31).to_bytes(4, "little") + content[place + 4 :])


def only_head_untied(folder: Path) -> None:
    name = "model.embed_tokens.weight"
    change(folder, holding(folder, name), lambda c: c.pop(name))
    edit_json(folder, INDEX, lambda c: c["weight_map"].pop(name))


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
        (ggml_type, r"tensor blk\.1\.attn_q\.weight is stored as GGML type 31, .* fetch the"),
        (only_head_untied, r"tensor model\.embed_tokens\.weight is missing"),
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


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = sources.write(tmp_path / "src", "folder", sources.DENSE, np.float32)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ConversionError, match="free there"):
        convert(path, tmp_path / "a" / "b" / "dst")
    assert list(tmp_path.iterdir()) == [path]
