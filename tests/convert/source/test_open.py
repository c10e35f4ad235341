"""A folder's form is recognised, and files that are not the model's are passed over."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.convert import convert
from convert.errors import ConversionError
from convert.source.open import open_source
from tests.support import sources


def test_hugging_face_goes_before_consolidated(tmp_path: Path) -> None:
    path, hf = sources.write(tmp_path / "src", "folder", sources.DENSE, np.float32)
    zeros = {name: np.zeros_like(value) for name, value in hf.items()}
    sources.write_consolidated(path, sources.PARAMS, zeros)
    convert(path, tmp_path / "dst")
    sources.assert_same(sources.parameters(tmp_path / "dst"), sources.ours(hf))


def test_hidden_files_of_macos_are_passed_over(tmp_path: Path) -> None:
    """Beside NAME, macOS puts "._NAME" on disks that cannot hold its attributes."""
    hf = sources.tensors(sources.DENSE)
    makers: dict[str, Callable[[Path], Path]] = {
        "shards": lambda path: sources.write_hf(path, sources.DENSE, hf, shards=2, index=False),
        "index": lambda path: sources.write_hf(path, sources.DENSE, hf, shards=2),
        "consolidated": lambda path: sources.write_consolidated(path, sources.PARAMS, hf),
        "gguf": lambda path: sources.write_gguf(path / "a.gguf", hf).parent,
    }
    for form, make in makers.items():
        folder = make(tmp_path / form)
        for file in list(folder.iterdir()):
            (folder / f"._{file.name}").write_bytes(bytes.fromhex("0005160700020000") + bytes(99))
        source = open_source(folder)
        assert not source.problems
        names = {tensor.file.name for tensor in source.tensors.values()}
        assert names and not [name for name in names if name.startswith(".")]
        assert len(source.tensors) == len(hf)
    only_hidden = tmp_path / "hidden"
    only_hidden.mkdir()
    (only_hidden / "._model.gguf").touch()
    with pytest.raises(ConversionError, match="holds no weights that can be read"):
        open_source(only_hidden)


def test_an_index_whose_shards_are_gone_says_nothing(tmp_path: Path) -> None:
    """As when a merged model is saved into the folder of the old one."""
    hf = sources.tensors(sources.DENSE)
    folder = sources.write_hf(tmp_path / "src", sources.DENSE, hf, shards=2)
    shards = list(folder.glob("model-*.safetensors"))
    save_file(hf, folder / "model.safetensors")
    for shard in shards:
        shard.unlink()
    source = open_source(folder)
    assert not source.problems
    assert {tensor.file.name for tensor in source.tensors.values()} == {"model.safetensors"}


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("num_left", [1, 2])
def test_a_whole_file_and_shards_are_ambiguous(tmp_path: Path, index: bool, num_left: int) -> None:
    """transformers would take the whole file, vLLM and MLX the index; these may be two models."""
    hf = sources.tensors(sources.DENSE)
    folder = sources.write_hf(tmp_path / "src", sources.DENSE, hf, shards=2, index=index)
    save_file(hf, folder / "model.safetensors")
    for shard in sorted(folder.glob("model-*.safetensors"))[num_left:]:
        shard.unlink()
    (problem,) = open_source(folder).problems
    assert "holds both model.safetensors and shards such as model-00001-of-00002" in problem
    assert "remove or move one of the two" in problem


def test_adapters_and_variants_beside_a_whole_file_are_passed_over(tmp_path: Path) -> None:
    hf = sources.tensors(sources.DENSE)
    folder = sources.write_hf(tmp_path / "src", sources.DENSE, hf)
    save_file({"other": np.ones(3)}, folder / "adapter_model.safetensors")
    source = open_source(folder)
    assert not source.problems
    assert source.tensors.keys() == hf.keys()


def test_an_index_may_name_one_whole_file(tmp_path: Path) -> None:
    hf = sources.tensors(sources.DENSE)
    folder = sources.write_hf(tmp_path / "src", sources.DENSE, hf)
    index = {"metadata": {}, "weight_map": dict.fromkeys(hf, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = open_source(folder)
    assert not source.problems
    assert source.tensors.keys() == hf.keys()


def test_a_key_that_is_there_twice_is_named(tmp_path: Path) -> None:
    hf = sources.tensors(sources.DENSE)
    folder = sources.write_hf(tmp_path / "a", sources.DENSE, hf, shards=2)
    consolidated = sources.write_consolidated(tmp_path / "b", sources.PARAMS, hf)
    for file in (
        folder / "config.json",
        folder / "model.safetensors.index.json",
        consolidated / "params.json",
    ):
        before = file.read_text()
        file.write_text(before.rstrip().removesuffix("}") + ', "twice": 1, "twice": 2}')
        (problem,) = open_source(file.parent).problems
        assert file.name in problem and "twice is there twice" in problem
        file.write_text(before)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_deep_json_is_named(tmp_path: Path, file: str) -> None:
    hf = sources.tensors(sources.DENSE)
    folder = sources.write_hf(tmp_path / "src", sources.DENSE, hf, shards=2)
    (folder / file).write_text("[" * 200_000)
    problems = open_source(folder).problems
    assert len(problems) == 1 and file in problems[0]
