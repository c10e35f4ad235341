"""The library and the server run the same compiled programs, compared by their text."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from jax.stages import Compiled

import mixtral_jax
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.checkpoint.writer import save
from mixtral_jax.config import ModelConfig
from mixtral_jax.generation import steps_for
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.engine.build import prepare
from serving.engine.config import EngineConfig
from tests.support.models import model_of

MOE = replace(
    ModelConfig.tiny(vocab_size=ByteTokenizer().vocab_size),
    num_heads=8,
    num_kv_heads=4,
    head_size=8,
    num_experts=8,
    experts_per_token=2,
    sliding_window=None,
    max_context=256,
)


def engine_config(folder: Path, mesh: str, dp_attention: bool, sequences: int) -> EngineConfig:
    """An engine with room for one sequence of the whole context in each partition."""
    return EngineConfig(
        model=str(folder),
        dtype=None,
        mesh=mesh,
        dp_attention=dp_attention,
        max_sequences=sequences,
        max_step_tokens=128 * sequences,
        max_waiting=8,
        kv_memory=64,
        kv_dtype=None,
        prefix_reuse=True,
        deterministic=False,
    )


@pytest.fixture(scope="module", params=["float32", "int8"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / request.param
    card = Card(model=MOE, dtype=request.param, name="tiny", provider="nobody")
    save(path, model_of(MOE, request.param), card, [])
    ByteTokenizer().save(path)
    return path


def instructions(program: Compiled) -> list[str]:
    """Every instruction of a program, without the source lines that it was traced from."""
    text = program.as_text()
    assert text is not None
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(("%", "ENTRY")))
    return [re.sub(r", metadata=\{[^}]*\}", "", line) for line in [lines[0], *lines[first:]]]


@pytest.mark.parametrize(
    "dp_attention",
    [
        pytest.param(False, id="heads"),
        pytest.param(True, id="sequences", marks=pytest.mark.soak),
    ],
)
def test_generate_and_serve_run_the_same_programs_on_a_mesh(
    folder: Path, dp_attention: bool
) -> None:
    """Eight devices; `load(mesh=...)` and `generate` beside what `serve --mesh` prepares."""
    mesh = "expert=4,tensor=2"
    model, _ = mixtral_jax.load(folder, mesh=mesh, dp_attention=dp_attention)
    ours = steps_for(model, MOE.max_context, has_masks=True)
    groups = model.placement.num_sequence_groups
    assert groups == (4 if dp_attention else 1)
    served = prepare(
        engine_config(folder, mesh, dp_attention, groups),
        open_pretrained(folder),
        lambda line: None,
    ).steps
    assert served.sizes == ours.sizes
    assert served.pages == ours.pages
    assert set(ours.buckets) <= set(served.buckets)
    for bucket, programs in ours.buckets.items():
        others = served.buckets[bucket].all
        for program, other in zip(programs.all[:5], others[:5], strict=True):  # the draws are last
            assert program is not None and other is not None
            assert instructions(program) == instructions(other), bucket
        # The mesh is in the program: devices exchange activations.
        block = "\n".join(instructions(programs.blocks[0]))
        assert "all-reduce" in block or "all-to-all" in block
