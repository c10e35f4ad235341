"""A merged checkpoint is the base with W + scaling * BA, rounded once; its rounding is counted."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.convert import convert
from convert.errors import ConversionError
from convert.export import export
from convert.merge import LayerChange, MergedReader, merge, summary
from mixtral_jax.checkpoint import restore
from mixtral_jax.checkpoint.adapter import read_adapter, write_adapter
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.errors import AdapterError
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.adapter import Adapter, AdapterConfig
from mixtral_jax.model.transformer import named_parameters
from tests.support import parity, sources
from tests.support.adapters import ALL, random_adapter

MOE, DENSE = from_hf(sources.MOE), from_hf(sources.DENSE)
SETTINGS = AdapterConfig(targets=ALL, rank=4, alpha=6.0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, sources.V, (2, 9)))
# Three rows of a head in each chunk: pieces begin within heads, experts and rows.
SMALL = 3 * 4 * sources.H * sources.D


def checkpoint(folder: Path, config: dict[str, object], dtype: str) -> Path:
    """A checkpoint of random weights."""
    sources.write_hf(folder / "src", config, sources.tensors(config), shards=1)
    convert(folder / "src", folder / "base", dtype=dtype, chunk_bytes=SMALL)
    return folder / "base"


def write_random(folder: Path, config: dict[str, object], size: float = 0.1) -> Adapter:
    """Writes an adapter of random values into `folder`/adapter."""
    model = from_hf(config)
    settings = SETTINGS if model.is_moe else AdapterConfig(rank=4, alpha=6.0)
    adapter = random_adapter(model, settings, size=size)
    write_adapter(folder / "adapter", adapter, settings, "base")
    return adapter.folded(settings)


@pytest.mark.slow
@pytest.mark.parametrize("config", [sources.MOE, sources.DENSE], ids=["moe", "dense"])
def test_merged_equals_the_base_with_its_adapter(tmp_path: Path, config: dict[str, object]) -> None:
    base = checkpoint(tmp_path, config, "float32")
    adapter = write_random(tmp_path, config)
    done = []
    result = merge(
        base,
        tmp_path / "adapter",
        tmp_path / "tuned",
        progress=lambda *of: done.append(of),
    )
    assert result.card == Card.read(tmp_path / "tuned")
    assert (result.card.name, result.card.dtype) == ("tuned", "float32")
    assert done[-1][0] == done[-1][1] > 0
    model, tuned = restore.load(base)[0], restore.load(tmp_path / "tuned")[0]
    with jax.default_matmul_precision("highest"):
        want, got = model(TOKENS, adapter), tuned(TOKENS)
    assert np.abs(want - model(TOKENS)).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    # What has no adapter keeps its bits, and float32 keeps the whole change.
    for name in ("embed.weight", "norm.weight", "head.weight"):
        before, after = (named_parameters(m)[name].get_value() for m in (model, tuned))
        np.testing.assert_array_equal(before, after)
    assert all(0 < layer.error < 1e-5 for layer in result.layers)


def test_weights_are_rounded_once_and_what_that_loses_is_counted(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, sources.MOE, "bfloat16")
    adapter = write_random(tmp_path, sources.MOE, size=0.02)
    result = merge(base, tmp_path / "adapter", tmp_path / "tuned", chunk_bytes=SMALL)
    model, tuned = restore.load(base)[0], restore.load(tmp_path / "tuned")[0]
    whole = merge(base, tmp_path / "adapter", tmp_path / "whole")
    same = restore.load(tmp_path / "whole")[0]
    for name, variable in named_parameters(same).items():  # pieces of any size: the same bits
        np.testing.assert_array_equal(
            variable.get_value(), named_parameters(tuned)[name].get_value()
        )
    assert [layer.changed for layer in whole.layers] == [layer.changed for layer in result.layers]
    names = {"gate": "EFU,EUD->EFD", "q": "NHU,UD->NHD", "o": "DU,UNH->DNH", "down": "EDU,EUF->EDF"}
    for i, block in enumerate(adapter.layers):
        for target, letters in names.items():
            room = "attention" if target in "qo" else "feed_forward"
            name = f"layers.{i}.{room}.{target}.weight"
            before, after = (
                np.asarray(named_parameters(m)[name].get_value()) for m in (model, tuned)
            )
            low = getattr(block, target)
            delta = np.einsum(letters, np.float64(low.b), np.float64(low.a))
            # A sum that is half-way between two values may go either way.
            want = (np.float64(before) + delta).astype(ml_dtypes.bfloat16)
            assert (want == after).mean() > 0.999
    total = [np.float64(0)] * 3
    for low, name in ((adapter.layers[1]._asdict()[t], t) for t in ALL):
        room = "attention" if name in "qkvo" else "feed_forward"
        before, after = (
            np.float64(named_parameters(m)[f"layers.1.{room}.{name}.weight"].get_value())
            for m in (model, tuned)
        )
        b, a = np.float64(low.b), np.float64(low.a)
        lead = (3,) if name in ("gate", "up", "down") else ()
        delta = np.matmul(b.reshape(*lead, -1, 4), a.reshape(*lead, 4, -1)).reshape(before.shape)
        total[0] += np.square(delta).sum()
        total[1] += np.square(after - before - delta).sum()
        total[2] += np.count_nonzero(after != before)
    layer = result.layers[1]
    np.testing.assert_allclose(layer.error, np.sqrt(total[1] / total[0]), rtol=1e-4)
    assert layer.changed == total[2]
    assert 0.1 < layer.error < 0.9
    # The same in float32 loses nothing.
    kept = merge(base, tmp_path / "adapter", tmp_path / "wide", dtype="float32")
    assert kept.card.dtype == "float32"
    assert kept.worst.error < 1e-4


def test_the_summary_names_the_worst_layer() -> None:
    layers = (
        LayerChange(0, weights=100, changed=90, squares=4.0, lost_squares=0.01),
        LayerChange(1),
        LayerChange(2, weights=100, changed=25, squares=1.0, lost_squares=0.25),
    )
    lines = list(summary(layers, "bfloat16"))
    assert lines[1].split() == ["0", "2.00e-01", "10.0%", "5.0%"]
    assert lines[2].split() == ["2", "1.00e-01", "75.0%", "50.0%"]
    assert lines[3] == (
        "bfloat16 loses most in layer 2: 50.0% of its change; --dtype float32 keeps it"
    )


def test_export_with_an_adapter_is_the_export_of_the_merged(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, sources.MOE, "bfloat16")
    write_random(tmp_path, sources.MOE)
    merge(base, tmp_path / "adapter", tmp_path / "tuned")
    export(tmp_path / "tuned", tmp_path / "want")
    stored = read_adapter(tmp_path / "adapter", MOE)
    reader = MergedReader(base, Card.read(base), stored)
    export(base, tmp_path / "got", reader=reader, shard_bytes=40_000)
    convert(tmp_path / "got", tmp_path / "again")
    again, tuned = (restore.load(tmp_path / name)[0] for name in ("again", "tuned"))
    for name, variable in named_parameters(tuned).items():
        np.testing.assert_array_equal(
            variable.get_value(), named_parameters(again)[name].get_value()
        )
    assert json.loads((tmp_path / "got/config.json").read_text())["num_local_experts"] == 3
    assert all(layer.weights for layer in reader.layers)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, sources.MOE, "float32")
    write_random(tmp_path, sources.MOE)
    destination = tmp_path / "tuned"
    with pytest.raises(ConversionError, match="float32 or bfloat16, not as int8"):
        merge(base, tmp_path / "adapter", destination, dtype="int8")
    card = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(card | {"dtype": "int8"}))
    with pytest.raises(ConversionError, match="stored as int8.*serve the adapter beside it"):
        merge(base, tmp_path / "adapter", destination)
    (base / "config.json").write_text(json.dumps(card))
    with pytest.raises(AdapterError, match="no adapter"):
        merge(base, base, destination)
    assert not destination.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_transformers_computes_with_the_export_what_peft_does_with_the_adapter(
    tmp_path: Path,
) -> None:
    torch = pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
    import peft
    import transformers

    theirs = parity.huggingface("mixtral")
    theirs.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "base")
    adapter = random_adapter(Card.read(tmp_path / "base").model, SETTINGS)
    write_adapter(tmp_path / "adapter", adapter, SETTINGS, "some/base")
    reader = MergedReader.open(tmp_path / "base", tmp_path / "adapter")
    export(tmp_path / "base", tmp_path / "out", reader=reader)
    exported = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        got, want = exported(ids).logits.numpy(), adapted(ids).logits.numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
