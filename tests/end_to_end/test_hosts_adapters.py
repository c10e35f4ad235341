"""Adapters of a model in two processes: loaded while it runs, in both; experts counted in both."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mixtral_jax.checkpoint.adapter import write_adapter
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.generation import generate_tokens
from mixtral_jax.model.adapter import AdapterConfig
from serving.client import AsyncClient, Client
from serving.client.types import Completion
from tests.end_to_end.test_hosts import group
from tests.support.adapters import random_adapter
from tests.support.merged_models import merged_model
from tests.support.models import model_of
from tests.support.servers import free_ports

pytestmark = pytest.mark.soak

BASE = "tiny-random"
CONFIG = open_pretrained(BASE).card.model
SETTINGS = AdapterConfig(targets=("q", "o", "router", "up", "down"), rank=4, alpha=8.0)
PROMPT = [1, *range(40, 60)]
LENGTH = 10
SEEDS = {"fixed": 1, "later": 2}


def expected() -> dict[str, tuple[int, ...]]:
    models = {BASE: model_of(CONFIG)}
    for name, seed in SEEDS.items():
        adapter = random_adapter(CONFIG, SETTINGS, seed=seed, size=0.3)
        models[name] = merged_model(CONFIG, adapter, SETTINGS)
    answers = {n: tuple(generate_tokens(m, PROMPT, max_tokens=LENGTH)) for n, m in models.items()}
    assert len(set(answers.values())) == len(answers)
    return answers


def write(folder: Path, name: str) -> Path:
    adapter = random_adapter(CONFIG, SETTINGS, seed=SEEDS[name], size=0.3)
    write_adapter(folder, adapter, SETTINGS, base="some/base")
    return folder


def test_an_adapter_that_comes_at_run_time_is_computed_by_both_processes(tmp_path: Path) -> None:
    """Experts and heads are split over the two, so that half of each adapter is in the other."""
    folder = tmp_path / "followed"
    folder.mkdir()
    (port,) = free_ports(1)
    options: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
    flags = [
        *("--mesh", "data=1,expert=2,tensor=1", "--max-adapter-rank=4", "--no-prefix-reuse"),
        *(f"--adapter=fixed={write(tmp_path / 'fixed', 'fixed')}", f"--adapters-folder={folder}"),
        *("--expert-metrics", f"--metrics-port={port}"),
    ]
    with group(2, 1, *flags) as group_:
        target, key = group_.leader.target, group_.leader.key
        write(folder / ".later", "later").rename(folder / "later")
        with Client(target, key=key) as client:
            deadline = time.monotonic() + 60
            while client.info().adapters != ("fixed", "later"):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        names = [BASE, *SEEDS] * 3

        async def ask() -> list[Completion]:
            async with AsyncClient(target, key=key) as client:
                asked = (client.complete(PROMPT, model=name, **options) for name in names)
                return await asyncio.gather(*asked)

        want = expected()
        for name, answer in zip(names, asyncio.run(ask()), strict=True):
            assert tuple(answer.choices[0].token_ids) == want[name], name
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        found = re.findall(
            r'^mixtral_expert_tokens_total\{expert="(\d+)",layer="(\d+)"\} (\S+)$', text, re.M
        )
        assert len(found) == CONFIG.num_layers * CONFIG.num_experts
        by_layer = np.zeros(CONFIG.num_layers)
        for _, layer, tokens in found:
            by_layer[int(layer)] += float(tokens)
        tokens = len(names) * (len(PROMPT) + LENGTH - 1)
        assert by_layer.tolist() == [tokens * CONFIG.experts_per_token] * CONFIG.num_layers
        assert "mixtral_compilations_total 0.0" in text
        (follower,) = group_.followers
        assert follower.process.poll() is None and not follower.told("started again")
