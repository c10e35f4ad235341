"""PEFT and transformers read our adapters as we do, and we read theirs, in both of their forms."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.checkpoint.adapter import StoredAdapter, read_adapter, write_adapter
from mixtral_jax.model.adapter import Adapter, AdapterConfig
from mixtral_jax.model.transformer import Transformer
from tests.support.adapters import ALL, random_adapter, read_settings
from tests.support.parity import huggingface, twin

torch = pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # PEFT looks for its own pattern among modules, though it is of a parameter and is used.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
TOKENS = np.random.default_rng(0).integers(0, 131, (2, 17))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SETTINGS = {
    # E = 3 and rank 4: experts and ranks cannot be taken for one another.
    "mixtral": AdapterConfig(targets=ALL, rank=4, alpha=6.0),
    "mistral": AdapterConfig(rank=4, alpha=6.0, rank_stabilized=True),
}
# What PEFT's users write for a model of transformers 5.
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": (
        "mixtral",
        {"target_parameters": ["gate_up_proj", "down_proj", "mlp.gate.weight"]},
    ),
    "gate and up only": (
        "mixtral",
        {"target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True},
    ),
    "names of transformers 4": (
        "mixtral",
        {"target_modules": [*ATTENTION, "gate", "w1", "w2", "w3"]},
    ),
    "all linear layers": ("mixtral", {"target_modules": "all-linear"}),
    "dense, ranks by module": (
        "mistral",
        {
            "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
            "alpha_pattern": {"k_proj": 11},
        },
    ),
    "dense, some layers": (
        "mistral",
        {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [0, 2]},
    ),
}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Products in float32, as torch's on a CPU."""
    with jax.default_matmul_precision("highest"):
        yield


def our_logits(model: Transformer, adapter: Adapter, settings: AdapterConfig) -> np.ndarray:
    """Logits with an adapter that was read or drawn."""
    return np.asarray(model(jnp.asarray(TOKENS), adapter.folded(settings)))


def their_logits(model: Any) -> np.ndarray:
    """Logits of a transformers model, or of PEFT's around it."""
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()


def save_random(kind: str, folder: Path, **settings: Any) -> tuple[Transformer, np.ndarray]:
    """Saves an adapter of random values by PEFT. Returns our model, and PEFT's logits."""
    base = huggingface(kind)
    ours = twin(base)
    config = peft.LoraConfig(
        **(
            {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
            | settings
        )
    )
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    return ours, their_logits(model.eval())


@pytest.mark.parametrize("kind", SETTINGS)
def test_peft_computes_what_we_compute_with_our_adapter(kind: str, tmp_path: Path) -> None:
    base = huggingface(kind)
    ours = twin(base)
    settings = SETTINGS[kind]
    adapter = random_adapter(ours.config, settings)
    write_adapter(tmp_path / "ours", adapter, settings, f"tiny/{kind}")
    plain = their_logits(base)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    want = their_logits(model)
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(our_logits(ours, adapter, settings), want, rtol=0, atol=1e-4)
    # Saved again, it is in the form of transformers 5, and still the same to the bit.
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = read_adapter(tmp_path / "theirs", ours.config)
    for got, put in zip(jax.tree.leaves(again.adapter), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(got, put)
    assert again.digest == read_adapter(tmp_path / "ours", ours.config).digest
    if kind == "mixtral":
        assert "gate_up_proj" in read_settings(tmp_path / "theirs")["target_parameters"]


@pytest.mark.parametrize("form", THEIRS)
def test_we_compute_what_peft_computes_with_its_adapter(form: str, tmp_path: Path) -> None:
    kind, settings = THEIRS[form]
    ours, want = save_random(kind, tmp_path / "theirs", **settings)
    stored: StoredAdapter = read_adapter(tmp_path / "theirs", ours.config)
    got = our_logits(ours, stored.adapter, stored.settings)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.abs(want - np.asarray(ours(jnp.asarray(TOKENS)))).max() > 0.1
    # Ours of it is read by PEFT again.
    write_adapter(tmp_path / "ours", stored.adapter, stored.settings, stored.base)
    model = peft.PeftModel.from_pretrained(huggingface(kind), str(tmp_path / "ours")).eval()
    np.testing.assert_allclose(their_logits(model), want, rtol=0, atol=1e-4)
